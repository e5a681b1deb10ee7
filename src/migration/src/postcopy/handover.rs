//! Who has the guest, while one thread starts it on the destination and another takes its memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Condvar, Mutex};

use super::Channels;
use super::return_channel::ReturnChannel;
use crate::channel::Channel;
use crate::error::MigrationError;
use crate::progress::{Progress, Status};
use crate::stream::ReturnMessage;

/// What the two threads agree on.
pub(crate) struct Handover {
    state: Mutex<State>,
    changed: Condvar,
    /// Whether the channels can no longer be cancelled.
    committed: Arc<AtomicBool>,
}

struct State {
    owner: Owner,
    /// Whether the source has said RUN.
    run: bool,
    /// The channels that are read, to be shut down when it is given up.
    channels: Option<Channels>,
    /// Nothing more is read from them.
    all_came: bool,
}

/// Who has the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// The source, which gets it back on any failure.
    Source,
    /// This side; it cannot go back.
    Here,
    /// Given up on this side before it was taken: it stays at the source.
    Left,
    /// Given up on this side after it was taken.
    Lost,
}

impl State {
    /// Memory arrives at a guest that is here: from now on that can be paused, if it has not all arrived.
    fn active(&self, progress: &Progress) {
        let channels = self.channels.as_ref().filter(|_| !self.all_came);
        progress.steering.postcopy_over(channels.map(Channels::clone_handles));
        progress.set_status(Status::PostcopyActive);
    }
}

impl Handover {
    /// The source has the guest; `committed` is of the channels.
    pub(crate) fn new(committed: Arc<AtomicBool>) -> Self {
        let state = State { owner: Owner::Source, run: false, channels: None, all_came: false };
        Self { state: Mutex::new(state), changed: Condvar::new(), committed }
    }

    /// A handle of a channel that can be cancelled until the guest is taken.
    pub(super) fn cancellable(&self, channel: &Channel) -> Channel {
        channel.cancellable_until(Arc::clone(&self.committed))
    }

    /// These channels are read from now on; false when it was given up.
    pub(super) fn read_from(&self, channels: &Channels) -> bool {
        let mut state = self.state.lock();
        state.channels = Some(channels.clone_handles());
        state.all_came = false;
        matches!(state.owner, Owner::Source | Owner::Here)
    }

    /// The source lets the guest run here; false when it has said so before.
    pub(crate) fn run_came(&self) -> bool {
        let first = !std::mem::replace(&mut self.state.lock().run, true);
        self.changed.notify_all();
        first
    }

    /// Whether the source has said so.
    pub(super) fn may_run(&self) -> bool {
        self.state.lock().run
    }

    /// Waits until the guest may run; false when it was given up.
    pub(crate) fn wait_for_run(&self) -> bool {
        let mut state = self.state.lock();
        while !state.run && state.owner == Owner::Source {
            self.changed.wait(&mut state);
        }
        state.owner == Owner::Source
    }

    /// Takes the guest. False when it was given up before.
    ///
    /// # Errors
    ///
    /// When the source could not be told: it has the guest then.
    pub(crate) fn claim(
        &self,
        back: &ReturnChannel,
        progress: &Progress,
    ) -> Result<bool, MigrationError> {
        // Held meanwhile, so that the other thread takes a channel that breaks now for one that
        // broke before or after, and the guest for the source's or ours accordingly.
        let mut state = self.state.lock();
        if state.owner != Owner::Source {
            return Ok(false);
        }
        back.claim(&ReturnMessage::SwitchoverAck)?;
        state.owner = Owner::Here;
        state.active(progress);
        self.committed.store(true, Ordering::Release);
        drop(state);
        self.changed.notify_all();
        Ok(true)
    }

    /// Waits until the guest is taken; false when it was given up.
    pub(super) fn wait_for_claim(&self) -> bool {
        let mut state = self.state.lock();
        while state.owner == Owner::Source {
            self.changed.wait(&mut state);
        }
        state.owner == Owner::Here
    }

    /// The channel broke. Whether to wait for another, since the guest is here; else it is given up.
    pub(super) fn broken(&self) -> bool {
        let mut state = self.state.lock();
        if state.owner == Owner::Source {
            state.owner = Owner::Left;
        }
        let here = state.owner == Owner::Here;
        drop(state);
        self.changed.notify_all();
        here
    }

    /// Memory arrives again, over new channels.
    pub(super) fn resumed(&self, progress: &Progress) {
        self.state.lock().active(progress);
    }

    /// Everything has arrived. Whether it was paused before it had: the source was not told then.
    pub(super) fn all_came(&self, progress: &Progress) -> bool {
        let mut state = self.state.lock();
        state.all_came = true;
        progress.steering.postcopy_over(None);
        progress.steering.take_paused()
    }

    /// Whether it was not given up.
    pub(crate) fn is_open(&self) -> bool {
        matches!(self.state.lock().owner, Owner::Source | Owner::Here)
    }

    /// Whether memory that lacks may be waited for: it was not given up, nor cancelled in time.
    pub(super) fn may_wait(&self, progress: &Progress) -> bool {
        match self.state.lock().owner {
            Owner::Source => !progress.is_cancelled(),
            Owner::Here => true,
            Owner::Left | Owner::Lost => false,
        }
    }

    /// Whether the guest was given up after it was taken.
    pub(crate) fn is_lost(&self) -> bool {
        self.state.lock().owner == Owner::Lost
    }

    /// Gives up on this side: ends the channels, so that neither thread waits for the source.
    pub(crate) fn give_up(&self) {
        let mut state = self.state.lock();
        state.owner = match state.owner {
            Owner::Source | Owner::Left => Owner::Left,
            Owner::Here | Owner::Lost => Owner::Lost,
        };
        state.channels.iter().for_each(Channels::shutdown);
        drop(state);
        self.changed.notify_all();
    }
}
