//! The log: lines on stderr, for which no thread of the daemon ever waits.
//!
//! - [`program::log`] has the queue, how lines look, and how many of a kind are told.
//! - [`set_level`]: what is logged, from now on.
//! - `limit`: which kinds there are among events of `tracing`.

mod level;
mod limit;

use std::io::{self, IsTerminal};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

pub use program::log::Format;
use program::log::{Form, Limit, Queue, Stderr, is_journal};
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, fmt, registry, reload};

use crate::confinement;
pub use level::{LevelError, set_level};

/// What is logged unless RUST_LOG says otherwise.
const DEFAULT_LEVEL: &str = "info";

/// How long the end of the daemon waits for lines that were not written yet.
const FLUSH: Duration = Duration::from_millis(300);

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
    let form = Form { json, colours, journal: is_journal(), command: None };
    let confine = || sandbox::confine_thread(confinement::LOG);
    let queue = Arc::new(Queue::new(Stderr, Arc::clone(&limit), form, confine));
    queue.start()?;
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
    program::log::say(&line);
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
