//! What a guest's pager leaves to the one after it: the userfaultfd, the connection and the journal, kept by the
//! [service manager](program::service_manager).
//!
//! The three are kept by one message under one name, so that all of them are there or none; what each is, the descriptor
//! itself tells. They are kept before the first page is placed, and discarded once the guest needs no pager or has ended.

use std::os::fd::{AsFd, OwnedFd};
use std::thread;

use migration::lazy::vmm_faults::VmmFaults;
use program::service_manager;
use rustix::fs::{FileType, FlockOperation, fcntl_lock, fstat};
use rustix::io::Errno;

use super::Loaded;
use super::guest::Guest;
use super::memory_files::MemoryFiles;
use super::vmm::Vmm;
use crate::cli::report::Report;
use crate::error::PagerError;
use crate::run::{POLL, Run};

/// By which the service manager knows the descriptors.
const NAME: &str = "vmem-pager-firecracker";
/// As many are kept.
const COUNT: usize = 3;

/// A guest whose pager has died.
#[derive(Debug)]
pub(super) struct Left {
    pub vmm: Vmm,
    pub uffd: VmmFaults,
    pub journal: OwnedFd,
}

/// Why a guest whose pager has died cannot be continued, and its VMM, where that is known.
pub(super) type Unusable = (PagerError, Option<Vmm>);

/// What the service manager has kept, if anything.
///
/// # Errors
///
/// When it is not whole.
pub(super) fn take() -> Result<Option<Left>, Unusable> {
    let kept = service_manager::take_kept();
    let kept = kept.map_err(|error| (PagerError::system("take over descriptors")(error), None))?;
    let fds = kept.into_iter().filter(|(name, _)| name == NAME).map(|(_, fd)| fd);
    sort(fds.collect())
}

/// Tells the descriptors apart.
fn sort(fds: Vec<OwnedFd>) -> Result<Option<Left>, Unusable> {
    if fds.is_empty() {
        return Ok(None);
    }
    let count = fds.len();
    let (mut vmm, mut uffd, mut journal) = (None, None, None);
    for fd in fds {
        match fstat(&fd).map(|stat| FileType::from_raw_mode(stat.st_mode)) {
            Ok(FileType::Socket) => vmm = Some(Vmm::of(fd)),
            Ok(FileType::RegularFile) => journal = Some(fd),
            _ => uffd = VmmFaults::new(fd).ok().or(uffd),
        }
    }
    match (vmm, uffd, journal) {
        (Some(vmm), Some(uffd), Some(journal)) => Ok(Some(Left { vmm, uffd, journal })),
        (vmm, ..) => {
            let what = format!(
                "{count} descriptors that a pager has left do not belong to a guest; expected {COUNT}: does the \
                 service manager keep as many (FileDescriptorStoreMax={COUNT})?"
            );
            Err((PagerError::Protocol(what), vmm))
        }
    }
}

/// Has the service manager keep what is needed to continue, if there is one.
pub(super) fn keep(loaded: &Loaded, report: &Report) {
    if !service_manager::is_there() {
        return;
    }
    if let Some(room) = service_manager::room().filter(|room| *room < COUNT) {
        report.warn(&format!(
            "the service manager keeps {room} descriptors of this pager, of {COUNT} that are needed to continue after \
             its death: set FileDescriptorStoreMax={COUNT}"
        ));
        return;
    }
    let Loaded { vmm, uffd, guest } = loaded;
    let fds = [vmm.socket(), uffd.as_fd(), guest.journal()];
    if let Err(error) = service_manager::keep(NAME, &fds) {
        report.warn(&format!("the guest has no memory if this pager dies: {error}"));
    }
}

/// Tells the service manager that the guest needs no pager any more.
pub(super) fn forget(report: &Report) {
    if let Err(error) = service_manager::forget(NAME) {
        report.warn(&format!("the service manager still keeps descriptors of this guest: {error}"));
    }
}

/// Waits until no other process serves the guest: a worker may have outlived its supervisor.
///
/// # Errors
///
/// When the run ends, or the VMM.
pub(super) fn lock(journal: impl AsFd, vmm: &Vmm, run: &Run) -> Result<(), PagerError> {
    loop {
        // Of the process, not of the descriptor, which all of them share: it goes with the process.
        match fcntl_lock(&journal, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::AGAIN | Errno::ACCESS | Errno::INTR) => {}
            Err(errno) => return Err(PagerError::system("lock the states of pages")(errno.into())),
        }
        if vmm.has_ended() {
            let what = "Firecracker ended while another pager served it";
            return Err(PagerError::Peer(what.to_owned()));
        }
        run.check("another pager serves the VMM")?;
        thread::sleep(POLL);
    }
}

impl Left {
    /// Continues with it, as the one process that does.
    ///
    /// # Errors
    ///
    /// As for [`lock`], and [`Guest::take_over`].
    pub fn take_over(self, files: &MemoryFiles, run: &Run) -> Result<Loaded, (PagerError, Vmm)> {
        let Self { vmm, uffd, journal } = self;
        match lock(&journal, &vmm, run).and_then(|()| Guest::take_over(journal, files)) {
            Ok(guest) => Ok(Loaded { vmm, uffd, guest }),
            Err(error) => Err((error, vmm)),
        }
    }

    /// Has others continue with it.
    ///
    /// # Errors
    ///
    /// As for [`Guest::look`].
    pub fn look(self, files: &MemoryFiles) -> Result<Loaded, (PagerError, Vmm)> {
        let Self { vmm, uffd, journal } = self;
        match Guest::look(journal, files) {
            Ok(guest) => Ok(Loaded { vmm, uffd, guest }),
            Err(error) => Err((error, vmm)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    #[test]
    fn descriptors_that_are_not_of_a_guest_are_refused_and_tell_the_vmm() {
        assert!(sort(Vec::new()).unwrap().is_none());
        let file = || File::open("/proc/self/exe").unwrap();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let (error, vmm) = sort(vec![file().into(), ours.into()]).unwrap_err();
        assert!(error.to_string().contains("FileDescriptorStoreMax=3"), "{error}");
        assert!(vmm.is_some());
        let directory = File::open("/").unwrap();
        assert!(sort(vec![file().into(), directory.into()]).unwrap_err().1.is_none());
    }
}
