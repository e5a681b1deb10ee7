//! The channel between source and destination: how long it is waited for, and how it is cancelled, over
//! whatever [`Transport`] carries it.

use std::io::{self, Read};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use descriptor::{Descriptor, speaks_tls};
use patience::{Patience, deadline};

use crate::progress::Progress;
use crate::stream::FormatError;
pub use crate::sys::GatherWrite;
pub use transport::{Ready, Transport};

use crate::sys::WritePolicy;

mod descriptor;
pub(crate) mod patience;
#[cfg(feature = "tls")]
pub(crate) mod tls;
mod transport;

#[cfg(test)]
pub(crate) mod delayed;
#[cfg(test)]
pub(crate) mod faulty;

/// How often a wait asks whether it is cancelled.
const POLL: Duration = Duration::from_millis(50);

/// How long writes wait by default: nothing but the migration waits with them, and a destination may
/// well be busy for minutes before it reads on, with allocating what is plugged for instance.
pub(crate) const WRITE_PATIENCE: Duration = Duration::from_secs(5 * 60);

/// How long a read still waits when another channel has failed, where the other side could not be told yet.
const GRACE: Duration = Duration::from_millis(500);

/// How much of guest memory is copied at once for a transport that the kernel cannot gather to.
const COPY: usize = 256 << 10;

/// Where a stream goes.
pub trait Sink {
    /// Writes everything.
    ///
    /// # Errors
    ///
    /// When it cannot be written; `ECANCELED` when cancelled.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Writes everything, guest memory without a copy where that is possible, and forgets it.
    ///
    /// # Errors
    ///
    /// When it cannot be written; `ECANCELED` when cancelled.
    fn write_gathered(&mut self, gathered: &mut GatherWrite) -> io::Result<()>;

    /// Bytes written so far, those that were counted from elsewhere among them.
    fn written(&self) -> u64;

    /// Counts bytes of the same stream that went another way.
    fn count_elsewhere(&mut self, _bytes: u64) {}

    /// How long a write waits for a reader that reads nothing; `None` where nothing is waited for.
    fn write_patience(&self) -> Option<Duration> {
        None
    }
}

/// A stream that is kept, to be sent as a whole.
#[derive(Debug, Default)]
pub struct BufferSink {
    /// What was written.
    pub bytes: Vec<u8>,
}

impl Sink for BufferSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// Guest memory is not for keeping.
    fn write_gathered(&mut self, _gathered: &mut GatherWrite) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn written(&self) -> u64 {
        self.bytes.len() as u64
    }
}

/// A connected channel. Reads and writes wait until they are cancelled with their migration; writes also
/// end when the other side reads nothing, or next to nothing, for too long
/// ([`set_write_patience`](Self::set_write_patience)).
#[derive(Debug)]
pub struct Channel {
    transport: Arc<dyn Transport>,
    /// By which it is cancelled.
    progress: Option<Arc<Progress>>,
    /// Once true, it is too late for that.
    committed: Option<Arc<AtomicBool>>,
    /// By which its waits end when another channel of the migration fails.
    interrupt: Option<Interrupt>,
    written: u64,
    /// Where what is written is counted as it goes, too.
    counter: Option<Arc<AtomicU64>>,
    elsewhere: u64,
    /// No read waits longer; for the end of a migration, where the other side must answer.
    read_patience: Option<Duration>,
    /// How long writes wait for the other side to read.
    write_patience: Patience,
}

/// Ends the waits of channels that go with one that failed.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<Raised>);

#[derive(Debug, Default)]
struct Raised {
    at: OnceLock<Instant>,
    /// Reads wait on for a [`GRACE`] after that.
    has_grace: AtomicBool,
}

impl Interrupt {
    /// One after which reads still wait for a moment, until [`end_grace`](Self::end_grace): what is to come may be how
    /// the other side is told of the failure.
    pub(super) fn after_grace() -> Self {
        let interrupt = Self::default();
        interrupt.0.has_grace.store(true, Ordering::Release);
        interrupt
    }

    /// It ends reads at once from now on.
    pub(super) fn end_grace(&self) {
        self.0.has_grace.store(false, Ordering::Release);
    }

    /// Ends them, for good.
    pub fn raise(&self) {
        self.0.at.get_or_init(Instant::now);
    }

    fn is_raised(&self) -> bool {
        self.0.at.get().is_some()
    }

    fn ends_reads(&self) -> bool {
        let waited =
            |at: &Instant| !self.0.has_grace.load(Ordering::Acquire) || at.elapsed() >= GRACE;
        self.0.at.get().is_some_and(waited)
    }
}

