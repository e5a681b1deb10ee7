//! A freeze of a device in another process. It is held as long as it is renewed.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use ram_discard::{
    Follow, FollowError, Freeze, FreezeError, FreezeFor, FreezeLost, RamDiscardListener,
    Unavailable,
};

use super::events::View;
use super::follow::RemoteFollow;
use super::requests::Answer;
use super::{Blocks, Shared};
use crate::discard_channel::wire::{ClientMessage, VERSION_FOLLOW};

/// A freeze is renewed so many times before it would end.
const RENEWALS: u32 = 3;

/// The freezes of a client. For the server, all at a time are one.
#[derive(Default)]
pub(super) struct Freezes {
    /// One begins or ends at a time, or is renewed by the thread for that: the server would refuse to renew
    /// one that ends, and it would count as lost. Taken before any other lock.
    turn: Mutex<()>,
    lease: Mutex<Option<Lease>>,
    /// The lease has ended.
    changed: Condvar,
}

/// What the server has granted.
struct Lease {
    /// Names it here: the server may give a number again that counts as lost here.
    id: u64,
    /// Its number for the server.
    number: u64,
    /// Freezes that have not ended.
    holders: u64,
    expiry: Duration,
    /// When the last renewal that was acknowledged was sent: the server counts from later on.
    renewed: Instant,
    /// The last event before it.
    event: u64,
    /// The count of the bitmap, once it was copied.
    sequence: Option<u64>,
    lost: Option<FreezeLost>,
}

impl Lease {
    /// For how long it is still held.
    fn left(&mut self) -> Result<Duration, FreezeLost> {
        if let Some(lost) = &self.lost {
            return Err(lost.clone());
        }
        let left = self.expiry.saturating_sub(self.renewed.elapsed());
        if left.is_zero() {
            return Err(self.lose(format!("it was not renewed within {:?}", self.expiry)));
        }
        Ok(left)
    }

    /// It is lost from now on, for the first reason that is given.
    fn lose(&mut self, reason: String) -> FreezeLost {
        self.lost.get_or_insert(FreezeLost(reason)).clone()
    }
}

impl Freezes {
    /// Block state may change from now on, since the connection is lost.
    pub(super) fn lose(&self, reason: &str) {
        if let Some(lease) = &mut *self.lease.lock() {
            lease.lose(reason.to_owned());
        }
        self.changed.notify_all();
    }

    /// The server has ended a freeze.
    pub(super) fn ended(&self, number: u64) {
        if let Some(lease) = &mut *self.lease.lock()
            && lease.number == number
        {
            lease.lose("the server ended it, since it was not renewed in time".to_owned());
        }
        self.changed.notify_all();
    }

    /// Does something with a lease that has not ended.
    fn with<T>(
        &self,
        id: u64,
        act: impl FnOnce(&mut Lease) -> Result<T, FreezeLost>,
    ) -> Result<T, FreezeLost> {
        match &mut *self.lease.lock() {
            Some(lease) if lease.id == id => act(lease),
            _ => Err(FreezeLost("it has ended".to_owned())),
        }
    }
}

/// A freeze of this client.
pub(super) struct RemoteFreeze {
    shared: Arc<Shared>,
    purpose: FreezeFor,
    hold: Hold,
}

/// What there is to hold.
enum Hold {
    /// A lease, by its name.
    Lease(u64),
    /// Nothing: for a destination.
    Nothing,
    /// The lease, which has ended, and not as it should.
    Lost(FreezeLost),
}

impl RemoteFreeze {
    pub(super) fn begin(shared: &Arc<Shared>, purpose: FreezeFor) -> Result<Self, FreezeError> {
        shared.requests.check_thread()?;
        shared.requests.check()?;
        let hold = match purpose {
            FreezeFor::Source => Hold::Lease(shared.freeze()?),
            FreezeFor::Destination => Hold::Nothing,
        };
        Ok(Self { shared: Arc::clone(shared), purpose, hold })
    }

    /// All blocks as they are while it is held.
    pub(super) fn map(&self, view: &MutexGuard<'_, View>) -> Result<Blocks, Unavailable> {
        let blocks = self.shared.blocks(view, 0..self.shared.geometry.nr_blocks())?;
        if let Some(lease) = self.lease() {
            self.shared.check_map(lease, &blocks)?;
        }
        Ok(blocks)
    }

