//! The machine's RAM blocks, and who tells of writes to them.
//!
//! | block | written by | tracker |
//! | --- | --- | --- |
//! | `ram` | vCPUs and driver, through this process's mapping | write-protection of that mapping |
//! | `ram` | the daemon (used ring, responses), through its own | what the driver lets it write; or the log that it keeps |
//! | `vmem0` | vCPUs only: the daemon punches holes, and tells of it | write-protection |
//!
//! A daemon that keeps a log (VHOST_F_LOG_ALL) freezes block state meanwhile. The driver of this VMM's guest is in
//! this process, so that it is known which pages the daemon writes, and block state can follow.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use anyhow::Context;
use migration::dirty::{DirtyTracker, LoggedRange, Merged, VhostLog, WriteProtect};
use migration::page_bitmap::PageBitmap;
use migration::ram::{BlockOptions, MigrationBlock, RamBlocks};
use ram_discard::ByteRange;
use ram_discard::memory::{HostMapping, RamBlock};
use rustix::fs::MemfdFlags;

use crate::machine::Machine;
use crate::memory::{PAGE_SIZE, Region, memfd};
use crate::split_ring::DeviceWrites;

const BOOT: &str = "ram";
/// Id of the block that is the device's region.
pub(super) const REGION: &str = "vmem0";

/// The blocks of a machine. Without `discard_aware` the region is sent as a whole.
pub(super) fn blocks(machine: &Machine, discard_aware: bool) -> anyhow::Result<RamBlocks> {
    let mut blocks = RamBlocks::new();
    for (id, gpa) in [(BOOT, 0), (REGION, machine.options().addr)] {
        let region = machine.ram().region(gpa)?;
        let send_holes = !discard_aware && id == REGION;
        // The daemon writes used ring and responses through a mapping of its own.
        let written_elsewhere = id == BOOT;
        let options = BlockOptions { send_holes, written_elsewhere, ..BlockOptions::migratable() };
        let block =
            MigrationBlock::new(ram_block(id, region)?, machine.ram().mapping(gpa)?, options)?;
        blocks.register(Arc::new(block))?;
    }
    Ok(blocks)
}

/// Id of the block whose memory starts at `gpa`.
pub(crate) fn id_at(machine: &Machine, gpa: u64) -> &'static str {
    if gpa == machine.options().addr { REGION } else { BOOT }
}

fn ram_block(id: &str, region: &Region) -> anyhow::Result<Arc<RamBlock>> {
    let file = region.file.try_clone()?;
    let block = RamBlock::new(id.to_owned(), region.gpa, region.size, file, region.offset)?;
    Ok(Arc::new(block))
}

/// The trackers of all blocks, by id. With `elastic` block state may change while they are started.
pub(super) fn trackers(
    machine: &Arc<Machine>,
    blocks: &RamBlocks,
    elastic: bool,
) -> anyhow::Result<HashMap<String, Box<dyn DirtyTracker>>> {
    let mut trackers = HashMap::new();
    for block in blocks.iter() {
        // Where holes are read, they become data, which is not to be taken for a write.
        let file = (!block.options().send_holes).then(|| Arc::clone(block.ram()));
        let protection = WriteProtect::new(Arc::clone(block.mapping()), file)?;
        let mut tracker: Box<dyn DirtyTracker> = Box::new(protection);
        if block.id() == BOOT {
            let daemon: Box<dyn DirtyTracker> = match elastic {
                true => Box::new(RingWrites::new(machine, block)),
                false => {
                    let log = DaemonLog::new(machine, block);
                    Box::new(log.context("make a log for the daemon")?)
                }
            };
            tracker = Box::new(Merged::new(vec![tracker, daemon]));
        }
        trackers.insert(block.id().to_owned(), tracker);
    }
    Ok(trackers)
}

/// What the daemon may have written by what the driver told it. A write is never missed: a page is reported at each
/// sync as long as the daemon may write it, and once after that.
struct RingWrites {
    writes: DeviceWrites,
    /// Guest-physical addresses of the block.
    block: Range<u64>,
}

impl RingWrites {
    fn new(machine: &Machine, block: &MigrationBlock) -> Self {
        let range = block.ram().range();
        Self { writes: machine.device_writes(), block: range.start()..range.end() }
    }
}

impl DirtyTracker for RingWrites {
    fn start(&mut self, _populated: &[ByteRange]) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
        for (start, end) in self.writes.take() {
            let (start, end) = (start.max(self.block.start), end.min(self.block.end));
            if start < end {
                let pages = |gpa: u64| (gpa - self.block.start) / PAGE_SIZE;
                dirty.set_range(pages(start)..pages(end).min(dirty.nr_pages()));
            }
        }
        Ok(())
    }

    fn clear(&mut self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The log that the daemon keeps while this tracker is started.
struct DaemonLog {
    machine: Arc<Machine>,
    file: File,
    len: u64,
    log: VhostLog,
}

impl DaemonLog {
    fn new(machine: &Arc<Machine>, block: &MigrationBlock) -> anyhow::Result<Self> {
        let regions = machine.ram().regions();
        let end = regions.iter().map(|region| region.range().end).max().unwrap_or(0);
        // One bit a page for all of guest memory, in whole words, in whole pages.
        let len = (end / PAGE_SIZE).div_ceil(8).next_multiple_of(PAGE_SIZE);
        let file = memfd("dirty-log", len, MemfdFlags::empty())?;
        let mapping = Arc::new(HostMapping::map(&file, 0, len)?);
        let range = block.used().context("an empty block")?;
        let logged = LoggedRange { guest_addr: block.ram().range().start(), range };
        let log = VhostLog::new(mapping, vec![logged])?;
        Ok(Self { machine: machine.clone(), file, len, log })
    }
}

impl DirtyTracker for DaemonLog {
    fn start(&mut self, populated: &[ByteRange]) -> io::Result<()> {
        self.log.start(populated)?;
        let frontend = self.machine.frontend();
        frontend.set_log_base(&self.file, self.len, 0).map_err(io::Error::other)?;
        self.machine.log_writes(true).map_err(io::Error::other)
    }

    fn sync(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
        self.log.sync(dirty)
    }

    fn clear(&mut self, range: ByteRange) -> io::Result<()> {
        self.log.clear(range)
    }

    fn stop(&mut self) -> io::Result<()> {
        self.machine.log_writes(false).map_err(io::Error::other)
    }
}
