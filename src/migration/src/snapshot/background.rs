//! A snapshot of a running guest, as it was at one instant.
//!
//! The guest is stopped for as long as it takes to save its devices and to protect the pages that
//! exist. Then it continues; a vCPU that writes a protected page waits until that page is in the file.
//! Holes and discarded ranges are zeros at that instant by definition, so they are neither
//! allocated nor saved, and writing them costs nothing.
//!
//! Block state is frozen while the guest is stopped, and may change afterwards: what is about to be
//! discarded is saved first, and what is plugged is not part of the image.
//!
//! - [`image`]: the pages, and the threads that write them.
//! - [`discards`]: the listener at a manager.

mod claims;
mod discards;
mod image;

use std::fs::File;
use std::sync::Arc;

use ram_discard::FreezeFor;

use super::file_io::PagesFile;
use super::save::{ended, find_pages, put_end, put_ram_start, write_run};
use super::sink::FileSink;
use super::{PIECE, with_mapped_ram};
use crate::devices::{DevicePhase, DeviceSection, Devices};
use crate::error::MigrationError;
use crate::framing::Framing;
use crate::page_bitmap::{GAP_MIN, PageBitmap};
use crate::precopy::Guest;
use crate::progress::{Progress, Status};
use crate::ram::{FrozenBlocks, ListOptions, RamBlocks};
use crate::stream::{Configuration, TARGET_PAGE_SIZE};
use crate::sys::GatherWrite;
use crate::sys::page_faults::{FaultKind, PageFaults};
use claims::Saved;
use discards::Discards;
use image::Image;

/// A running guest that is to be saved as it is now.
pub struct RunningGuest<'a> {
    /// Machine type and capabilities.
    pub configuration: Configuration,
    /// Its RAM, mapped where the guest uses it.
    pub blocks: &'a RamBlocks,
    /// Everything else.
    pub devices: &'a mut dyn Devices,
    /// The guest, which is stopped for a moment.
    pub guest: &'a dyn Guest,
    /// What can be seen of it, and how it is cancelled.
    pub progress: Arc<Progress>,
}

/// Writes `guest` to `file`, which is empty, while the guest runs. Returns when all is written.
///
/// Requests for its memory are answered BUSY while it is stopped, and served afterwards: pages that a device
/// is about to discard are written first, on its thread, which waits for that. Where a manager can only
/// freeze block state, it stays frozen.
///
/// # Errors
///
/// Why it could not be written; the file is of no use then. The guest runs on in any case. What
/// kernel or memory lack is found out before anything changes.
pub fn save_in_background(guest: RunningGuest<'_>, file: &File) -> Result<(), MigrationError> {
    let progress = Arc::clone(&guest.progress);
    progress.set_status(Status::Setup);
    let result = save_protected(guest, file);
    ended(&progress, &result);
    result
}

fn save_protected(guest: RunningGuest<'_>, file: &File) -> Result<(), MigrationError> {
    let RunningGuest { configuration, blocks, devices, guest, progress } = guest;
    // All that can be refused comes first.
    let mut faults = PageFaults::open(FaultKind::WriteProtected)
        .map_err(MigrationError::io("use userfaultfd"))?;
    let options = ListOptions::of(&configuration);
    for block in blocks.migratable()?.into_iter().filter(|block| !options.leaves_out(block)) {
        let mapping = faults.add(Arc::clone(block.mapping()));
        if let Some(used) = block.used() {
            let registered = faults.register(mapping, used);
            registered.map_err(MigrationError::memory(block.id(), "protect its pages"))?;
        }
    }
    let mut out = FileSink::of_empty(file)?;
    let own =
        file.try_clone().map_err(MigrationError::io("duplicate the descriptor of the file"))?;
    let mut frozen = FrozenBlocks::new(blocks.migratable()?, FreezeFor::Source)?;
    progress.busy(true);

    progress.guest_stopped();
    guest.stop().map_err(|reason| MigrationError::Vmm { what: "stop the guest", reason })?;
    let mut runs = false;
    let stopped =
        protect_all(blocks, &frozen, devices, &faults, &configuration, &mut out, &progress);
    // What this takes ends with it. So protection has ended when it fails, and no vCPU waits.
    let result = stopped.and_then(|(saved, framing, rest)| {
        let image = Arc::new(Image::new(faults, saved, own, Arc::clone(&progress))?);
        frozen.follow(|manager| Some(Box::new(Discards::new(&image, manager))))?;
        progress.busy(frozen.any_frozen());
        image.write_while_running(guest, frozen, &mut runs)?;
        // Without its end the file is of no use.
        put_end(&mut out, framing, rest)
    });
    progress.busy(false);
    result.map_err(|error| {
        if runs {
            return error;
        }
        match guest.run() {
            Ok(()) => error,
            Err(reason) => {
                tracing::error!(%error, %reason, "no snapshot, and the guest cannot continue");
                MigrationError::Vmm { what: "let the guest continue", reason }
            }
        }
    })
}

/// What is done while the guest is stopped: devices are saved, and the pages that exist protected.
fn protect_all(
    blocks: &RamBlocks,
    frozen: &FrozenBlocks,
    devices: &mut dyn Devices,
    faults: &PageFaults,
    configuration: &Configuration,
    out: &mut FileSink<'_>,
    progress: &Progress,
) -> Result<(Vec<Saved>, Framing, Vec<DeviceSection>), MigrationError> {
    let mut framing = Framing::begin(out, &with_mapped_ram(configuration))?;
    for section in devices.save(DevicePhase::Early)? {
        framing.full(out, section)?;
    }
    let rest = devices.save(DevicePhase::Late)?;
    let mut saved = Vec::new();
    let placed = put_ram_start(out, blocks, ListOptions::of(configuration))?;
    for (mapping, (block, header)) in placed.into_iter().enumerate() {
        let mut todo = find_pages(&block, frozen, progress)?;
        let mut written = PageBitmap::new(todo.nr_pages());
        if block.options().written_elsewhere {
            // Others write it through mappings that are not protected here: now or never.
            let mut gathered = GatherWrite::new();
            let mut from = 0;
            while let Some(run) = todo.next_run(from, todo.nr_pages(), PIECE / TARGET_PAGE_SIZE) {
                if progress.is_cancelled() {
                    return Err(MigrationError::Cancelled);
                }
                from = run.end;
                let file = PagesFile::cached(out.file);
                for run in write_run(&block, run, header, &file, &mut gathered, progress)? {
                    written.set_range(run);
                }
            }
            todo.clear_all();
        }
        for range in todo.host_ranges(block.page_size(), GAP_MIN) {
            let protected = faults.protect(mapping, range, true);
            protected.map_err(MigrationError::memory(block.id(), "protect its pages"))?;
        }
        saved.push(Saved::new(block, header, mapping, todo, written));
    }
    Ok((saved, framing, rest))
}