    /// Names the lease that it holds.
    fn lease(&self) -> Option<u64> {
        match self.hold {
            Hold::Lease(id) => Some(id),
            Hold::Nothing | Hold::Lost(_) => None,
        }
    }
}

impl Freeze for RemoteFreeze {
    /// Renews it: a server that still has this freeze has had it without a gap.
    fn check(&self) -> Result<(), FreezeLost> {
        match &self.hold {
            Hold::Lease(id) => self.shared.renew(*id),
            Hold::Nothing => {
                self.shared.requests.check().map_err(|lost| FreezeLost(lost.to_string()))
            }
            Hold::Lost(lost) => Err(lost.clone()),
        }
    }

    fn thaw(&mut self) -> Result<(), FreezeLost> {
        let Some(id) = self.lease() else { return self.check() };
        // A listener must not call back. Its freeze ends with the connection then.
        if let Err(error) = self.shared.requests.check_thread() {
            return Err(FreezeLost(self.shared.lose(&error.to_string()).to_string()));
        }
        self.shared.thaw(id)
    }

    fn can_follow(&self) -> bool {
        match self.hold {
            Hold::Lease(_) => true,
            // The server has to be told that it may serve the guest.
            Hold::Nothing => self.shared.version >= VERSION_FOLLOW,
            Hold::Lost(_) => false,
        }
    }

    fn follow(
        &mut self,
        listener: Box<dyn RamDiscardListener>,
    ) -> Result<Box<dyn Follow>, FollowError> {
        if matches!(self.hold, Hold::Nothing) && !self.can_follow() {
            return Err(FollowError::NotPossible);
        }
        // Registered first: it is told of all that the server does once it has thawed.
        let follow = RemoteFollow::register(&self.shared, self, self.purpose, listener)?;
        if let Some(id) = self.lease()
            && let Err(lost) = self.shared.thaw(id)
        {
            self.hold = Hold::Lost(lost.clone());
            return Err(lost.into());
        }
        if matches!(self.hold, Hold::Nothing) {
            self.shared.serve()?;
        }
        Ok(Box::new(follow))
    }
}

impl Shared {
    /// Has the server freeze block state, unless it has; names the lease.
    fn freeze(self: &Arc<Self>) -> Result<u64, FreezeError> {
        let _turn = self.freezes.turn.lock();
        let id = {
            let mut lease = self.freezes.lease.lock();
            if let Some(lease) = lease.as_mut()
                && lease.left().is_ok()
            {
                lease.holders += 1;
                return Ok(lease.id);
            }
            lease.as_ref().map_or(0, |lease| lease.id) + 1
        };
        let renewed = Instant::now();
        let (number, event, expiry) = match self.ask(|id| ClientMessage::Freeze { id })? {
            Answer::Frozen { freeze, event, expiry } => (freeze, event, expiry),
            Answer::Failed(reason) => return Err(FreezeError::Refused(reason)),
            Answer::Done | Answer::Sizes(_) => return Err(self.wrong_answer().into()),
        };
        let (sequence, lost) = (None, None);
        let lease = Lease { id, number, holders: 1, expiry, renewed, event, sequence, lost };
        *self.freezes.lease.lock() = Some(lease);
        let renewer = Arc::clone(self);
        let spawned = thread::Builder::new()
            .name("ram-discard-keep".to_owned())
            .spawn(move || renewer.renew_until_it_ends(id));
        if let Err(error) = spawned {
            let _ = self.end_lease(id);
            return Err(FreezeError::Refused(format!("no thread to renew it: {error}")));
        }
        Ok(id)
    }

