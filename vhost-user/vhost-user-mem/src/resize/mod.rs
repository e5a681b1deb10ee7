//! How the guest is doing with the requested size, and why it stands still.
//!
//! - `seen`: what was seen of front-end, driver and requests, each with its time.
//! - `verdict`: what follows from that: a function of what was seen, the device, and the time.
//! - `reason`: what to say of it.
//! - [`ResizeWatch`] has it noted as it happens, and tells of each change.
//!
//! ```text
//!                 requested size set
//!        done  -------------------------> waiting ---- 10 s without progress ----+
//!         ^                                  |                                   v
//!         |   as much plugged as requested   | plugged size nearer            stalled: a reason
//!         +--------- progressing <-----------+----- it gets nearer again ---- (changes of it are
//!                        |                                                     told, too)
//!                        +------- 10 s without progress, BUSY, ERROR, ... -------^
//! ```
//!
//! What can be known at once (no front-end, frozen, BUSY, ERROR, ...) is told at once.

mod reason;
mod seen;
#[cfg(test)]
mod tests;
mod verdict;

use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use management_api::{Event, Resize, ResizeState};
use parking_lot::{Condvar, Mutex};
use tokio::sync::broadcast;
use virtio_mem::controller::{Busy, FreezeHolder, MemController};
use virtio_mem::device::{Request, Response};

use crate::confinement;

pub use reason::Reason;
pub use seen::Seen;
pub use verdict::{Device, QUIET, Verdict, judge};

/// How long a verdict has to hold before it is told: connecting is made of several.
const SETTLE: Duration = Duration::from_millis(200);

/// One moment, by the clock that measures and by the one that people read.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// For what is measured.
    pub instant: Instant,
    /// Since 1970.
    pub unix: Duration,
}

impl Now {
    /// This moment.
    pub fn read() -> Self {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { instant: Instant::now(), unix }
    }

    /// The time of day at an earlier moment.
    pub fn at(&self, earlier: Instant) -> String {
        let ago = self.instant.saturating_duration_since(earlier);
        management_api::rfc3339(self.unix.saturating_sub(ago))
    }
}

/// Notes what is seen of a device, and tells when a resize moves, is done, or stands still.
pub struct ResizeWatch {
    noted: Mutex<Noted>,
    changed: Condvar,
}

struct Noted {
    seen: Seen,
    wakes: Wakes,
    /// Something was noted since the thread looked.
    fresh: bool,
    ended: bool,
}

/// What wakes the thread. A guest makes a hundred thousand requests a second.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wakes {
    /// Nothing but the end: it will look by itself soon.
    Nothing,
    /// What is not more progress, which was told.
    AllButProgress,
    Anything,
}

impl Noted {
    fn fresh(&mut self, changed: &Condvar) {
        self.fresh = true;
        if self.wakes != Wakes::Nothing {
            changed.notify_all();
        }
    }
}

impl ResizeWatch {
    /// Nothing was seen yet. `plugged_size` and `requested_size` are those of the device.
    pub fn new(plugged_size: u64, requested_size: u64) -> Arc<Self> {
        let seen = Seen::new(plugged_size, requested_size, Instant::now());
        let noted = Noted { seen, wakes: Wakes::Anything, fresh: false, ended: false };
        Arc::new(Self { noted: Mutex::new(noted), changed: Condvar::new() })
    }

    /// A front-end came or went.
    pub fn connected(&self, connected: bool) {
        self.note(|seen, now| seen.connected(connected, now));
    }

    /// What the driver has accepted, and whether its queue is served.
    pub fn driver(&self, features: u64, runs: bool) {
        self.note(|seen, now| seen.driver(features, runs, now));
    }

    /// The front-end's memory has changed.
    pub fn memory(&self) {
        self.note(|_, _| ());
    }

    /// The requested size was set.
    pub fn requested_size(&self, size: u64) {
        self.note(|seen, now| seen.requested_size(size, now));
    }

    /// Blocks were plugged or unplugged.
    pub fn plugged_size(&self, size: u64) {
        let mut noted = self.noted.lock();
        noted.seen.plugged_size(size, Instant::now());
        if noted.wakes != Wakes::AllButProgress || size == noted.seen.requested_size {
            noted.fresh(&self.changed);
        }
    }

