//! The transfer of a state over a descriptor of the front-end, one at a time.
//!
//! The other end is not ours: it may stay open, stall, or be read and written by others. So no
//! read and no write waits; what waits is a `poll` that also hears of the connection's end, and
//! that gives up when nothing has moved for a time.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, PipeReader, PipeWriter, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev2};

use crate::shared_file::FileKind;

/// How long a transfer of a daemon may stand still.
pub const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Bytes that are read or written at once.
const CHUNK: usize = 64 << 10;
/// Where a stream has no position to give.
const NO_OFFSET: u64 = u64::MAX;

/// The transfers of one connection.
pub struct Transfers {
    state: Mutex<State>,
    changed: Condvar,
    /// Hung up once the connection has ended.
    end: PipeReader,
    silence_max: Duration,
    /// Whether files of any file system are taken.
    allows_files: AtomicBool,
}

struct State {
    phase: Phase,
    /// Hangs up when dropped.
    connection: Option<PipeWriter>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    None,
    Running,
    Done { well: bool },
}

/// The descriptor of a transfer.
pub struct Channel {
    file: File,
    /// Pipes and sockets can stand still, files in memory cannot.
    waits: bool,
    transfers: Arc<Transfers>,
}

impl Transfers {
    /// No transfer yet. One that stands still for `silence_max` fails.
    ///
    /// # Errors
    ///
    /// When there is no descriptor to be had.
    pub fn new(silence_max: Duration) -> io::Result<Arc<Self>> {
        let (end, connection) = io::pipe()?;
        let state = State { phase: Phase::None, connection: Some(connection) };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        let allows_files = AtomicBool::new(false);
        Ok(Arc::new(Self { state, changed, end, silence_max, allows_files }))
    }

    /// Takes files of any file system, or only memory: reading and writing others may stand still
    /// without a bound.
    pub fn allow_files(&self, allow: bool) {
        self.allows_files.store(allow, Ordering::Relaxed);
    }

    /// Runs `transfer` in a thread of its own and closes `file` after it. `name` is for logs.
    ///
    /// # Errors
    ///
    /// When another transfer runs, the connection has ended, or `file` is nothing that a state
    /// is sent over.
    pub fn start(
        self: &Arc<Self>,
        name: &'static str,
        file: File,
        transfer: impl FnOnce(&mut Channel) -> anyhow::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        let waits = match FileKind::of(&file) {
            FileKind::Pipe | FileKind::Socket => true,
            FileKind::Memory => false,
            FileKind::Other if !self.allows_files.load(Ordering::Relaxed) => {
                return Err(io::Error::other("not a pipe, a socket or a file in memory"));
            }
            FileKind::Other => match FileType::from_raw_mode(fstat(&file)?.st_mode) {
                FileType::RegularFile => false,
                _ => return Err(io::Error::other("not a pipe, a socket or a regular file")),
            },
        };
        {
            let mut state = self.state.lock();
            if state.connection.is_none() || state.phase == Phase::Running {
                return Err(io::Error::other("another transfer has not ended"));
            }
            state.phase = Phase::Running;
        }
        let mut channel = Channel { file, waits, transfers: Arc::clone(self) };
        let finish = Finish { transfers: Arc::clone(self), well: false };
        let run = move || {
            // Taken in whole: a closure takes the fields that it uses.
            let mut finish = finish;
            let outcome = transfer(&mut channel);
            // The front-end may wait for its end before it asks how it went.
            drop(channel);
            match &outcome {
                Ok(()) => tracing::info!("device state: {name} done"),
                Err(error) => tracing::error!("device state: {name} failed: {error:#}"),
            }
            finish.well = outcome.is_ok();
        };
        thread::Builder::new().name("device-state".to_owned()).spawn(run).map(drop)
    }

    /// Whether the last transfer went well. Waits for its end; false without one.
    pub fn check(&self) -> bool {
        let mut state = self.state.lock();
        self.changed.wait_while(&mut state, |state| state.phase == Phase::Running);
        state.phase == Phase::Done { well: true }
    }