    /// Whether a copy of the bitmap is what block state is as long as it is frozen.
    pub(super) fn check_map(&self, id: u64, blocks: &Blocks) -> Result<(), Unavailable> {
        let checked = self.freezes.with(id, |lease| {
            let same = *lease.sequence.get_or_insert(blocks.sequence) == blocks.sequence;
            Ok(same && lease.event == blocks.event)
        });
        match checked {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.lose("the server broke the protocol: frozen blocks changed")),
            Err(lost) => Err(Unavailable(lost.to_string())),
        }
    }

    fn renew(&self, id: u64) -> Result<(), FreezeLost> {
        let (freeze, left) = self.freezes.with(id, |lease| Ok((lease.number, lease.left()?)))?;
        let sent = Instant::now();
        let answer =
            self.ask_within(|id| ClientMessage::Renew { id, freeze }, left.min(self.timeout));
        let renewed = match answer {
            Ok(Answer::Done) => Ok(()),
            Ok(Answer::Failed(reason)) => Err(reason),
            Ok(Answer::Frozen { .. } | Answer::Sizes(_)) => Err(self.wrong_answer().to_string()),
            Err(lost) => Err(lost.to_string()),
        };
        let sequence = self.bitmap.sequence();
        self.freezes.with(id, |lease| {
            if let Err(reason) = renewed {
                return Err(lease.lose(reason));
            }
            // An answer that came too late is none: this process may have stood still.
            lease.left()?;
            if lease.sequence.is_some_and(|before| before != sequence) {
                return Err(lease.lose("blocks changed while it was held".to_owned()));
            }
            lease.renewed = lease.renewed.max(sent);
            Ok(())
        })
    }

    /// Renews a lease often enough, until it has ended.
    fn renew_until_it_ends(&self, id: u64) {
        let is_held = |lease: &&mut Lease| lease.id == id && lease.lost.is_none();
        loop {
            let mut lease = self.freezes.lease.lock();
            loop {
                let Some(held) = lease.as_mut().filter(is_held) else { return };
                let due = held.renewed + held.expiry / RENEWALS;
                if Instant::now() >= due {
                    break;
                }
                let _ = self.freezes.changed.wait_until(&mut lease, due);
            }
            drop(lease);
            let _turn = self.freezes.turn.lock();
            // It may have ended meanwhile.
            if !self.freezes.lease.lock().as_mut().is_some_and(|lease| is_held(&lease)) {
                return;
            }
            if let Err(lost) = self.renew(id) {
                tracing::warn!(%lost, "block state is no longer frozen");
                return;
            }
        }
    }

    /// Has the server serve the guest while its memory arrives.
    fn serve(&self) -> Result<(), FollowError> {
        match self.ask(|id| ClientMessage::Serve { id }) {
            Ok(Answer::Done) => Ok(()),
            Ok(Answer::Failed(reason)) => Err(FollowError::Refused(reason)),
            Ok(Answer::Frozen { .. } | Answer::Sizes(_)) => {
                Err(FreezeLost(self.wrong_answer().to_string()).into())
            }
            Err(lost) => Err(FreezeLost(lost.to_string()).into()),
        }
    }

    fn thaw(&self, id: u64) -> Result<(), FreezeLost> {
        let _turn = self.freezes.turn.lock();
        let others = self.freezes.with(id, |lease| {
            lease.holders -= 1;
            Ok(lease.holders != 0)
        })?;
        if others { self.renew(id) } else { self.end_lease(id) }
    }

    /// Thaws, and says whether it was held until then.
    fn end_lease(&self, id: u64) -> Result<(), FreezeLost> {
        let (freeze, held) = self.freezes.with(id, |lease| Ok((lease.number, lease.left())))?;
        // Also one that counts as lost here: the server may still have it.
        let thawed = match self.ask(|id| ClientMessage::Thaw { id, freeze }) {
            Ok(Answer::Done) => held.map(drop),
            Ok(Answer::Failed(reason)) => held.and(Err(FreezeLost(reason))),
            Ok(Answer::Frozen { .. } | Answer::Sizes(_)) => {
                Err(FreezeLost(self.wrong_answer().to_string()))
            }
            Err(lost) => held.and(Err(FreezeLost(lost.to_string()))),
        };
        // An answer that came too late is none.
        let thawed = self.freezes.with(id, |lease| lease.left().map(drop)).and(thawed);
        self.freezes.lose("it has ended");
        thawed
    }

    pub(super) fn wrong_answer(&self) -> Unavailable {
        self.lose("the server broke the protocol: a wrong answer")
    }
}
