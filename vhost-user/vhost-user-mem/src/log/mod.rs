//! The log: lines on stderr, for which no thread of the daemon ever waits.
//!
//! - `queue`: bounded, to a thread that alone writes to stderr. Lines that do not fit, or that
//!   stderr does not take, are lost, counted, and told once there is room again.
//! - `form`: how lines look, as text or JSON, on a terminal or in the journal.
//! - [`set_level`]: what is logged, from now on.
//! - `limit`: lines of one kind in a row, told one by one at first and then as a count, since guest,
//!   front-end and clients cause many of them.

mod form;
mod level;
mod limit;
mod queue;

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, fmt, registry, reload};

use form::{Form, is_journal};
pub use level::{LevelError, set_level};
use limit::Limit;
use queue::Queue;

/// What is logged unless RUST_LOG says otherwise.
const DEFAULT_LEVEL: &str = "info";

/// How long the end of the daemon waits for lines that were not written yet.
const FLUSH: Duration = Duration::from_millis(300);

/// How long a message about the command line waits for room in stderr.
const SAY: Duration = Duration::from_secs(1);

/// What a pipe takes at once whenever it says that it takes anything (PIPE_BUF).
const AT_ONCE: usize = 4096;

/// What lines are written as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// An object a line: timestamp, level, target, and fields, of which message is one.
    Json,
}

static QUEUE: OnceLock<Arc<Queue>> = OnceLock::new();

/// Starts the log of this process, and has panics told in it.
///
/// # Errors
///
/// When there is no thread to be had.
///
/// # Panics
///
/// When it was started before.
pub fn start(format: Format) -> io::Result<()> {
    let limit = Arc::new(Limit::default());
    let json = format == Format::Json;
    let colours = !json && io::stderr().is_terminal();
    let form = Form { json, colours, journal: is_journal() };
    let queue = Arc::new(Queue::start(Stderr, Arc::clone(&limit), form)?);
    assert!(QUEUE.set(Arc::clone(&queue)).is_ok(), "the log is started once");
    let (filter, wrong) = match EnvFilter::try_from_default_env() {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new(format!("{DEFAULT_LEVEL},{}", level::BASE)), Some(error)),
    };
    // Otherwise an error in formatting would be written to stderr directly, and panic there.
    let lines =
        fmt::layer().log_internal_errors(false).with_ansi(colours).with_writer(Lines(queue));
    let lines = if json { lines.json().boxed() } else { lines.boxed() };
    let (filter, handle) = reload::Layer::new(filter);
    assert!(level::FILTER.set(handle).is_ok(), "the log is started once");
    registry().with(filter).with(limit::Layer(limit)).with(lines).init();
    // Without the variable there is an error, too.
    if let (Some(error), true) = (wrong, std::env::var_os(EnvFilter::DEFAULT_ENV).is_some()) {
        tracing::warn!(%error, "RUST_LOG is not used: it is not a list of filters");
    }
    std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
    Ok(())
}

/// Waits until what was logged is written, but not for long: stderr may take nothing.
pub fn flush() {
    if let Some(queue) = QUEUE.get() {
        queue.flush(FLUSH);
    }
}

/// Lines that were only counted since the start, as there were many of their kind.
pub fn counted() -> u64 {
    QUEUE.get().map_or(0, |queue| queue.counted())
}

/// Lines that were lost since the start.
pub fn lost() -> u64 {
    QUEUE.get().map_or(0, |queue| queue.lost())
}

/// Writes a line about a failure to stderr before the log is started, or after all of it. Errors are
/// ignored, and a pipe that nothing is read from is waited for only so long.
pub fn say(text: &str) {
    let line = match QUEUE.get().map(|queue| queue.form()) {
        Some(form) if form.json => form.notice(Level::ERROR, "vhost_user_mem", text, None),
        Some(form) => form.line(Level::ERROR, text.as_bytes()),
        None => format!("{text}\n").into_bytes(),
    };
    let stderr = io::stderr();
    let deadline = Instant::now() + SAY;
    for part in line.chunks(AT_ONCE) {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or_default();
        let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
        if !matches!(poll(&mut fds, Some(&timeout)), Ok(1..)) || write_all(part).is_err() {
            return;
        }
    }
}

fn write_all(mut bytes: &[u8]) -> io::Result<()> {
    let stderr = io::stderr();
    while !bytes.is_empty() {
        match rustix::io::write(stderr.as_fd(), bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            // Another process that has the same pipe may have set it to not block.
            Err(Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], None);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Writes without the buffer, the lock and the panics of the standard library's.
struct Stderr;

impl io::Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_all(bytes).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Puts what is formatted, a line at a time, into the queue.
struct Lines(Arc<Queue>);

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line { queue: &self.0, level: Level::INFO }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Line<'a> {
        Line { queue: &self.0, level: *metadata.level() }
    }
}

/// A line of this level is put in as a whole.
struct Line<'a> {
    queue: &'a Queue,
    level: Level,
}

impl io::Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.queue.push(self.level, line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
