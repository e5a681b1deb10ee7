//! Having the guest do what it is asked for: all at once, or in steps.
//!
//! Steps are this client's affair: the device only ever knows the size that it is to have now. A client
//! that ends in the middle leaves the guest with one that lies on the way.

use std::time::Duration;

use management_api::{DeviceInfo, Event, ResizeState};
use tokio::time::{Instant, sleep, sleep_until};

use super::failure::Obstacle;
use super::progress::{Progress, Way};
use super::{Client, Console, Failure, status};

/// Between tries while events do not come.
const POLL: Duration = Duration::from_millis(200);

/// Between two looks at the pace.
const LOOK: Duration = Duration::from_secs(1);

/// A resize.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    /// What is to be plugged in the end, bytes.
    pub(super) target: u64,
    /// For how long to wait for all of it.
    pub(super) timeout: Option<Duration>,
    /// Bytes to ask for at a time.
    pub(super) step: Option<u64>,
    /// Bytes a second.
    pub(super) max_rate: Option<u64>,
}

impl Plan {
    /// What to ask a guest for that has `plugged`.
    fn next(&self, plugged: u64, block_size: u64) -> u64 {
        let Some(step) = self.step.or(self.max_rate) else { return self.target };
        let block_size = block_size.max(1);
        let step = (step / block_size * block_size).max(block_size);
        if plugged < self.target {
            plugged.saturating_add(step).min(self.target)
        } else {
            plugged.saturating_sub(step).max(self.target)
        }
    }

    /// How long a guest must take at least to go this far.
    fn pause(&self, distance: u64) -> Duration {
        let millis = |rate| u128::from(distance) * 1000 / u128::from(rate);
        let pause = self.max_rate.map(millis).and_then(|millis| u64::try_from(millis).ok());
        Duration::from_millis(pause.unwrap_or(0))
    }
}

/// Asks, and waits until as much is plugged as the plan says. A daemon that goes is waited for as long.
pub(super) async fn run(
    client: &Client,
    plan: Plan,
    console: &mut Console<'_>,
) -> Result<DeviceInfo, Failure> {
    let device = match plan.step.or(plan.max_rate) {
        None => client.resize(plan.target).await?,
        // The first step has to know where the guest is.
        Some(_) => client.device().await?,
    };
    let way = Way { from: device.plugged_size, to: plan.target };
    let progress = Progress::new(console, way);
    let asked = plan.target;
    let mut wait =
        Wait { client, plan, asked, way, console, progress, device, reachable: true, noted: None };
    let Some(timeout) = plan.timeout else { return wait.all_steps().await };
    match tokio::time::timeout(timeout, wait.all_steps()).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Failure::TimedOut {
            waited: timeout,
            plugged_size: wait.device.plugged_size,
            requested_size: plan.target,
            left_at: (wait.asked != plan.target).then_some(wait.asked),
            obstacle: wait.obstacle(),
        }),
    }
}

struct Wait<'a, 'b> {
    client: &'a Client,
    plan: Plan,
    /// What the guest is asked for now.
    asked: u64,
    way: Way,
    console: &'a mut Console<'b>,
    progress: Progress,
    /// As last heard of.
    device: DeviceInfo,
    reachable: bool,
    /// The last note on what is in the way.
    noted: Option<String>,
}

impl Wait<'_, '_> {
    async fn all_steps(&mut self) -> Result<DeviceInfo, Failure> {
        if self.plan.step.or(self.plan.max_rate).is_none() {
            return self.one_step().await;
        }
        loop {
            let (started, from) = (Instant::now(), self.device.plugged_size);
            let asked = self.plan.next(from, self.device.block_size);
            self.device = self.client.resize(asked).await?;
            self.asked = asked;
            let device = self.one_step().await?;
            if asked == self.plan.target {
                return Ok(device);
            }
            sleep_until(started + self.plan.pause(asked.abs_diff(from))).await;
        }
    }

