//! A guest that behaves as Linux does: brings the device to its requested size and reacts to
//! changes.
//!
//! As there: one request at a time; everything is unplugged first when the device comes up with
//! plugged blocks; memory is plugged ascending and unplugged descending, in units of a Linux memory
//! block; NACK means to read the configuration and to try again at once, BUSY to wait for a change
//! or a while, ERROR never to talk to the device again.

mod state;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backend_channel::BackendChannel;
use crate::config::MemConfig;
use crate::driver::{MemDriver, RequestType, Response, ResponseType};
use crate::frontend::Frontend;
use crate::vcpu::Vcpus;
use crate::{connection, split_ring};
pub use state::DriverState;

/// The unit in which Linux adds memory.
pub const LINUX_MEMORY_BLOCK: u64 = 128 << 20;

/// What makes a guest give up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection failed.
    #[error(transparent)]
    Connection(#[from] connection::Error),
    /// The ring failed.
    #[error(transparent)]
    Ring(#[from] split_ring::Error),
    /// The device called a request wrong; Linux marks the device broken then.
    #[error("the device answered {kind:?} at {addr:#x}, {nb_blocks} blocks with {response:?}")]
    Broken {
        /// What was asked.
        kind: RequestType,
        /// First address.
        addr: u64,
        /// Number of blocks.
        nb_blocks: u16,
        /// What the device said.
        response: ResponseType,
    },
    /// The device counts other than the driver.
    #[error("the device has {device:#x} bytes plugged, the driver {driver:#x}")]
    Count {
        /// `plugged_size` of the configuration.
        device: u64,
        /// What the driver plugged.
        driver: u64,
    },
    /// The requested size was not reached in time.
    #[error("requested {requested:#x}, plugged {plugged:#x} after {after:?}")]
    Timeout {
        /// What the device wants.
        requested: u64,
        /// What it has.
        plugged: u64,
        /// How long it was tried.
        after: Duration,
    },
}

type Result<T> = std::result::Result<T, Error>;

/// How many requests were answered in which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// Done.
    pub ack: u64,
    /// More than requested.
    pub nack: u64,
    /// Not now.
    pub busy: u64,
}

/// A guest with a driver for the device, and vCPUs that may use its memory.
#[derive(Debug)]
pub struct GuestDriver {
    frontend: Frontend,
    channel: Arc<BackendChannel>,
    driver: MemDriver,
    vcpus: Option<Vcpus>,
    /// Indices of the plugged blocks.
    plugged: BTreeSet<u64>,
    probed: bool,
    seen_changes: usize,
    retry_after: Duration,
    answers: Answers,
}

/// How things stand after one step of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// As much is plugged as requested.
    Settled(MemConfig),
    /// There may be more to do at once.
    GoOn,
    /// The device is busy: there is more to do after a change, or a while.
    Busy(MemConfig),
}

impl GuestDriver {
    /// A guest whose ring is running.
    pub fn new(frontend: Frontend, channel: Arc<BackendChannel>, driver: MemDriver) -> Self {
        Self {
            frontend,
            channel,
            driver,
            vcpus: None,
            plugged: BTreeSet::new(),
            probed: false,
            seen_changes: 0,
            retry_after: Duration::from_secs(1),
            answers: Answers::default(),
        }
    }

    /// Tells vCPUs to leave memory before it is unplugged.
    pub fn with_vcpus(mut self, vcpus: Vcpus) -> Self {
        self.vcpus = Some(vcpus);
        self
    }

    /// How long to wait after BUSY when nothing changes; Linux waits 5 s at first and 50 s at last.
    pub fn set_retry_after(&mut self, retry_after: Duration) {
        self.retry_after = retry_after;
    }

    /// The front-end's connection.
    pub fn frontend(&self) -> &Frontend {
        &self.frontend
    }

    /// The channel on which changes are announced.
    pub fn channel(&self) -> &Arc<BackendChannel> {
        &self.channel
    }

