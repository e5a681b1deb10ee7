//! The VMM's part of a migration: which memory is tracked how, which devices there are, and whom
//! the guest is handed to.
//!
//! - [`transport`]: where a guest goes to or comes from.
//! - `blocks`: RAM blocks and the trackers of those who write them.
//! - `devices`: sections of state; the daemon's own is fetched and delivered by vhost-user.
//! - `source`, `destination`: the two ends.
//! - `recovery`: the channels of postcopy, and new ones when they break.
//! - [`Migration`]: one of them in a thread, and what is to be seen of it.

mod blocks;
mod destination;
mod devices;
mod recovery;
mod report;
mod source;
pub mod transport;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use migration::stream::{CAPABILITY_MULTIFD, CAPABILITY_MULTIFD_ZSTD, Configuration};
use migration::{ParameterChange, Progress};
use serde::{Deserialize, Serialize};

use crate::machine::Machine;
pub(crate) use blocks::id_at;
pub use report::{FaultReport, MigrationReport, RamReport};
pub(crate) use source::attach;

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
    /// Whether block state may change until the guest is stopped, where the destination follows. Without, it is frozen
    /// from the beginning, and the daemon logs what it writes. It takes `discard_aware`.
    #[serde(default = "yes")]
    pub elastic: bool,
    /// Whether memory may follow the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postcopy: Option<PostcopyOptions>,
    /// What it goes over.
    #[serde(default)]
    pub links: Links,
}

/// What a migration goes over; the same on both sides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Links {
    /// Channels for the pages of precopy, 1 to 64; 0 to have them on the main one.
    #[serde(default)]
    pub channels: usize,
    /// Folder with the certificates of TLS, under QEMU's names. Without, all goes in the clear.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<PathBuf>,
    /// Level of zstd, 1 to 20, with which pages are compressed on their channels; to a destination it says only
    /// that they are. Without, they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zstd: Option<u8>,
}

/// How a guest goes before its memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PostcopyOptions {
    /// When it goes.
    #[serde(default)]
    pub when: When,
    /// Where to when the channel breaks, until it works or the migration is cancelled. Without,
    /// the guest is lost then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recover: Option<String>,
}

/// When a guest goes before its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// When it is told to.
    #[default]
    Told,
    /// Before any of it.
    AtOnce,
    /// When written pages were collected so many times.
    Rounds(u64),
}

fn yes() -> bool {
    true
}

/// What a guest that comes is expected to do.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    /// Whether discarded memory is left out.
    pub discard_aware: bool,
    /// Whether it may come before its memory. The source then makes a second connection, for the
    /// pages that the guest waits for.
    pub postcopy: bool,
    /// What it comes over.
    pub links: Links,
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
        expected: Expected,
    ) -> anyhow::Result<Self> {
        let listener = transport::Listener::bind(from)?;
        let machine = machine.clone();
        let listening = Some(listener.address().to_owned());
        Self::begin(listening, move |progress| {
            destination::receive(&machine, &listener, expected, &progress)
        })
    }

    /// Writes the guest to a file, as it is now. It goes on here; in the `background` it stands
    /// still only for a moment, otherwise until all is written.
    pub fn snapshot(machine: &Arc<Machine>, file: &Path, background: bool) -> anyhow::Result<Self> {
        let (machine, file) = (machine.clone(), file.to_owned());
        Self::begin(None, move |progress| source::snapshot(&machine, &file, background, progress))
    }

    /// Reads the guest from a file; a `lazy` one runs at once, and its memory follows.
    pub fn restore(machine: &Arc<Machine>, file: &Path, lazy: bool) -> anyhow::Result<Self> {
        let (machine, file) = (machine.clone(), file.to_owned());
        Self::begin(None, move |progress| match lazy {
            true => destination::restore_lazily(&machine, &file, progress),
            false => destination::restore(&machine, &file, progress),
        })
    }

    /// Has the guest go before its memory, if that was provided for.
    pub fn start_postcopy(&self) {
        self.progress.start_postcopy();
    }

    /// Has it send no more than so many bytes a second from now on; 0 for no limit.
    pub fn set_bandwidth(&self, max: u64) -> anyhow::Result<()> {
        let change = ParameterChange { max_bandwidth: Some(max), ..ParameterChange::default() };
        Ok(self.progress.set_parameters(change)?)
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
        MigrationReport::new(&self.progress.snapshot(), self.progress.faults(), outcome)
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
fn configuration(discard_aware: bool, links: &Links) -> Configuration {
    let mut configuration = Configuration::new("small-vmm");
    if links.channels != 0 {
        configuration.capabilities.push(CAPABILITY_MULTIFD.to_owned());
        configuration.uuid = Some(*b"small-vmm, guest");
    }
    if links.zstd.is_some() {
        configuration.capabilities.push(CAPABILITY_MULTIFD_ZSTD.to_owned());
    }
    if !discard_aware {
        configuration.capabilities.push(CAPABILITY_IGNORE_DISCARDS.to_owned());
    }
    configuration
}
