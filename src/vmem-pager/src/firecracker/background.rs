//! The threads of a restore: one serves faults, others place what no vCPU has asked for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use migration::TokenBucket;
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::{AsFd, OwnedFd};

use super::figures::{Figures, Source};
use super::fill::{CHUNK, Filling, SMALL_CHUNK, Step, Uffd, Unplaced, Waiting};
use super::order::Order;
use super::vmm::Vmm;
use crate::error::PagerError;
use crate::run::{POLL, Run};

/// Between two tries when nothing could be placed.
const PAUSE: Duration = Duration::from_millis(1);
/// Threads of an eager restore, at most.
const EAGER_THREADS: usize = 8;
/// While the order of faults is recorded, the background begins once there was none for so long, ...
const QUIET: Duration = Duration::from_millis(500);
/// ... or after this.
const RECORDED: Duration = Duration::from_secs(10);

/// What the threads have in common.
pub(super) struct Background<'a, U> {
    pub filling: &'a Filling<U>,
    pub order: &'a Mutex<Order>,
    pub figures: &'a Arc<Figures>,
    /// Bytes a second of the background.
    pub rate: Option<u64>,
    pub eager: bool,
    pub recording: bool,
}

/// How the threads tell each other of their end.
struct Ends {
    over: AtomicBool,
    failed: Mutex<Option<Unplaced>>,
    wake: OwnedFd,
}

impl<U: Uffd + AsFd> Background<'_, U> {
    /// Fills the guest of `vmm`, until all is with it.
    ///
    /// # Errors
    ///
    /// See [`Unplaced`].
    pub fn fill(&self, vmm: &Vmm, run: &Run) -> Result<(), Unplaced> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = eventfd(0, flags).map_err(|errno| PagerError::System {
            action: "have an eventfd",
            source: errno.into(),
        })?;
        let ends = Ends { over: AtomicBool::new(false), failed: Mutex::new(None), wake };
        self.filling.begin()?;
        let threads = match self.eager {
            true => thread::available_parallelism().map_or(1, usize::from).min(EAGER_THREADS),
            false => 1,
        };
        let pace = Mutex::new(Pace::new(self.rate));
        thread::scope(|scope| {
            for _ in 0..threads {
                let work = || {
                    if let Err(error) = self.place(&pace, &ends) {
                        ends.failed.lock().get_or_insert(error);
                    }
                    let _ = rustix::io::write(&ends.wake, &1u64.to_le_bytes());
                };
                let thread = thread::Builder::new().name("background".to_owned());
                if let Err(source) = thread.spawn_scoped(scope, work) {
                    let error = PagerError::System { action: "start a thread", source };
                    ends.failed.lock().get_or_insert(error.into());
                }
            }
            let served = self.serve(vmm, run, &ends);
            ends.over.store(true, Ordering::Relaxed);
            served
        })
    }

    /// Serves faults until all memory is with the VMM.
    fn serve(&self, vmm: &Vmm, run: &Run, ends: &Ends) -> Result<(), Unplaced> {
        let (mut waiting, mut buffer) = (Waiting::default(), Vec::new());
        let (end, end_flags) = vmm.end();
        let mut has_ended = false;
        loop {
            self.filling.take_events(&mut waiting)?;
            let busy = self.filling.serve(&mut waiting, &mut buffer)?;
            let complete = self.filling.guest().outstanding_bytes() == 0;
            if complete && waiting.is_empty() && self.filling.is_complete()? {
                return Ok(());
            }
            if let Some(error) = ends.failed.lock().take() {
                return Err(error);
            }
            if has_ended {
                return Err(Unplaced::Ended);
            }
            run.check("the VMM has not got all of its memory")?;
            // What cannot be placed waits for a message, or for the VMM to do what the last one said.
            let wait = if busy || complete { PAUSE } else { POLL };
            let wait = Timespec { tv_sec: 0, tv_nsec: wait.subsec_nanos().into() };
            let mut fds = [
                PollFd::new(self.filling, PollFlags::IN),
                PollFd::new(&end, end_flags),
                PollFd::new(&ends.wake, PollFlags::IN),
            ];
            // With an error none of them is ready.
            let _ = poll(&mut fds, Some(&wait));
            has_ended = fds[1].revents().intersects(end_flags);
            if !fds[2].revents().is_empty() {
                let _ = rustix::io::read(&ends.wake, &mut [0; 8]);
            }
        }
    }

    /// Places what comes next until nothing is left.
    fn place(&self, pace: &Mutex<Pace>, ends: &Ends) -> Result<(), Unplaced> {
        let (mut buffer, begun) = (Vec::new(), Instant::now());
        // What is placed at once is not more than may be in a tenth of a second.
        let chunk = if self.eager { CHUNK } else { SMALL_CHUNK };
        let most = self.rate.map_or(chunk, |rate| chunk.min(rate / 10));
        let (mut seen, mut quiet_since) = (self.figures.faults.get(), begun);
        // What comes first waits for its time, too: a pager that dies again and again would exceed its rate.
        let first = self.rate.map_or(Duration::ZERO, |rate| {
            let page = self.filling.guest().region(0).page_size;
            Duration::from_secs_f64(most.max(page) as f64 / rate as f64)
        });
        while !ends.over.load(Ordering::Relaxed) {
            let now = Instant::now();
            if self.recording && !self.eager && now - begun < RECORDED {
                let faults = self.figures.faults.get();
                if faults != seen {
                    (seen, quiet_since) = (faults, now);
                }
                if now - quiet_since < QUIET && self.filling.guest().outstanding_bytes() != 0 {
                    thread::sleep(POLL);
                    continue;
                }
            }
            let sent = self.figures.bytes(Source::Replay) + self.figures.bytes(Source::Background);
            let pause = pace.lock().pause(now, sent).max(first.saturating_sub(now - begun));
            if !pause.is_zero() {
                if self.filling.guest().outstanding_bytes() == 0 {
                    return Ok(());
                }
                thread::sleep(pause.min(POLL));
                continue;
            }
            if self.filling.is_urgent() {
                thread::yield_now();
            }
            match self.filling.step(self.order, &mut buffer, most)? {
                Step::Placed => {}
                Step::Nothing if self.filling.guest().outstanding_bytes() == 0 => return Ok(()),
                // What is left is being placed elsewhere.
                Step::Busy | Step::Nothing => thread::sleep(PAUSE),
            }
        }
        Ok(())
    }
}

/// Spreads what the background places over time.
struct Pace {
    /// None without a limit.
    bucket: Option<TokenBucket>,
    /// What was placed when it was last asked.
    placed: u64,
}

impl Pace {
    fn new(rate: Option<u64>) -> Self {
        let bucket = rate.and_then(|rate| TokenBucket::new(Instant::now(), rate));
        Self { bucket, placed: 0 }
    }

    /// How long to wait at `now`, with `placed` bytes placed in all.
    fn pause(&mut self, now: Instant, placed: u64) -> Duration {
        let Some(bucket) = &mut self.bucket else { return Duration::ZERO };
        bucket.charge(placed - std::mem::replace(&mut self.placed, placed));
        bucket.budget(now);
        bucket.pause()
    }
}