impl Channel {
    /// Takes over a connected socket, which becomes non-blocking; for a stream that goes one way
    /// ([`Parameters::one_way`](super::precopy::Parameters::one_way)) also a pipe or a file.
    ///
    /// # Errors
    ///
    /// When it cannot be made non-blocking.
    pub fn new(fd: impl Into<OwnedFd>, progress: Arc<Progress>) -> io::Result<Self> {
        Ok(Self::over(Arc::new(Descriptor::new(fd.into())?), progress))
    }

    /// Over a transport of the caller's own. Guest memory is copied for it, unless it
    /// [has a descriptor](Transport::descriptor).
    pub fn over(transport: Arc<dyn Transport>, progress: Arc<Progress>) -> Self {
        Self {
            transport,
            progress: Some(progress),
            committed: None,
            interrupt: None,
            written: 0,
            counter: None,
            elsewhere: 0,
            read_patience: None,
            write_patience: Patience::new(WRITE_PATIENCE),
        }
    }

    /// Another handle of the same channel. Its reads wait without a bound; its writes are as patient as
    /// those of this handle, and begin with all of that patience.
    pub fn clone_handle(&self) -> Self {
        Self {
            transport: Arc::clone(&self.transport),
            progress: self.progress.clone(),
            committed: self.committed.clone(),
            interrupt: self.interrupt.clone(),
            written: 0,
            counter: None,
            elsewhere: 0,
            read_patience: None,
            write_patience: self.write_patience.unused(),
        }
    }

    /// Another handle of the same channel, which is not cancelled with its migration: reads end only with
    /// the channel, and writes also when patience ends.
    pub fn uncancellable(&self) -> Self {
        Self { progress: None, ..self.clone_handle() }
    }

    /// Another handle of the same channel, which is not cancelled any more once `committed` is true.
    /// Nor are the handles that are cloned from it.
    pub(super) fn cancellable_until(&self, committed: Arc<AtomicBool>) -> Self {
        Self { committed: Some(committed), ..self.clone_handle() }
    }

    /// Another handle of the same channel, whose waits end as cancelled once `interrupt` is raised.
    pub(super) fn interruptible(&self, interrupt: &Interrupt) -> Self {
        Self { interrupt: Some(interrupt.clone()), ..self.clone_handle() }
    }

    /// The same handle, of which `counter` counts what is written, also amid a write.
    pub(super) fn counted_by(self, counter: &Arc<AtomicU64>) -> Self {
        Self { counter: Some(Arc::clone(counter)), ..self }
    }

    /// The same handle, whose waits no interrupt ends.
    pub(super) fn without_interrupt(self) -> Self {
        Self { interrupt: None, ..self }
    }