    /// The vCPUs.
    pub fn vcpus(&self) -> Option<&Vcpus> {
        self.vcpus.as_ref()
    }

    /// The driver, for single requests.
    pub fn driver_mut(&mut self) -> &mut MemDriver {
        &mut self.driver
    }

    /// The driver.
    pub fn driver(&self) -> &MemDriver {
        &self.driver
    }

    /// How the requests were answered so far.
    pub fn answers(&self) -> Answers {
        self.answers
    }

    /// The configuration, which is always read anew: `plugged_size` changes without notice.
    pub fn config(&self) -> Result<MemConfig> {
        Ok(self.frontend.config()?)
    }

    /// The plugged memory, in maximal ascending ranges.
    pub fn plugged_ranges(&self) -> Result<Vec<Range<u64>>> {
        let config = self.config()?;
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for block in &self.plugged {
            let start = config.addr + block * config.block_size;
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end += config.block_size,
                _ => ranges.push(start..start + config.block_size),
            }
        }
        Ok(ranges)
    }

    /// How many changes were announced when the driver looked last.
    pub fn seen_changes(&self) -> usize {
        self.seen_changes
    }

    /// How long to wait after BUSY when nothing changes.
    pub fn retry_after(&self) -> Duration {
        self.retry_after
    }

    /// Begins anew, as a guest that boots does; what was plugged is the device's to say.
    pub fn reboot(&mut self) -> Result<()> {
        self.plugged.clear();
        self.probed = false;
        Ok(self.driver.clear()?)
    }

    /// Works until as much is plugged as requested.
    pub fn run_to_requested(&mut self, timeout: Duration) -> Result<MemConfig> {
        let start = Instant::now();
        loop {
            let config = match self.turn()? {
                Turn::Settled(config) => return Ok(config),
                Turn::GoOn => continue,
                Turn::Busy(config) => config,
            };
            let (requested, plugged) = (config.requested_size, config.plugged_size);
            let after = start.elapsed();
            let rest =
                timeout.checked_sub(after).ok_or(Error::Timeout { requested, plugged, after })?;
            self.channel.wait_beyond(self.seen_changes, rest.min(self.retry_after));
        }
    }

    /// One step: looks at the configuration and makes one request, if there is one to make.
    pub fn turn(&mut self) -> Result<Turn> {
        self.seen_changes = self.channel.config_changes();
        let config = self.config()?;
        if !self.probed {
            // The driver that had these blocks is gone, and with it what they were used for.
            if config.plugged_size == 0 || self.unplug_all(config)? {
                self.probed = true;
                return Ok(Turn::GoOn);
            }
            return Ok(Turn::Busy(config));
        }
        let driver = self.plugged.len() as u64 * config.block_size;
        if config.plugged_size != driver {
            return Err(Error::Count { device: config.plugged_size, driver });
        }
        if config.plugged_size == config.requested_size {
            return Ok(Turn::Settled(config));
        }
        Ok(if self.step(config)? { Turn::GoOn } else { Turn::Busy(config) })
    }

    /// One request towards the requested size; false when the device is busy.
    fn step(&mut self, config: MemConfig) -> Result<bool> {
        if config.plugged_size < config.requested_size {
            let missing = config.requested_size - config.plugged_size;
            match self.next_hole(config, missing / config.block_size) {
                Some(blocks) => self.plug(config, blocks),
                None => Ok(false),
            }
        } else {
            let excess = config.plugged_size - config.requested_size;
            match self.last_run(config, excess / config.block_size) {
                Some(blocks) => self.unplug(config, blocks),
                None => Ok(false),
            }
        }
    }

    /// The lowest unplugged blocks, at most `limit` and within one Linux memory block.
    fn next_hole(&self, config: MemConfig, limit: u64) -> Option<Range<u64>> {
        let usable = config.usable_region_size / config.block_size;
        let start = (0..usable).find(|block| !self.plugged.contains(block))?;
        let end = (start + 1..usable.min(chunk_end(config, start)).min(start + limit))
            .find(|block| self.plugged.contains(block))
            .unwrap_or(usable.min(chunk_end(config, start)).min(start + limit));
        Some(start..end)
    }

    /// The highest plugged blocks, at most `limit` and within one Linux memory block.
    fn last_run(&self, config: MemConfig, limit: u64) -> Option<Range<u64>> {
        let last = *self.plugged.last()?;
        let mut start = last;
        while last + 1 - start < limit
            && start > 0
            && self.plugged.contains(&(start - 1))
            && chunk_end(config, start - 1) > last
        {
            start -= 1;
        }
        Some(start..last + 1)
    }

    fn plug(&mut self, config: MemConfig, blocks: Range<u64>) -> Result<bool> {
        let (addr, nb_blocks) = request_range(config, &blocks);
        let response = self.driver.plug(addr, nb_blocks)?;
        let done = self.judge(RequestType::Plug, addr, nb_blocks, &response)?;
        if response.kind() == ResponseType::Ack {
            self.plugged.extend(blocks);
        }
        Ok(done)
    }

    fn unplug(&mut self, config: MemConfig, blocks: Range<u64>) -> Result<bool> {
        let (addr, nb_blocks) = request_range(config, &blocks);
        let bytes = addr..addr + u64::from(nb_blocks) * config.block_size;
        let used = self.vcpus.as_ref().map_or(Vec::new(), |vcpus| {
            let used = vcpus.given();
            vcpus.take(bytes.clone());
            used
        });
        let response = self.driver.unplug(addr, nb_blocks)?;
        let done = self.judge(RequestType::Unplug, addr, nb_blocks, &response)?;
        if response.kind() == ResponseType::Ack {
            self.plugged.retain(|block| !blocks.contains(block));
        } else if let Some(vcpus) = &self.vcpus {
            // Refused: the memory goes back to those who used it.
            for range in used {
                let part = range.start.max(bytes.start)..range.end.min(bytes.end);
                if part.start < part.end {
                    vcpus.give(part);
                }
            }
        }
        Ok(done)
    }

    fn unplug_all(&mut self, config: MemConfig) -> Result<bool> {
        if let Some(vcpus) = &self.vcpus {
            vcpus.take(config.addr..config.addr + config.region_size);
        }
        let response = self.driver.unplug_all()?;
        let done = self.judge(RequestType::UnplugAll, 0, 0, &response)?;
        if done {
            self.plugged.clear();
        }
        Ok(done)
    }

    /// Whether to go on at once; an error when Linux would give the device up.
    fn judge(
        &mut self,
        kind: RequestType,
        addr: u64,
        nb_blocks: u16,
        response: &Response,
    ) -> Result<bool> {
        match response.kind() {
            ResponseType::Ack => {
                self.answers.ack += 1;
                Ok(true)
            }
            ResponseType::Nack => {
                self.answers.nack += 1;
                Ok(kind == RequestType::Plug)
            }
            ResponseType::Busy => {
                self.answers.busy += 1;
                Ok(false)
            }
            response => Err(Error::Broken { kind, addr, nb_blocks, response }),
        }
    }
}

/// The first block behind the Linux memory block that has `block`.
fn chunk_end(config: MemConfig, block: u64) -> u64 {
    let chunk = LINUX_MEMORY_BLOCK.max(config.block_size);
    let addr = config.addr + block * config.block_size;
    ((addr / chunk + 1) * chunk - config.addr) / config.block_size
}

fn request_range(config: MemConfig, blocks: &Range<u64>) -> (u64, u16) {
    // A chunk has at most 32768 blocks: 128 MiB of 4 KiB.
    (config.addr + blocks.start * config.block_size, (blocks.end - blocks.start) as u16)
}
