//! A guest that is saved, restored or handed over, with the small VMM's Cloud Hypervisors at the other ends.

use std::cell::Cell;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::process::Pid;
use small_vmm::cloud_hypervisor::receiver::{self, Receive};
use small_vmm::cloud_hypervisor::{Command, Guest, source};
use tempfile::TempDir;

use crate::cli::report::Report;
use crate::cloud_hypervisor::channel::Peer;
use crate::cloud_hypervisor::handover::{Process, Receiver, Source, hand_over};
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

/// What stands for the process of a Cloud Hypervisor, and can be ended.
pub struct StandIn(Child);

impl StandIn {
    pub fn new() -> Self {
        Self(Program::new("sleep").arg("600").spawn().unwrap())
    }

    pub fn process(&self) -> Process {
        Process::new(Pid::from_child(&self.0)).unwrap()
    }

    /// The signal that has ended it, if it has ended.
    pub fn ended_by(&mut self) -> Option<i32> {
        self.0.try_wait().unwrap().and_then(|status| status.signal())
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The Cloud Hypervisors of a handover.
pub struct Parties<'a> {
    /// What the source does.
    pub steps: &'a [source::Step],
    pub trap: source::Trap,
    /// What stands for its process.
    pub source: Option<&'a Process>,
    /// The receiver, and those that follow it.
    pub receivers: &'a [Receive],
    /// What stands for the process of the first.
    pub receiver: Option<Process>,
}

/// Hands `guest` over.
pub fn handed_over(
    guest: &Guest,
    parties: Parties<'_>,
    run: &Arc<Run>,
) -> (Result<(), PagerError>, source::Outcome, Vec<receiver::Outcome>) {
    let Parties { steps, trap, source, receivers, receiver } = parties;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let connect = || Peer::new(UnixStream::connect(&path).unwrap().into()).unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    let left = Cell::new(receivers.len() - 1);
    let another = || match left.get() {
        0 => Err(PagerError::Peer("there is no other receiver".to_owned())),
        some => {
            left.set(some - 1);
            Ok(Receiver { to: connect(), process: None })
        }
    };
    thread::scope(|scope| {
        let receiver = Receiver { to: connect(), process: receiver };
        let sending = scope.spawn(move || source::perform(far, guest, steps, trap));
        let receiving =
            scope.spawn(|| receivers.iter().map(|how| how.take(&listener)).collect::<Vec<_>>());
        let from = Peer::new(near.into()).unwrap();
        let source = Source { from: &from, process: source };
        let done = hand_over(&source, receiver, &another, &[], run, &Report::silent());
        drop(from);
        // Those that were not needed get nothing.
        (0..left.get()).for_each(|_| drop(connect()));
        (done, sending.join().unwrap(), receiving.join().unwrap())
    })
}

/// Hands over the guest of a source that sends all as it should, but for `trap`.
pub fn handed_over_with(
    guest: &Guest,
    trap: source::Trap,
    how: &Receive,
    receiver: Option<Process>,
    run: &Arc<Run>,
) -> (Result<(), PagerError>, source::Outcome, receiver::Outcome) {
    let steps = source::steps(guest.mappings.len(), trap);
    let parties = Parties {
        steps: &steps,
        trap,
        source: None,
        receivers: std::slice::from_ref(how),
        receiver,
    };
    let (done, sent, mut received) = handed_over(guest, parties, run);
    (done, sent, received.remove(0))
}
