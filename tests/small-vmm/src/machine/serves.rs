//! Has a daemon serve the guest while its memory arrives: the engine follows this process's copy of the device, and the
//! copy follows the daemon, also one that was started again.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, ensure};
use ram_discard::{
    FollowedBlockState, FreezeFor, LocalRamDiscardManager, MemoryState, RamDiscardListener,
    RamDiscardManager, Section,
};
use virtio_mem::discard_channel::RemoteRamDiscardManager;

/// How the daemon serves the guest while memory arrives. Where it is not followed, the guest gets BUSY until all has arrived.
#[derive(Default)]
pub(super) struct Serves {
    // Ends before the connection does.
    followed: Option<FollowedBlockState>,
    daemon: Option<Arc<RemoteRamDiscardManager>>,
    /// Changes only as the daemon that is followed does.
    copy: Option<Arc<LocalRamDiscardManager>>,
    /// The guest runs: what it has was handed over.
    runs: bool,
    /// Why it is not followed; of each follower its own.
    reason: Reason,
}

type Reason = Arc<Mutex<Option<String>>>;

impl Serves {
    /// Once the guest runs, `copy` is to do what `daemon` does.
    pub(super) fn when_running(
        daemon: Arc<RemoteRamDiscardManager>,
        copy: Arc<LocalRamDiscardManager>,
    ) -> Self {
        Self { daemon: Some(daemon), copy: Some(copy), ..Self::default() }
    }

    /// The guest is about to run, and the engine follows the copy.
    pub(super) fn begin(&mut self) {
        self.runs = true;
        self.follow();
    }

    /// Follows a daemon that was started again, and has memory that arrives as the one before. No guest request was
    /// served between the two.
    pub(super) fn continue_with(
        &mut self,
        attach: impl FnOnce() -> anyhow::Result<Arc<RemoteRamDiscardManager>>,
    ) {
        if self.copy.is_none() {
            return;
        }
        (self.followed, self.daemon) = (None, None);
        match attach() {
            Ok(daemon) => {
                self.daemon = Some(daemon);
                if self.runs {
                    self.follow();
                }
            }
            Err(error) => self.give_up(&error),
        }
    }

    /// Why the guest's blocks stay until its memory has arrived.
    pub(super) fn reason(&self) -> Option<String> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn follow(&mut self) {
        let Some((daemon, copy)) = self.daemon.as_ref().zip(self.copy.as_ref()) else { return };
        self.reason = Reason::default();
        match follow(daemon, copy, &self.reason) {
            Ok(followed) => self.followed = Some(followed),
            Err(error) => self.give_up(&error),
        }
    }

    fn give_up(&mut self, error: &anyhow::Error) {
        self.reason = Reason::default();
        stay(&self.reason, &format!("{error:#}"));
    }
}

fn stay(reason: &Reason, why: &str) {
    eprintln!("small-vmm: the guest's blocks stay until its memory has arrived: {why}");
    *reason.lock().unwrap_or_else(PoisonError::into_inner) = Some(why.to_owned());
}

/// Has `copy` do what `daemon` does from now on.
///
/// The engine places what arrives by the copy. So one that has other blocks than the daemon is not followed: a block
/// that came or went unseen would get pages that are not its own.
fn follow(
    daemon: &Arc<RemoteRamDiscardManager>,
    copy: &Arc<LocalRamDiscardManager>,
    reason: &Reason,
) -> anyhow::Result<FollowedBlockState> {
    let frozen = daemon.freeze(FreezeFor::Destination)?;
    let (here, there) = (populated(&**copy)?, populated(&**daemon)?);
    ensure!(
        here == there,
        "the daemon has other blocks than its guest: {}, and not {}",
        show(&there),
        show(&here)
    );
    let follower = DeviceCopy { copy: Arc::clone(copy), reason: Arc::clone(reason) };
    frozen.follow(Box::new(follower)).context("follow the daemon")
}

fn populated(manager: &dyn RamDiscardManager) -> anyhow::Result<Vec<Section>> {
    let mut ranges = Vec::new();
    if let Some(region) = Section::new(0, manager.region_size()) {
        let _ = manager.replay_populated(region, &mut |range| {
            ranges.push(range);
            ControlFlow::Continue(())
        })?;
    }
    Ok(ranges)
}

fn show(ranges: &[Section]) -> String {
    let bytes: u64 = ranges.iter().map(|range| range.len()).sum();
    format!("{bytes:#x} bytes in {} ranges", ranges.len())
}

/// Has a copy of the device do what the daemon does.
struct DeviceCopy {
    copy: Arc<LocalRamDiscardManager>,
    reason: Reason,
}

impl RamDiscardListener for DeviceCopy {
    fn name(&self) -> &str {
        "memory that arrives"
    }

    fn notify_populate(&mut self, section: Section) -> Result<(), String> {
        self.copy.follow_source(section, MemoryState::Populated).map_err(|error| error.to_string())
    }

    fn notify_discard(&mut self, section: Section) {
        if let Err(error) = self.copy.follow_source(section, MemoryState::Discarded) {
            eprintln!("small-vmm: {section} is discarded, and its pages still arrive: {error}");
        }
    }

    /// The daemon populates nothing any more until all memory has arrived, or it is followed again.
    fn notify_lost(&mut self, reason: &str) {
        stay(&self.reason, reason);
    }
}
