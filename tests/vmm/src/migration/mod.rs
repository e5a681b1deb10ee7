//! The VMM's part of a migration: which memory is tracked how, which devices there are, and whom
//! the guest is handed to.
//!
//! - [`transport`]: where a guest goes to or comes from.
//! - `blocks`: RAM blocks and the trackers of those who write them.
//! - `devices`: sections of state; the daemon's own is fetched and delivered by vhost-user.
//! - `source`, `destination`: the two ends.
//! - [`Migration`]: one of them in a thread, and what is to be seen of it.

mod blocks;
mod destination;
mod devices;
mod report;
mod source;
pub mod transport;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use serde::{Deserialize, Serialize};
use virtio_mem::migration::progress::Progress;
use virtio_mem::migration::stream::Configuration;

use crate::machine::Machine;
pub use report::{MigrationReport, RamReport};

/// Differs when one side knows of discarded memory and the other does not.
const CAPABILITY_IGNORE_DISCARDS: &str = "x-ignore-discards";

/// What a migration is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrateOptions {
    /// Where to: `unix:PATH` or `tcp:HOST:PORT`.
    pub to: String,
    /// Bytes a second at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bandwidth: Option<u64>,
    /// How long the guest may stand still, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_limit: Option<u64>,
    /// Whether discarded memory and holes are left out. Without, the whole region is read and
    /// sent, as by a VMM that has no RamDiscardManager.
    #[serde(default = "yes")]
    pub discard_aware: bool,
}

fn yes() -> bool {
    true
}

/// A migration that was begun, in either direction.
#[derive(Debug)]
pub struct Migration {
    progress: Arc<Progress>,
    outcome: Arc<Mutex<Option<Result<(), String>>>>,
    listening: Option<String>,
}

impl Migration {
    /// Begins to send the guest away.
    pub fn outgoing(machine: &Arc<Machine>, options: MigrateOptions) -> anyhow::Result<Self> {
        let machine = machine.clone();
        Self::begin(None, move |progress| source::send(&machine, &options, progress))
    }

    /// Listens, and takes the guest that comes.
    pub fn incoming(
        machine: &Arc<Machine>,
        from: &str,
        discard_aware: bool,
    ) -> anyhow::Result<Self> {
        let listener = transport::Listener::bind(from)?;
        let machine = machine.clone();
        let listening = Some(listener.address().to_owned());
        Self::begin(listening, move |progress| {
            destination::receive(&machine, &listener, discard_aware, progress)
        })
    }

    /// Writes the guest to a file. It stands still meanwhile, and goes on here.
    pub fn snapshot(machine: &Arc<Machine>, file: &Path) -> anyhow::Result<Self> {
        let (machine, file) = (machine.clone(), file.to_owned());
        Self::begin(None, move |progress| source::snapshot(&machine, &file, progress))
    }

    /// Reads the guest from a file.
    pub fn restore(machine: &Arc<Machine>, file: &Path) -> anyhow::Result<Self> {
        let (machine, file) = (machine.clone(), file.to_owned());
        Self::begin(None, move |progress| destination::restore(&machine, &file, progress))
    }

    fn begin(
        listening: Option<String>,
        work: impl FnOnce(Arc<Progress>) -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let progress = Arc::new(Progress::new());
        let outcome = Arc::new(Mutex::new(None));
        let (seen, done) = (progress.clone(), outcome.clone());
        thread::Builder::new().name("migration".to_owned()).spawn(move || {
            let result = work(seen).map_err(|error| describe(&error));
            if let Err(error) = &result {
                eprintln!("small-vmm: migration: {error}");
            }
            *lock(&done) = Some(result);
        })?;
        Ok(Self { progress, outcome, listening })
    }

    /// Where it listens, for one that comes in.
    pub fn listening(&self) -> Option<&str> {
        self.listening.as_deref()
    }

    /// Has it end as soon as it can.
    pub fn cancel(&self) {
        self.progress.cancel();
    }

    /// Whether it has ended in any way.
    pub fn is_over(&self) -> bool {
        lock(&self.outcome).is_some()
    }

    /// What is to be seen of it.
    pub fn report(&self) -> MigrationReport {
        let outcome = lock(&self.outcome).clone();
        MigrationReport::new(&self.progress.snapshot(), outcome)
    }
}

/// An error with its causes. Many say their cause themselves, which is not repeated.
fn describe(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What both sides must have alike.
fn configuration(discard_aware: bool) -> Configuration {
    let mut configuration = Configuration::new("small-vmm");
    if !discard_aware {
        configuration.capabilities.push(CAPABILITY_IGNORE_DISCARDS.to_owned());
    }
    configuration
}
