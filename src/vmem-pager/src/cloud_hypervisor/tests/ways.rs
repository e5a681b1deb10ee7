//! A guest that is saved, restored or handed over, with the small VMM's Cloud Hypervisors at the other ends.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use small_vmm::cloud_hypervisor::receiver::{self, Receive};
use small_vmm::cloud_hypervisor::{Command, Guest, source};
use tempfile::TempDir;

use crate::cli::report::Report;
use crate::cloud_hypervisor::channel::Peer;
use crate::cloud_hypervisor::handover::{Process, hand_over};
use crate::cloud_hypervisor::image::SavedGuest;
use crate::cloud_hypervisor::metrics::RestoreMetrics;
use crate::cloud_hypervisor::restore::{Plan, restore};
use crate::cloud_hypervisor::save::save;
use crate::error::PagerError;
use crate::image::writer::NewFile;
use crate::run::Run;
use crate::socket::Address;
use crate::working_set::WorkingSet;

/// Every command that a source sends of its own.
pub const COMMANDS: [Command; 5] = Command::ORDER;

/// A run that takes peers for gone after a short while.
pub fn quick() -> Arc<Run> {
    Run::with_silence(None, Duration::from_millis(150))
}

/// Has `guest` saved to `path` by a source with `trap`.
pub fn saved(
    guest: &Guest,
    trap: source::Trap,
    path: &Path,
    ack_early: bool,
    run: &Arc<Run>,
) -> (Result<(), PagerError>, source::Outcome) {
    let (near, far) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let sending = scope.spawn(move || source::send(far, guest, trap));
        let peer = Peer::new(near.into()).unwrap();
        let file = NewFile::create(path).unwrap();
        let saved = save(&peer, file, ack_early, run, &Report::silent());
        drop(peer);
        (saved, sending.join().unwrap())
    })
}

/// A guest in an image, which can be restored.
pub struct Saved {
    pub dir: TempDir,
    pub image: SavedGuest,
}

/// How it is restored.
pub struct Options<'a> {
    pub eager: bool,
    pub config: Option<&'a [u8]>,
    pub bandwidth: Option<u64>,
    pub replay: WorkingSet,
    pub record: Option<&'a Path>,
    pub report: Report,
}

impl Options<'_> {
    pub fn new(eager: bool) -> Self {
        Self {
            eager,
            config: None,
            bandwidth: None,
            replay: WorkingSet::default(),
            record: None,
            report: Report::silent(),
        }
    }
}

pub struct Restored {
    pub done: Result<(), PagerError>,
    pub outcome: receiver::Outcome,
    pub metrics: RestoreMetrics,
}

impl Restored {
    /// The guest, which was restored.
    pub fn taken(self) -> receiver::Taken {
        self.done.unwrap();
        match self.outcome {
            receiver::Outcome::Has(taken) => taken,
            other => panic!("{other:?}"),
        }
    }

    pub fn error(&self) -> String {
        self.done.as_ref().unwrap_err().to_string()
    }
}

impl Saved {
    pub fn of(guest: &Guest) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        saved(guest, source::Trap::None, &image, false, &Run::new(None)).0.unwrap();
        let image = SavedGuest::open(&image).unwrap();
        Self { dir, image }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Restores it to a receiver.
    pub fn restored(&self, options: &Options<'_>, how: &Receive, run: &Arc<Run>) -> Restored {
        let path = self.path("socket");
        // Cloud Hypervisor leaves the file of its socket behind.
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let address = Address::Unix(path);
        let metrics = RestoreMetrics::new();
        let plan = Plan {
            guest: &self.image,
            config: options.config.unwrap_or_else(|| self.image.config()),
            eager: options.eager,
            bandwidth: options.bandwidth,
            replay: &options.replay,
            record: options.record,
            address: &address,
        };
        thread::scope(|scope| {
            let receiving = scope.spawn(move || how.take(&listener));
            let done = restore(plan, run, &options.report, &metrics);
            Restored { done, outcome: receiving.join().unwrap(), metrics }
        })
    }
}

/// Saves `guest` and restores it.
pub fn restored(guest: &Guest, eager: bool, how: &Receive, run: &Arc<Run>) -> Restored {
    Saved::of(guest).restored(&Options::new(eager), how, run)
}

/// Hands `guest` over.
pub fn handed_over(
    guest: &Guest,
    source: (&[source::Step], source::Trap),
    how: &Receive,
    receiver: Option<&Process>,
    run: &Arc<Run>,
) -> (Result<(), PagerError>, source::Outcome, receiver::Outcome) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let to = Peer::new(UnixStream::connect(&path).unwrap().into()).unwrap();
        let receiving = scope.spawn(move || how.take(&listener));
        let sending = scope.spawn(move || source::perform(far, guest, source.0, source.1));
        let from = Peer::new(near.into()).unwrap();
        let done = hand_over(&from, &to, receiver, &[], run, &Report::silent());
        drop((from, to));
        (done, sending.join().unwrap(), receiving.join().unwrap())
    })
}

/// Hands over the guest of a source that sends all as it should, but for `trap`.
pub fn handed_over_with(
    guest: &Guest,
    trap: source::Trap,
    how: &Receive,
    receiver: Option<&Process>,
    run: &Arc<Run>,
) -> (Result<(), PagerError>, source::Outcome, receiver::Outcome) {
    let steps = source::steps(guest.mappings.len(), trap);
    handed_over(guest, (&steps, trap), how, receiver, run)
}
