//! Two processes: one keeps what is needed to continue, and the other, its worker, serves the guest.
//!
//! Kept are the userfaultfd, the connection, and the journal with the layout and the state of each page. A worker that
//! dies has lost nothing: what the kernel told it is in the journal, and vCPUs that wait are woken by the next
//! worker and fault again. When this process dies, its worker continues alone.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use migration::lazy::vmm_faults::VmmFaults;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde_json::json;

use super::guest::Guest;
use super::kept::Left;
use super::memory_files::MemoryFiles;
use super::vmm::Vmm;
use super::{Loaded, end};
use crate::cli::report::Report;
use crate::error::PagerError;
use crate::run::Run;

/// Workers that may die one after the other without a page more being with the VMM.
const DEATHS: u32 = 5;
/// Between two looks at a worker.
const LOOK: Duration = Duration::from_millis(20);
/// What is sent with the descriptors.
const WORD: &[u8] = b"vmem-pager-worker";

/// Has workers serve the guest until one has done it.
pub(super) fn supervise(
    loaded: &Loaded,
    files: &MemoryFiles,
    run: &Run,
    report: &Report,
) -> Result<(), PagerError> {
    let Loaded { vmm, guest, .. } = loaded;
    let (mut deaths, mut outstanding) = (0, guest.outstanding_bytes());
    loop {
        let mut worker = start(loaded).map_err(|error| end(vmm, error))?;
        report.event("worker", &json!({ "pid": worker.id() }));
        let status = match wait(&mut worker, run) {
            Ok(status) => status,
            Err(error) => {
                // It is ours, and has not been waited for.
                let _ = worker.kill().and_then(|()| worker.wait());
                return Err(end(vmm, error));
            }
        };
        match (status.code(), status.signal()) {
            (Some(0), _) => return Ok(()),
            // It has said why, and has ended the VM where that was needed.
            (Some(code), _) => return Err(PagerError::Worker(u8::try_from(code).unwrap_or(1))),
            (None, signal) => {
                let left = left(guest, files)?;
                deaths = if left < outstanding { 1 } else { deaths + 1 };
                outstanding = left;
                let signal = signal.unwrap_or(0);
                if deaths > DEATHS {
                    let what = format!("{deaths} workers died, the last by signal {signal}");
                    return Err(end(vmm, PagerError::Peer(what)));
                }
                report.warn(&format!(
                    "the process that served the guest died by signal {signal}, with {left} bytes outstanding; \
                     another one continues"
                ));
            }
        }
    }
}

/// What is outstanding by the journal, bytes.
fn left(guest: &Guest, files: &MemoryFiles) -> Result<u64, PagerError> {
    let journal = guest.journal().try_clone_to_owned();
    let journal = journal.map_err(PagerError::system("copy a descriptor"))?;
    Guest::look(journal, files).map(|guest| guest.outstanding_bytes())
}

fn wait(worker: &mut Child, run: &Run) -> Result<ExitStatus, PagerError> {
    loop {
        if let Some(status) = worker.try_wait().map_err(PagerError::system("wait for a worker"))? {
            return Ok(status);
        }
        run.check("the VMM has not got all of its memory")?;
        thread::sleep(LOOK);
    }
}

/// Starts a worker with copies of the descriptors.
fn start(loaded: &Loaded) -> Result<Child, PagerError> {
    let failed = || PagerError::system("start a worker");
    let (ours, theirs) = UnixStream::pair().map_err(failed())?;
    let Loaded { vmm, uffd, guest } = loaded;
    let fds = [vmm.socket(), uffd.as_fd(), guest.journal()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(&ours, &[IoSlice::new(WORD)], &mut control, SendFlags::NOSIGNAL)
        .map_err(|errno| failed()(errno.into()))?;
    let mut command = Command::new("/proc/self/exe");
    command.args(std::env::args_os().skip(1)).arg("--worker");
    if let Some(group) = program::listener::access().group {
        command.args(["--socket-group", &group.to_string()]);
    }
    command.stdin(OwnedFd::from(theirs)).stdout(Stdio::inherit()).spawn().map_err(failed())
}

/// Receives what a supervisor sends.
pub(super) fn receive(from: impl AsFd) -> Result<Left, PagerError> {
    let wrong = || PagerError::Usage("--worker is for --supervise alone; use that".to_owned());
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut word = [0; WORD.len()];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = recvmsg(from, &mut [IoSliceMut::new(&mut word)], &mut control, flags);
    received.map_err(|_| wrong())?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let [socket, uffd, journal] = <[OwnedFd; 3]>::try_from(fds).map_err(|_| wrong())?;
    let vmm = Vmm::of(socket);
    match VmmFaults::new(uffd) {
        Ok(uffd) => Ok(Left { vmm, uffd, journal }),
        Err(error) => Err(end(&vmm, PagerError::system("take over a userfaultfd")(error))),
    }
}