    /// Follows the events; when they break off, asks the daemon until they can be followed again.
    async fn one_step(&mut self) -> Result<DeviceInfo, Failure> {
        loop {
            if self.judge()? {
                return Ok(self.device.clone());
            }
            if let Ok(mut events) = self.client.events().await {
                let mut look = tokio::time::interval(LOOK);
                look.tick().await;
                loop {
                    let event = tokio::select! {
                        event = events.next() => Some(event),
                        _ = look.tick() => None,
                    };
                    match event {
                        Some(Ok(Some(event))) => {
                            self.heard();
                            self.take(event);
                        }
                        Some(_) => break,
                        // The pace is in no event.
                        None if !self.ask().await => break,
                        None => {}
                    }
                    // Events tell one thing at a time, so what they suggest is asked for.
                    if self.settled() && self.ask().await && self.judge()? {
                        return Ok(self.device.clone());
                    }
                }
            }
            sleep(POLL).await;
            if !self.ask().await && self.reachable {
                self.reachable = false;
                self.progress.note(self.console, "the daemon cannot be reached; waiting for it");
            }
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::RequestedSize(size) => self.device.requested_size = size,
            Event::PluggedSize(size) => self.device.plugged_size = size,
            Event::Migration(active) => self.device.migration_active = active,
            Event::Connected => self.device.connected = true,
            Event::Disconnected => self.device.connected = false,
            Event::Resize(resize) => self.device.resize = Some(*resize),
            Event::Stray(_) => {}
        }
        self.show();
    }

    async fn ask(&mut self) -> bool {
        let Ok(device) = self.client.device().await else { return false };
        self.heard();
        self.device = device;
        self.show();
        true
    }

    fn show(&mut self) {
        let resize = self.device.resize.as_ref();
        let stalled = resize.filter(|resize| resize.state == ResizeState::Stalled);
        if let Some(stalled) = stalled {
            let note = status::resize(stalled);
            if self.noted.as_ref() != Some(&note) {
                self.progress.note(self.console, &note);
                self.noted = Some(note);
            }
            return;
        }
        self.noted = None;
        let pace = resize.map(status::pace).unwrap_or_default();
        self.progress.show(self.console, self.way, self.device.plugged_size, &pace);
    }

    fn heard(&mut self) {
        if !self.reachable {
            self.reachable = true;
            self.progress.note(self.console, "the daemon is back");
        }
    }

    fn settled(&self) -> bool {
        self.device.requested_size != self.asked || self.device.plugged_size == self.asked
    }

    /// Whether the guest is done.
    fn judge(&self) -> Result<bool, Failure> {
        let DeviceInfo { requested_size, plugged_size, .. } = self.device;
        if requested_size != self.asked {
            return Err(Failure::Superseded { wanted: self.asked, requested_size, plugged_size });
        }
        Ok(plugged_size == self.asked)
    }

    fn obstacle(&self) -> Option<Obstacle> {
        if !self.reachable {
            return Some(Obstacle::Seen("the daemon cannot be reached"));
        }
        match &self.device.resize {
            Some(resize) if resize.state != ResizeState::Done => {
                Some(Obstacle::Told(Box::new(resize.clone())))
            }
            _ if !self.device.connected => Some(Obstacle::Seen("no front-end is connected")),
            _ if self.device.migration_active => Some(Obstacle::Seen("migration is active")),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: Plan = Plan { target: 100, timeout: None, step: None, max_rate: None };

    #[test]
    fn steps_are_whole_blocks_on_the_way_and_the_last_one_is_the_target() {
        let plan = Plan { step: Some(25), ..PLAN };
        assert_eq!(plan.next(0, 10), 20);
        assert_eq!(plan.next(90, 10), 100);
        assert_eq!(plan.next(100, 10), 100);
        assert_eq!(plan.next(150, 10), 130);
        assert_eq!(plan.next(110, 10), 100);
        assert_eq!(Plan { step: Some(5), ..PLAN }.next(0, 10), 10, "no less than a block");
        assert_eq!(Plan { step: Some(u64::MAX), ..PLAN }.next(0, 10), 100);
        assert_eq!(PLAN.next(0, 10), 100);
    }

    #[test]
    fn a_rate_alone_makes_steps_of_a_second_and_holds_for_larger_ones() {
        let plan = Plan { max_rate: Some(30), ..PLAN };
        assert_eq!((plan.next(0, 10), plan.pause(30)), (30, Duration::from_secs(1)));
        let plan = Plan { step: Some(60), ..plan };
        assert_eq!((plan.next(0, 10), plan.pause(60)), (60, Duration::from_secs(2)));
        // A block takes longer than a second.
        let plan = Plan { max_rate: Some(2), ..PLAN };
        assert_eq!((plan.next(0, 10), plan.pause(10)), (10, Duration::from_secs(5)));
        assert_eq!(PLAN.pause(100), Duration::ZERO);
    }
}