    /// Block state is frozen, or no longer.
    pub fn frozen(&self, frozen: bool) {
        self.note(|seen, now| seen.frozen(frozen, now));
    }

    /// A holder has frozen block state, or ended that.
    pub fn frozen_by(&self, holder: FreezeHolder, active: bool) {
        self.note(|seen, _| seen.frozen_by(holder, active));
    }

    /// Why the request that is answered next is BUSY.
    pub fn busy(&self, reason: &Busy) {
        self.note(|seen, _| seen.busy(reason));
    }

    /// A request was answered at `at`.
    pub fn answered(&self, request: Request, response: Response, at: Instant) {
        if matches!(request, Request::State(_) | Request::Unsupported(_)) {
            return;
        }
        let mut noted = self.noted.lock();
        if noted.seen.answered(request, response, at) || noted.wakes == Wakes::Anything {
            noted.fresh(&self.changed);
        }
    }

    /// Whether the guest's queue is served.
    pub fn runs(&self) -> bool {
        self.noted.lock().seen.runs
    }

    /// How the guest is doing.
    pub fn report(&self, device: &Device) -> Resize {
        verdict::report(&self.noted.lock().seen, device, Now::read())
    }

    fn note(&self, note: impl FnOnce(&mut Seen, Instant)) {
        let mut noted = self.noted.lock();
        note(&mut noted.seen, Instant::now());
        noted.fresh(&self.changed);
    }

    /// Tells readers of `events`, and the log, of each change from now on, until the device is gone.
    ///
    /// # Errors
    ///
    /// When there is no thread to be had.
    pub fn tell(
        self: &Arc<Self>,
        controller: &Arc<MemController>,
        events: broadcast::Sender<Event>,
    ) -> std::io::Result<()> {
        let (watch, controller) = (Arc::clone(self), Arc::downgrade(controller));
        thread::Builder::new()
            .name(confinement::RESIZE.into())
            .spawn(move || {
                sandbox::confine_thread(confinement::RESIZE);
                follow(&watch, &controller, &events);
            })
            .map(drop)
    }

    /// Ends the thread that tells.
    pub fn end(&self) {
        self.noted.lock().ended = true;
        self.changed.notify_all();
    }
}

/// Looks whenever something was noted or time alone changes the verdict.
fn follow(
    watch: &ResizeWatch,
    controller: &Weak<MemController>,
    events: &broadcast::Sender<Event>,
) {
    let mut told: Option<Verdict> = None;
    loop {
        // Not kept alive by being watched.
        let Some(device) = controller.upgrade().map(|controller| Device::of(&controller)) else {
            return;
        };
        let mut noted = watch.noted.lock();
        noted.fresh = false;
        let now = Now::read();
        let (verdict, next) = judge(&noted.seen, &device, now.instant);
        if told.as_ref().is_none_or(|told| !told.is_as(&verdict)) {
            let resize = verdict::report(&noted.seen, &device, now);
            drop(noted);
            log(&resize, told.is_none());
            // Without a reader there is nothing to tell.
            let _ = events.send(Event::Resize(Box::new(resize)));
            told = Some(verdict);
            noted = watch.noted.lock();
        }
        let deadline = next.map(|next| now.instant + next);
        let progressing = told.as_ref().is_some_and(|told| told.state == ResizeState::Progressing);
        noted.wakes = if progressing { Wakes::AllButProgress } else { Wakes::Anything };
        while !noted.fresh && !noted.ended {
            match deadline {
                None => watch.changed.wait(&mut noted),
                Some(deadline) => {
                    if watch.changed.wait_until(&mut noted, deadline).timed_out() {
                        break;
                    }
                }
            }
        }
        noted.wakes = Wakes::Nothing;
        let settled = Instant::now() + SETTLE;
        while !noted.ended && !watch.changed.wait_until(&mut noted, settled).timed_out() {}
        if noted.ended {
            return;
        }
    }
}

fn log(resize: &Resize, first: bool) {
    let remaining = resize.remaining_size;
    match (resize.state, &resize.reason) {
        (ResizeState::Done, _) if first => {}
        (ResizeState::Done, _) => tracing::info!("resize: done"),
        (ResizeState::Stalled, Some(reason)) => {
            tracing::info!(remaining, "resize: stands still: {}", reason.text);
        }
        (state, _) => tracing::info!(remaining, ?state, "resize"),
    }
}
