//! What was seen of front-end, driver and requests.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use virtio_mem::controller::{Busy, FreezeHolder};
use virtio_mem::device::{BlockSpan, Request, Response};

use super::reason::Reason;

/// Time between two samples of the plugged size, at least.
const SAMPLE_EVERY: Duration = Duration::from_millis(250);

/// How far back the rate looks.
pub(super) const RATE_OVER: Duration = Duration::from_secs(10);

/// What was seen, each with its time. Takes no time by itself, and holds a bounded amount.
#[derive(Clone, Debug)]
pub struct Seen {
    pub(super) connected: bool,
    /// Of this connection: what the driver accepted, when it has.
    pub(super) features: Option<u64>,
    pub(super) runs: bool,
    /// The queue has run in this connection.
    pub(super) has_run: bool,
    /// When the guest was last free to begin: it was asked, its queue started, or a freeze ended.
    pub(super) free_since: Instant,
    /// When the requested size was set.
    pub(super) asked_at: Instant,
    pub(super) frozen: bool,
    pub(super) holders: BTreeSet<FreezeHolder>,
    pub(super) requested_size: u64,
    pub(super) plugged_size: u64,
    /// What was plugged when this size was asked for.
    pub(super) from: u64,
    /// Smallest distance to the requested size since it was asked for.
    nearest: u64,
    /// When it became that.
    pub(super) progress_at: Option<Instant>,
    pub(super) last: Option<Answered>,
    /// Why the request that is being answered, or was answered last, is BUSY.
    busy: Option<Reason>,
    /// The last PLUG that was done.
    plugged: Option<BlockSpan>,
    /// The guest has unplugged what it plugged last while it was to grow.
    pub(super) undone: bool,
    samples: VecDeque<(Instant, u64)>,
}

/// A request that was answered.
#[derive(Clone, Debug)]
pub struct Answered {
    pub(super) request: Request,
    pub(super) response: Response,
    pub(super) at: Instant,
    /// Why it was BUSY.
    pub(super) busy: Option<Reason>,
}

impl Seen {
    /// Nothing but the device itself.
    pub fn new(plugged_size: u64, requested_size: u64, now: Instant) -> Self {
        Self {
            connected: false,
            features: None,
            runs: false,
            has_run: false,
            free_since: now,
            asked_at: now,
            frozen: false,
            holders: BTreeSet::new(),
            requested_size,
            plugged_size,
            from: plugged_size,
            nearest: plugged_size.abs_diff(requested_size),
            progress_at: None,
            last: None,
            busy: None,
            plugged: None,
            undone: false,
            samples: VecDeque::new(),
        }
    }

    /// A front-end came or went.
    pub fn connected(&mut self, connected: bool, now: Instant) {
        self.connected = connected;
        (self.features, self.runs, self.has_run) = (None, false, false);
        self.free_since = now;
    }

    /// SET_FEATURES, a reset (no features), or a queue that starts or stops.
    pub fn driver(&mut self, features: u64, runs: bool, now: Instant) {
        self.features = (features != 0).then_some(features);
        if runs && !self.runs {
            self.free_since = now;
        }
        self.runs = runs;
        self.has_run |= runs;
    }

    /// The requested size was set, perhaps to what it was.
    pub fn requested_size(&mut self, size: u64, now: Instant) {
        self.requested_size = size;
        (self.asked_at, self.free_since) = (now, now);
        self.begin();
    }

    fn begin(&mut self) {
        self.from = self.plugged_size;
        self.nearest = self.plugged_size.abs_diff(self.requested_size);
        (self.progress_at, self.undone) = (None, false);
        self.samples.clear();
    }

    /// Blocks were plugged or unplugged.
    pub fn plugged_size(&mut self, size: u64, now: Instant) {
        self.plugged_size = size;
        let distance = size.abs_diff(self.requested_size);
        if distance < self.nearest {
            self.nearest = distance;
            self.progress_at = Some(now);
            self.undone = false;
        }
        let due = |&(at, _): &(Instant, u64)| now.saturating_duration_since(at) >= SAMPLE_EVERY;
        if self.samples.back().is_none_or(due) {
            self.samples.push_back((now, size));
        }
        while self.samples.len() > 2 && now.saturating_duration_since(self.samples[0].0) > RATE_OVER
        {
            self.samples.pop_front();
        }
    }

    /// Block state is frozen, or no longer.
    pub fn frozen(&mut self, frozen: bool, now: Instant) {
        if self.frozen && !frozen {
            self.free_since = now;
        }
        self.frozen = frozen;
    }

    /// A holder has frozen block state, or ended that.
    pub fn frozen_by(&mut self, holder: FreezeHolder, active: bool) {
        if active {
            self.holders.insert(holder);
        } else {
            self.holders.remove(&holder);
        }
    }

    /// Why the request that is answered next is BUSY.
    pub fn busy(&mut self, reason: &Busy) {
        self.busy = Reason::of_busy(reason);
    }

    /// A request to plug or unplug was answered. Whether that may tell something new, even while
    /// there is progress.
    pub fn answered(&mut self, request: Request, response: Response, now: Instant) -> bool {
        let busy = self.busy.take().filter(|_| response == Response::Busy);
        let done = response == Response::Ack;
        match request {
            Request::Plug(span) if done => self.plugged = Some(span),
            Request::Unplug(span) if done => {
                // Where the last step of a resize would be unplugged again, it was none.
                let growing = self.requested_size > self.plugged_size;
                self.undone |= growing && self.plugged == Some(span);
                self.plugged = None;
            }
            Request::UnplugAll if done => {
                // The driver begins anew, with nothing.
                self.begin();
                self.free_since = now;
                self.plugged = None;
            }
            _ => {}
        }
        let same = self.last.as_ref().is_some_and(|last| last.response == response);
        self.last = Some(Answered { request, response, at: now, busy });
        !same || self.undone || !done
    }

    /// Bytes a second towards the requested size, of the samples that are not too old.
    pub(super) fn rate(&self, now: Instant) -> Option<u64> {
        let recent =
            |&&(at, _): &&(Instant, u64)| now.saturating_duration_since(at) <= RATE_OVER + QUANTUM;
        let (first_at, first) = *self.samples.iter().find(recent)?;
        let distance = |size: u64| size.abs_diff(self.requested_size);
        let covered = distance(first).checked_sub(distance(self.plugged_size))?;
        let millis = now.saturating_duration_since(first_at).as_millis().max(1);
        let rate = u128::from(covered) * 1000 / millis;
        u64::try_from(rate).ok().filter(|rate| *rate != 0)
    }
}

/// Samples are as old as the time between two of them.
const QUANTUM: Duration = SAMPLE_EVERY;
