//! Has the daemon at the destination follow what is known of the device from which the guest comes.
//!
//! It is a listener of the [`Shadow`](super::Shadow): what the shadow becomes, by the state that comes first or by
//! changes while memory comes, the daemon is told over the discard channel before it counts. So a listener of the
//! daemon that refuses, in whatever process, refuses the change, and the source answers BUSY to its guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::ensure;
use migration::MigrationError;
use ram_discard::{ListenerId, MemoryState, RamDiscardListener, RamDiscardManager, Section};
use virtio_mem::controller::MemController;
use virtio_mem::discard_channel::RemoteRamDiscardManager;

use super::device_error;

/// What follows the shadow until the daemon has its own state.
pub(super) struct DaemonFollower {
    daemon: Arc<RemoteRamDiscardManager>,
    listener: ListenerId,
    /// The daemon has its own state: it is followed now.
    ended: Arc<AtomicBool>,
}

impl DaemonFollower {
    /// Has `daemon`, whatever an earlier guest has left there, follow `shadow` from now on. `None` of a daemon that
    /// cannot.
    pub(super) fn begin(
        daemon: Arc<RemoteRamDiscardManager>,
        shadow: &MemController,
    ) -> anyhow::Result<Option<Self>> {
        let Some(region) = shadow.geometry().section() else { return Ok(None) };
        if !daemon.follows_source() {
            return Ok(None);
        }
        let (here, there) = (shadow.geometry(), daemon.geometry());
        ensure!(here == there, "the daemon's discard channel is of another device: {there:?}");
        let mut left = Vec::new();
        let _ = daemon.replay_populated(region, &mut |section| {
            left.push(section);
            std::ops::ControlFlow::Continue(())
        })?;
        daemon.follow_source_all(&left, MemoryState::Discarded)?;
        let ended = Arc::new(AtomicBool::new(false));
        let follower = Follower { daemon: Arc::clone(&daemon), ended: Arc::clone(&ended) };
        let listener = shadow.listen(Box::new(follower))?;
        Ok(Some(Self { daemon, listener, ended }))
    }

    /// Whether the daemon has the blocks of `shadow`, with all that came of them.
    pub(super) fn check(&self, shadow: &MemController) -> Result<(), MigrationError> {
        let words = self.daemon.words();
        let words = words.map_err(|lost| device_error(&format!("the daemon is lost: {lost}")))?;
        if words == shadow.blocks().words() {
            return Ok(());
        }
        Err(device_error(
            "the daemon's blocks were changed while memory came, as by a system reset: what came of them is lost",
        ))
    }

    /// The daemon has its own state, and is told of no change any more. Its manager.
    pub(super) fn end(&self) -> &Arc<RemoteRamDiscardManager> {
        self.ended.store(true, Ordering::Release);
        &self.daemon
    }

    /// No guest has come: the daemon has nothing plugged again.
    pub(super) fn undo(self, shadow: &MemController) {
        // Also when it was loaded already.
        self.ended.store(false, Ordering::Release);
        if let Err(error) = shadow.manager().unregister(self.listener) {
            eprintln!("small-vmm: {error}");
        }
    }
}

struct Follower {
    daemon: Arc<RemoteRamDiscardManager>,
    ended: Arc<AtomicBool>,
}

impl RamDiscardListener for Follower {
    fn name(&self) -> &str {
        "daemon"
    }

    fn notify_populate(&mut self, section: Section) -> Result<(), String> {
        self.notify_populate_all(&[section]).map_err(|(_, reason)| reason)
    }

    fn notify_discard(&mut self, section: Section) {
        self.notify_discard_all(&[section]);
    }

    fn notify_populate_all(&mut self, sections: &[Section]) -> Result<(), (Section, String)> {
        let Some(&first) = sections.first() else { return Ok(()) };
        if self.ended.load(Ordering::Acquire) {
            return Ok(());
        }
        let followed = self.daemon.follow_source_all(sections, MemoryState::Populated);
        followed.map_err(|refused| (first, refused.to_string()))
    }

    fn notify_discard_all(&mut self, sections: &[Section]) {
        if self.ended.load(Ordering::Acquire) {
            return;
        }
        // Found out by `check` at the latest.
        if let Err(error) = self.daemon.follow_source_all(sections, MemoryState::Discarded) {
            eprintln!("small-vmm: the daemon does not follow: {error}");
        }
    }
}