    /// The connection has ended: a transfer that runs fails, and is over when this returns.
    pub fn end(&self) {
        let mut state = self.state.lock();
        state.connection = None;
        self.changed.wait_while(&mut state, |state| state.phase == Phase::Running);
    }
}

/// Ends a transfer when dropped, on every way out: others wait for it.
struct Finish {
    transfers: Arc<Transfers>,
    well: bool,
}

impl Drop for Finish {
    fn drop(&mut self) {
        self.transfers.state.lock().phase = Phase::Done { well: self.well };
        self.transfers.changed.notify_all();
    }
}

impl Channel {
    /// Reads to the end, but no more than one byte past `limit`.
    ///
    /// # Errors
    ///
    /// When the other end stands still, the connection ends, or it cannot be read.
    pub fn read_to_end(&mut self, limit: u64) -> io::Result<Vec<u8>> {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let (mut bytes, mut chunk) = (Vec::new(), vec![0; CHUNK]);
        while bytes.len() <= limit {
            let len = CHUNK.min((limit - bytes.len()).saturating_add(1));
            match self.advance(PollFlags::IN, |channel| channel.read_some(&mut chunk[..len]))? {
                0 => break,
                read => bytes.extend_from_slice(&chunk[..read]),
            }
        }
        Ok(bytes)
    }

