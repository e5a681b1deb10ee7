//! A file whose owner does not answer: on a file system (FUSE) that the test serves itself.

#![expect(clippy::host_endian_bytes, reason = "the kernel of this host asks and is answered")]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use small_vmm::driver::MemDriver;
use small_vmm::frontend::Frontend;
use small_vmm::memory::GuestRam;
use small_vmm::protocol::{self, MemoryRegion, Request};

use super::{BOOT, PATIENCE};

/// Bytes in front of a request and of an answer (`linux/fuse.h`).
const REQUEST: usize = 40;
const ANSWER: usize = 16;
/// More than any request here.
const LONGEST: usize = 64 << 10;

/// Where the front-end has such a file mapped, as it says.
pub const SILENT: u64 = 0x10_0000;

/// A file whose owner answers for now. Where there can be none, it says so and the test is skipped.
pub fn silent_file(size: u64) -> Option<SilentFile> {
    let file = SilentFile::new(size).inspect_err(|error| {
        // Past the test harness, which shows the output of failed tests only.
        let _ = writeln!(io::stderr(), "skipped: no file system of its own: {error}");
    });
    file.ok()
}

/// Adds `file` to the memory table, whole; the answer is not waited for.
pub fn add(frontend: &Frontend, guest_addr: u64, size: u64, file: &SilentFile) {
    let region = MemoryRegion { guest_addr, size, user_addr: SILENT, mmap_offset: 0 };
    let (payload, fds) = (protocol::single_mem_region(region), [file.file.as_fd()]);
    frontend.connection().send(Request::AddMemReg, 0, &payload, &fds).unwrap();
}

/// Starts the ring anew with its descriptors, and nothing else, in `file`, which no other thread than the ring's
/// reads.
pub fn put_descriptors_into(
    file: &SilentFile,
    frontend: &Frontend,
    ram: &GuestRam,
    driver: &MemDriver,
) {
    add(frontend, 1 << 40, BOOT, file);
    frontend.get_vring_base(0).unwrap();
    let ring = driver.ring();
    let user = |gpa| ram.user_addr(gpa).unwrap();
    let (used, available) = (user(ring.used_addr()), user(ring.avail_addr()));
    let addresses = protocol::vring_addr(0, 0, SILENT, used, available, 0);
    frontend.request(Request::SetVringAddr, &addresses, &[]).unwrap();
    frontend.set_vring_fd(Request::SetVringKick, 0, Some(ring.kick_fd())).unwrap();
    frontend.enable(0, true).unwrap();
}

/// A regular file, which is the root of its file system.
pub struct SilentFile {
    pub file: File,
    kernel: Arc<File>,
    silent: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

impl SilentFile {
    /// A file of `size` bytes of zeros that answers until it is [silent](Self::fall_silent); the reason
    /// when there can be none, which takes privileges.
    pub fn new(size: u64) -> io::Result<Self> {
        let kernel = Arc::new(File::options().read(true).write(true).open("/dev/fuse")?);
        let place = tempfile::NamedTempFile::new()?;
        let fd = kernel.as_raw_fd();
        let options = CString::new(format!(
            "fd={fd},rootmode=100600,user_id={},group_id={}",
            rustix::process::getuid().as_raw(),
            rustix::process::getgid().as_raw(),
        ))?;
        let flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
        mount("silent", place.path(), "fuse", flags, Some(options.as_c_str()))?;
        let silent = Arc::new(AtomicBool::new(false));
        let (serving, quiet) = (Arc::clone(&kernel), Arc::clone(&silent));
        let server = thread::spawn(move || serve(&serving, size, &quiet));
        let file = File::options().read(true).write(true).open(place.path());
        // The file stays open, and nothing of it is left in the file system.
        unmount(place.path(), UnmountFlags::DETACH)?;
        let file = file?;
        // A mapping is of the size that the kernel was told last.
        assert_eq!(file.metadata()?.len(), size);
        Ok(Self { file, kernel, silent, server: Some(server) })
    }

    /// Answers nothing from now on.
    pub fn fall_silent(&mut self) {
        self.silent.store(true, Ordering::SeqCst);
        if let Some(server) = self.server.take() {
            server.join().unwrap();
        }
    }

    /// Waits until something has been asked that is not answered.
    pub fn wait_asked(&self) {
        let deadline = Instant::now() + PATIENCE;
        while !is_asked(&self.kernel) {
            assert!(Instant::now() < deadline, "nothing is asked of the file");
        }
    }

    /// Takes what is asked, and answers nothing all the same.
    pub fn take_request(&self) {
        self.wait_asked();
        rustix::io::read(&self.kernel, &mut vec![0; LONGEST]).unwrap();
    }
}

impl Drop for SilentFile {
    fn drop(&mut self) {
        self.fall_silent();
    }
}

/// Whether there is a request, after a moment at the latest.
fn is_asked(kernel: &File) -> bool {
    let moment = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
    let mut fds = [PollFd::new(kernel, PollFlags::IN)];
    poll(&mut fds, Some(&moment)) == Ok(1)
}

fn serve(kernel: &File, size: u64, silent: &AtomicBool) {
    let mut request = vec![0; LONGEST];
    while !silent.load(Ordering::SeqCst) {
        if !is_asked(kernel) {
            continue;
        }
        // What was asked may have been withdrawn.
        let Ok(len) = rustix::io::read(kernel, &mut request) else { continue };
        let opcode = u32::from_ne_bytes(request[4..8].try_into().unwrap());
        let unique = &request[8..16];
        let (error, body) = match answer(opcode, &request[REQUEST..len], size) {
            // FORGET and its kind have no answer.
            None => continue,
            Some(Ok(body)) => (0, body),
            Some(Err(errno)) => (-errno.raw_os_error(), Vec::new()),
        };
        let mut bytes = Vec::new();
        bytes.extend(((ANSWER + body.len()) as u32).to_ne_bytes());
        bytes.extend(error.to_ne_bytes());
        bytes.extend(unique);
        bytes.extend(body);
        let _ = rustix::io::write(kernel, &bytes);
    }
}

fn answer(opcode: u32, asked: &[u8], size: u64) -> Option<Result<Vec<u8>, Errno>> {
    const FORGET: u32 = 2;
    const GETATTR: u32 = 3;
    const OPEN: u32 = 14;
    const READ: u32 = 15;
    const INIT: u32 = 26;
    const BATCH_FORGET: u32 = 42;
    let word = |value: u32| value.to_ne_bytes().to_vec();
    Some(Ok(match opcode {
        FORGET | BATCH_FORGET => return None,
        INIT => {
            // Version 7.31, no features, and writes of a page.
            let mut init = [word(7), word(31), word(0), word(0), word(0), word(4096)].concat();
            init.resize(64, 0);
            init
        }
        GETATTR => {
            let mut attr = vec![0; 104];
            // Not for keeping, so that whatever looks at the file asks again; inode 1.
            attr[16..24].copy_from_slice(&1u64.to_ne_bytes());
            attr[24..32].copy_from_slice(&size.to_ne_bytes());
            attr[76..80].copy_from_slice(&0o100_600_u32.to_ne_bytes());
            attr[80..84].copy_from_slice(&1u32.to_ne_bytes());
            attr
        }
        OPEN => vec![0; 16],
        READ => {
            let at = |from: usize| u64::from_ne_bytes(asked[from..from + 8].try_into().unwrap());
            let len = u32::from_ne_bytes(asked[16..20].try_into().unwrap());
            vec![0; size.saturating_sub(at(8)).min(u64::from(len)) as usize]
        }
        _ => return Some(Err(Errno::NOSYS)),
    }))
}