    /// The descriptor beneath, where there is one that holds the very bytes of the stream.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.transport.descriptor()
    }

    /// Whether what is written can neither be read nor changed on its way.
    pub fn is_encrypted(&self) -> bool {
        self.transport.is_encrypted()
    }

    /// Calls `write` until it has no more to wait for.
    fn until_written<T>(
        &mut self,
        mut write: impl FnMut(&dyn Transport) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            match write(&*self.transport) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait_writable()?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return done.map_err(|error| self.explain(error)),
            }
        }
    }

    /// Why a write failed, where a peer that wants TLS has said so before it closed.
    fn explain(&self, error: io::Error) -> io::Error {
        match self.transport.descriptor() {
            Some(descriptor) if is_broken(&error) && speaks_tls(descriptor) => {
                io::Error::other(FormatError::Tls)
            }
            _ => error,
        }
    }

    fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.until_written(|transport| transport.write(bytes))? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                written => {
                    self.wrote(written as u64);
                    bytes = &bytes[written..];
                }
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.until_written(|transport| transport.flush())
    }

    fn is_cancelled(&self) -> bool {
        let committed = self.committed.as_ref().is_some_and(|it| it.load(Ordering::Acquire));
        !committed && self.progress.as_ref().is_some_and(|progress| progress.is_cancelled())
    }

    /// Lets a read wait for at most so long.
    pub fn set_read_patience(&mut self, patience: Option<Duration>) {
        self.read_patience = patience;
    }

    /// Bounds how long writes of this handle, and of handles that are cloned from it later, wait for the
    /// other side to read; 5 minutes unless set. Waiting uses patience up, and each 64 KiB that the
    /// other side takes give a second of it back. So one that reads nothing ends a write after
    /// `patience`, one that reads slower than that ends it later, and no write of `n` bytes waits for
    /// longer than `patience` and a second for each 64 KiB. The error is of the kind `TimedOut`;
    /// an unknown part is written then, and the channel is of no use any more.
    pub fn set_write_patience(&mut self, patience: Duration) {
        self.write_patience = Patience::new(patience);
    }

    /// Ends the channel for both sides, and all handles of it.
    pub fn shutdown(&self) {
        self.transport.shutdown();
    }

    /// Ends this side's direction of a socket; what the other side still says can be read.
    pub fn shutdown_write(&self) {
        self.transport.shutdown_write();
    }

    /// Whether the other side has closed the channel, or ended its direction of it. What it had
    /// written before may still be to be read.
    pub fn is_hung_up(&self) -> bool {
        self.transport.is_hung_up()
    }

    /// Whether there is something to read within `most`: bytes, the end of the stream, or an error.
    pub fn is_readable(&self, most: Duration) -> bool {
        self.transport.wait(Ready::Read, most).unwrap_or(true)
    }

    /// Whether a short message can be written at once, or fails at once.
    pub(crate) fn is_writable(&self) -> bool {
        self.transport.wait(Ready::Write, Duration::ZERO).unwrap_or(true)
    }

    fn is_interrupted(&self) -> bool {
        self.interrupt.as_ref().is_some_and(Interrupt::is_raised)
    }

    fn ends_reads(&self) -> bool {
        self.interrupt.as_ref().is_some_and(Interrupt::ends_reads)
    }

    /// Waits for something to read, or an interrupt.
    fn wait_readable(&self, deadline: Option<Instant>) -> io::Result<()> {
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Err(Errno::TIMEDOUT.into());
            }
            if self.wait(Ready::Read, left.unwrap_or(POLL))? || self.ends_reads() {
                return Ok(());
            }
        }
    }

    /// Waits for a moment; whether it is ready.
    fn wait(&self, ready: Ready, most: Duration) -> io::Result<bool> {
        if self.is_cancelled() || (ready == Ready::Write && self.is_interrupted()) {
            return Err(Errno::CANCELED.into());
        }
        match self.transport.wait(ready, most.min(POLL)) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            waited => waited,
        }
    }
}

/// Whether the peer has closed the connection.
pub(crate) fn is_broken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

impl WritePolicy for Channel {
    fn wrote(&mut self, bytes: u64) {
        self.written += bytes;
        if let Some(counter) = &self.counter {
            counter.fetch_add(bytes, Ordering::Relaxed);
        }
        self.write_patience.wrote(bytes);
    }

    /// For a moment, after which it is tried again: a socket is called writable only when a good part of
    /// its buffer is free, which says nothing of a peer that reads slowly.
    fn wait_writable(&mut self) -> io::Result<()> {
        let left = self.write_patience.left();
        if left.is_zero() {
            return Err(self.write_patience.ended());
        }
        let begin = Instant::now();
        let waited = self.wait(Ready::Write, left).map(drop);
        self.write_patience.waited(begin.elapsed());
        waited
    }

    fn check(&self) -> io::Result<()> {
        if self.is_cancelled() { Err(Errno::CANCELED.into()) } else { Ok(()) }
    }
}

impl Read for Channel {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let deadline = self.read_patience.map(deadline);
        loop {
            // What had come by then is read first: on the main channel, the way back by which a failure is told.
            let interrupted = self.ends_reads();
            match self.transport.read(&mut *buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if interrupted {
                        return Err(Errno::CANCELED.into());
                    }
                    self.wait_readable(deadline)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    }
}

impl Sink for Channel {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)?;
        self.flush()
    }

    fn write_gathered(&mut self, gathered: &mut GatherWrite) -> io::Result<()> {
        let transport = Arc::clone(&self.transport);
        match transport.descriptor() {
            Some(descriptor) => {
                let written = gathered.write_to(descriptor, self);
                written.map_err(|error| self.explain(error))?;
            }
            None => {
                gathered.copy_out(COPY, &mut |bytes| {
                    self.check()?;
                    self.write_all(bytes)
                })?;
                self.flush()?;
            }
        }
        gathered.clear();
        Ok(())
    }

    fn written(&self) -> u64 {
        self.written + self.elsewhere
    }

    fn count_elsewhere(&mut self, bytes: u64) {
        self.elsewhere += bytes;
    }

    fn write_patience(&self) -> Option<Duration> {
        Some(self.write_patience.limit())
    }
}

#[cfg(test)]
mod tests;