    /// Writes everything.
    ///
    /// # Errors
    ///
    /// When the other end stands still, the connection ends, or it cannot be written.
    pub fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let part = &rest[..rest.len().min(CHUNK)];
            match self.advance(PollFlags::OUT, |channel| channel.write_some(part))? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                written => rest = &rest[written..],
            }
        }
        Ok(())
    }

    /// Whether the front-end is still there.
    pub fn is_wanted(&self) -> bool {
        self.transfers.state.lock().connection.is_some()
    }

    /// Repeats `step` until it does something.
    fn advance(
        &mut self,
        what: PollFlags,
        mut step: impl FnMut(&mut Self) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let start = Instant::now();
        loop {
            match step(self) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return done,
            }
            let silence_max = self.transfers.silence_max;
            let Some(left) = silence_max.checked_sub(start.elapsed()) else {
                let silence = format!("nothing moved for {silence_max:?}");
                return Err(io::Error::new(io::ErrorKind::TimedOut, silence));
            };
            let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut polled =
                [PollFd::new(&self.file, what), PollFd::new(&self.transfers.end, PollFlags::IN)];
            match poll(&mut polled, Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if !polled[1].revents().is_empty() {
                return Err(io::Error::other("the connection ended"));
            }
        }
    }

    fn read_some(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.waits {
            return self.file.read(buffer);
        }
        let mut buffers = [IoSliceMut::new(buffer)];
        Ok(preadv2(&self.file, &mut buffers, NO_OFFSET, ReadWriteFlags::NOWAIT)?)
    }

    fn write_some(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.waits {
            return self.file.write(bytes);
        }
        Ok(pwritev2(&self.file, &[IoSlice::new(bytes)], NO_OFFSET, ReadWriteFlags::NOWAIT)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::pipe;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    fn file(fd: impl Into<OwnedFd>) -> File {
        File::from(fd.into())
    }

    fn load(transfers: &Arc<Transfers>, from: File, limit: u64) -> Arc<Mutex<Vec<u8>>> {
        let read = Arc::new(Mutex::default());
        let result = Arc::clone(&read);
        let body = move |channel: &mut Channel| {
            *result.lock() = channel.read_to_end(limit)?;
            Ok(())
        };
        transfers.start("load", from, body).unwrap();
        read
    }

    #[test]
    fn bytes_pass_through_pipes_sockets_and_files() {
        let bytes: Vec<u8> = (0..1_000_000u32).map(|i| i as u8).collect();
        let pair = || {
            let (a, b) = UnixStream::pair().unwrap();
            (file(OwnedFd::from(a)), file(OwnedFd::from(b)))
        };
        let (reader, writer) = pipe().unwrap();
        for (from, to) in [(file(OwnedFd::from(reader)), file(OwnedFd::from(writer))), pair()] {
            let (loading, saving) =
                (Transfers::new(SILENCE_MAX).unwrap(), Transfers::new(SILENCE_MAX).unwrap());
            let read = load(&loading, from, 1 << 20);
            let body = bytes.clone();
            saving.start("save", to, move |channel| Ok(channel.write_all(&body)?)).unwrap();
            assert!(saving.check() && loading.check());
            assert!(*read.lock() == bytes);
        }
        let memfd = rustix::fs::memfd_create("stored", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        for (mut stored, allows_files) in
            [(File::from(memfd), false), (tempfile::tempfile_in(".").unwrap(), true)]
        {
            stored.write_all(&bytes).unwrap();
            io::Seek::rewind(&mut stored).unwrap();
            let transfers = Transfers::new(SILENCE_MAX).unwrap();
            transfers.allow_files(allows_files);
            let read = load(&transfers, stored, 1 << 20);
            assert!(transfers.check());
            assert!(*read.lock() == bytes);
        }
    }

    #[test]
    fn no_more_than_the_limit_is_read() {
        let transfers = Transfers::new(SILENCE_MAX).unwrap();
        let (reader, mut writer) = pipe().unwrap();
        let read = load(&transfers, file(OwnedFd::from(reader)), 100);
        let _ = writer.write_all(&[7; 4000]);
        assert!(transfers.check());
        assert_eq!(read.lock().len(), 101);
    }

    #[test]
    fn a_pipe_that_stays_open_ends_with_the_connection() {
        let transfers = Transfers::new(SILENCE_MAX).unwrap();
        assert!(!transfers.check(), "there was none yet");
        let (reader, writer) = pipe().unwrap();
        load(&transfers, file(OwnedFd::from(reader)), 100);
        let (other, _kept) = pipe().unwrap();
        assert!(transfers.start("load", file(OwnedFd::from(other)), |_| Ok(())).is_err());
        transfers.end();
        assert!(!transfers.check());
        drop(writer);
        let (reader, _kept) = pipe().unwrap();
        assert!(transfers.start("load", file(OwnedFd::from(reader)), |_| Ok(())).is_err());
    }

    #[test]
    fn a_pipe_on_which_nothing_moves_is_given_up() {
        let transfers = Transfers::new(Duration::from_millis(50)).unwrap();
        let (reader, mut writer) = pipe().unwrap();
        load(&transfers, file(OwnedFd::from(reader)), 100);
        writer.write_all(&[1, 2, 3]).unwrap();
        assert!(!transfers.check());
        let (_reader, writer) = pipe().unwrap();
        let body = |channel: &mut Channel| Ok(channel.write_all(&[0; 1 << 20])?);
        transfers.start("save", file(OwnedFd::from(writer)), body).unwrap();
        assert!(!transfers.check());
    }

    #[test]
    fn a_reader_that_goes_fails_a_save() {
        let transfers = Transfers::new(SILENCE_MAX).unwrap();
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let body = |channel: &mut Channel| Ok(channel.write_all(&[0; 1 << 20])?);
        transfers.start("save", file(OwnedFd::from(writer)), body).unwrap();
        assert!(!transfers.check());
    }

    #[test]
    fn a_transfer_that_panics_has_failed() {
        let transfers = Transfers::new(SILENCE_MAX).unwrap();
        let (_reader, writer) = pipe().unwrap();
        let panics = |_: &mut Channel| panic!("as expected");
        transfers.start("save", file(OwnedFd::from(writer)), panics).unwrap();
        assert!(!transfers.check());
        transfers.end();
    }

    #[test]
    fn devices_are_refused_and_files_that_are_not_memory_unless_they_are_allowed() {
        for allows_files in [false, true] {
            let transfers = Transfers::new(SILENCE_MAX).unwrap();
            transfers.allow_files(allows_files);
            let zero = File::open("/dev/zero").unwrap();
            assert!(transfers.start("load", zero, |_| Ok(())).is_err());
            let file = File::open("Cargo.toml").unwrap();
            assert_eq!(transfers.start("load", file, |_| Ok(())).is_ok(), allows_files);
        }
    }
}
