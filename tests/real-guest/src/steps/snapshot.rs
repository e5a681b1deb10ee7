//! The region is saved to an image by a client of the discard channel, as a VMM would, while the guest is resized.
//!
//! QEMU's process writes the memory, so that it is saved while the guest is stopped; block state is frozen for as
//! long. Then the guest shrinks before the image is whole: it is not held up, and the image is the guest as it was.

use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use migration::ram::{BlockOptions, MigrationBlock, RamBlocks};
use migration::snapshot::{FileIo, Restore, RunningGuest, restore, save_in_background};
use migration::stream::Configuration;
use migration::{Guest, NoDevices, Progress};
use ram_discard::RamDiscardManager;
use ram_discard::memory::RamBlock;
use serde_json::json;
use virtio_mem::discard_channel::RemoteRamDiscardManager;

use crate::machine::Machine;
use crate::qemu::REGION_ADDR;
use crate::report::Report;
use crate::sizes::{GIB, MIB};
use crate::wait;

/// For answers of the daemon.
const PATIENCE: Duration = Duration::from_secs(10);

const BEFORE: u64 = GIB;
const AFTER: u64 = GIB / 2;

/// Saves a guest of 1 GiB that shrinks to half of it meanwhile.
pub fn run(machine: &mut Machine, report: &mut Report) -> Result<()> {
    machine.resize(BEFORE)?;
    machine.guest.dirty_fast(200)?;
    let size = machine.setup.region;
    let stream = UnixStream::connect(machine.daemon.discard_socket())?;
    let manager = Arc::new(RemoteRamDiscardManager::attach(stream, PATIENCE)?);
    let memory = machine.qemu.region_memory()?;
    let options = BlockOptions { written_elsewhere: true, ..BlockOptions::migratable() };
    let blocks = blocks(memory.try_clone()?, size, options, Some(manager))?;
    let (image, progress) = (tempfile::tempfile()?, Arc::new(Progress::new()));
    let shrinking = Shrinking { machine: Mutex::new(machine), memory, instant: Mutex::default() };
    let running = RunningGuest {
        configuration: Configuration::new("real-guest"),
        blocks: &blocks,
        devices: &mut NoDevices,
        guest: &shrinking,
        progress: Arc::clone(&progress),
    };
    save_in_background(running, &image)?;
    let Shrinking { machine, instant, .. } = shrinking;
    let machine = machine.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let instant = instant.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let AtStop { plugged, content, took } = instant.context("the guest was not stopped")?;

    let mut seen = machine.settle(AFTER)?;
    let info = progress.snapshot();
    let busy = info.busy_time.unwrap_or_default();
    seen.api_note = format!("frozen {:.1} s", busy.as_secs_f32());
    seen.guest_note = format!("shrank after {:.1} s", took.as_secs_f32());
    let restored = restored(&image, size)?;
    let same = content == contents(&restored, &plugged, machine.setup.block)?;
    seen.claim("the image is the memory of the instant", same);
    let pages = (content.iter().filter(|&&hash| hash != ZEROS).count(), info.normal);
    seen.claim("pages were saved", pages.0 >= 100 && pages.1 * 4096 >= 200 * MIB);
    let held = restored.metadata()?.blocks() * 512;
    seen.claim("nothing but the saved pages is in it", held == info.normal * 4096);
    report.saw("shrunk while it was saved", seen);
    Ok(())
}

/// The guest when it was stopped, and what followed.
struct AtStop {
    /// Plugged blocks, by their offsets.
    plugged: Vec<u64>,
    /// What they held.
    content: Vec<u64>,
    /// From when it continued until it had given memory away.
    took: Duration,
}

/// A guest that is asked to shrink as soon as it continues.
struct Shrinking<'a> {
    machine: Mutex<&'a mut Machine>,
    memory: File,
    instant: Mutex<Option<AtStop>>,
}

impl Shrinking<'_> {
    fn stop_and_look(&self) -> Result<()> {
        let machine = &mut **self.machine.lock().expect("no thread has panicked");
        machine.qemu.qmp.execute("stop", &json!({}))?;
        let block = machine.setup.block;
        let ranges = machine.daemon.api.blocks()?.plugged;
        let offsets = ranges
            .iter()
            .flat_map(|range| (range.offset..range.offset + range.size).step_by(block as usize));
        let plugged: Vec<u64> = offsets.collect();
        ensure!(machine.daemon.api.device()?.migration_active, "block state is not frozen");
        let content = contents(&self.memory, &plugged, block)?;
        let instant = AtStop { plugged, content, took: Duration::ZERO };
        *self.instant.lock().expect("no thread has panicked") = Some(instant);
        Ok(())
    }

    fn run_and_shrink(&self) -> Result<()> {
        let machine = &mut **self.machine.lock().expect("no thread has panicked");
        let api = &machine.daemon.api;
        ensure!(!api.device()?.migration_active, "block state is frozen while the guest runs");
        api.resize(AFTER)?;
        machine.qemu.qmp.execute("cont", &json!({}))?;
        let begin = Instant::now();
        wait::until("the guest to unplug memory while it is saved", wait::LONG, || {
            Ok((api.device()?.plugged_size < BEFORE).then_some(()))
        })?;
        if let Some(instant) = &mut *self.instant.lock().expect("no thread has panicked") {
            instant.took = begin.elapsed();
        }
        Ok(())
    }
}

impl Guest for Shrinking<'_> {
    fn stop(&self) -> Result<(), String> {
        self.stop_and_look().map_err(|error| format!("{error:#}"))
    }

    fn run(&self) -> Result<(), String> {
        self.run_and_shrink().map_err(|error| format!("{error:#}"))
    }
}

/// What [`contents`] says of a block of zeros.
const ZEROS: u64 = 0;

/// A hash of each block at these offsets.
fn contents(file: &File, offsets: &[u64], block: u64) -> Result<Vec<u64>> {
    let zeros = vec![0; block as usize];
    let mut bytes = vec![0; block as usize];
    let mut hashes = Vec::with_capacity(offsets.len());
    for &offset in offsets {
        file.read_exact_at(&mut bytes, offset)?;
        let mut hasher = DefaultHasher::new();
        hasher.write(&bytes);
        hashes.push(if bytes == zeros { ZEROS } else { hasher.finish() });
    }
    Ok(hashes)
}

/// The region as the only block.
fn blocks(
    file: File,
    size: u64,
    options: BlockOptions,
    manager: Option<Arc<dyn RamDiscardManager>>,
) -> Result<RamBlocks> {
    let ram = RamBlock::new("region".to_owned(), REGION_ADDR, size, file, 0)?;
    let block = MigrationBlock::map(Arc::new(ram), options)?;
    if let Some(manager) = manager {
        block.set_discard_manager(0, manager)?;
    }
    let mut blocks = RamBlocks::new();
    blocks.register(Arc::new(block))?;
    Ok(blocks)
}

/// Memory that was read from an image.
fn restored(image: &File, size: u64) -> Result<File> {
    let memory = tempfile::tempfile_in("/dev/shm")?;
    memory.set_len(size)?;
    let what = Restore {
        configuration: Configuration::new("real-guest"),
        blocks: Arc::new(blocks(memory.try_clone()?, size, BlockOptions::migratable(), None)?),
        devices: &mut NoDevices,
        io: FileIo::default(),
        progress: Arc::new(Progress::new()),
    };
    restore(what, image)?;
    Ok(memory)
}
