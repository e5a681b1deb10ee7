//! Waiting for the guest to do what it was asked for.

use std::time::Duration;

use management_api::{DeviceInfo, Event};

use super::progress::{Progress, Way};
use super::{Client, Console, Failure};

/// Between tries while events do not come.
const POLL: Duration = Duration::from_millis(200);

/// Waits until as much is plugged as `target`. A daemon that goes is waited for as long.
pub(super) async fn wait(
    client: &Client,
    device: DeviceInfo,
    target: u64,
    timeout: Option<Duration>,
    console: &mut Console<'_>,
) -> Result<DeviceInfo, Failure> {
    let way = Way { from: device.plugged_size, to: target };
    let progress = Progress::new(console, way);
    let mut wait = Wait { client, way, console, progress, device, reachable: true };
    let Some(timeout) = timeout else { return wait.run().await };
    match tokio::time::timeout(timeout, wait.run()).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Failure::TimedOut {
            waited: timeout,
            plugged_size: wait.device.plugged_size,
            requested_size: target,
            obstacle: wait.obstacle(),
        }),
    }
}

struct Wait<'a, 'b> {
    client: &'a Client,
    way: Way,
    console: &'a mut Console<'b>,
    progress: Progress,
    /// As last heard of.
    device: DeviceInfo,
    reachable: bool,
}

impl Wait<'_, '_> {
    /// Follows the events; when they break off, asks the daemon until they can be followed again.
    async fn run(&mut self) -> Result<DeviceInfo, Failure> {
        loop {
            if self.judge()? {
                return Ok(self.device.clone());
            }
            if let Ok(mut events) = self.client.events().await {
                while let Ok(Some(event)) = events.next().await {
                    self.heard();
                    self.take(event);
                    // Events tell one thing at a time, so what they suggest is asked for.
                    if self.settled() && self.ask().await && self.judge()? {
                        return Ok(self.device.clone());
                    }
                }
            }
            tokio::time::sleep(POLL).await;
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
        }
        self.progress.show(self.console, self.way, self.device.plugged_size);
    }

    async fn ask(&mut self) -> bool {
        let Ok(device) = self.client.device().await else { return false };
        self.heard();
        self.device = device;
        self.progress.show(self.console, self.way, self.device.plugged_size);
        true
    }

    fn heard(&mut self) {
        if !self.reachable {
            self.reachable = true;
            self.progress.note(self.console, "the daemon is back");
        }
    }

    fn settled(&self) -> bool {
        self.device.requested_size != self.way.to || self.device.plugged_size == self.way.to
    }

    /// Whether the guest is done.
    fn judge(&self) -> Result<bool, Failure> {
        let DeviceInfo { requested_size, plugged_size, .. } = self.device;
        if requested_size != self.way.to {
            return Err(Failure::Superseded { wanted: self.way.to, requested_size, plugged_size });
        }
        Ok(plugged_size == self.way.to)
    }

    fn obstacle(&self) -> Option<&'static str> {
        if !self.reachable {
            Some("; the daemon cannot be reached")
        } else if !self.device.connected {
            Some("; no front-end is connected")
        } else if self.device.migration_active {
            Some("; migration is active")
        } else {
            None
        }
    }
}
