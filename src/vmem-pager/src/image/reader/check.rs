//! Whether a file is the whole of a guest.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use migration::inspect::{InspectError, Inspection, SavedVirtioMem, Warning, inspect_file};
use migration::page_bitmap::PageBitmap;
use migration::stream::{
    CAPABILITY_IGNORE_SHARED, CAPABILITY_MAPPED_RAM, Command, MappedRamHeader, TARGET_PAGE_SIZE,
};
use vmstate::printable;

use super::places::{BlockPages, Places};
use super::{Discards, GuestImage, ImageBlock};
use crate::error::PagerError;

/// Bytes of all blocks together, whose bitmaps are addressed, though not held where they are empty.
const MEMORY_MAX: u64 = 16 << 40;
/// Bytes of sections of devices that are held: large machines have some hundred KiB.
const DEVICES_MAX: u64 = 256 << 20;

/// A section's first byte, a footer's, and the end of all sections (`stream/record.rs`).
const FULL: u8 = 0x04;
const FOOTER: u8 = 0x7e;
const EOF: u8 = 0x00;
/// Bytes of a footer.
const FOOTER_LEN: usize = 5;

/// The section in which QEMU says what the guest was when it was saved.
const GLOBAL_STATE: &[u8] = b"\x0bglobalstate";
/// Bytes between its id and the name of the state: instance, version, length (be32 each).
const GLOBAL_STATE_HEAD: usize = 12;
/// Bytes of the field that holds the name.
const RUNSTATE_LEN: usize = 100;

/// Checks a file.
pub(super) fn check(path: &Path, file: File) -> Result<GuestImage, PagerError> {
    let refuse = |what: String| PagerError::Image { path: path.to_owned(), what };
    let (seen, pages) = inspect_file::<BlockPages>(&file);
    check_capabilities(&seen).map_err(refuse)?;
    let after_ram = after_ram(&seen).map_err(refuse)?;
    check_records(&seen).map_err(refuse)?;
    let mut warnings = warnings(&seen).map_err(refuse)?;

    let early = seen.sections.iter().filter(|section| section.offset < after_ram);
    let mut early_bytes = Vec::new();
    for section in early {
        let bytes = read(&file, section.offset, section.len, early_bytes.len() as u64);
        early_bytes.extend(bytes.map_err(refuse)?);
    }
    let first = seen.sections.iter().map(|section| section.offset).find(|at| *at >= after_ram);
    let start = first.unwrap_or(after_ram);
    let end = seen.description.map_or(seen.len, |(offset, _)| offset).saturating_sub(1);
    let device_state = device_state(&file, start, end).map_err(refuse)?;

    let total = seen.blocks.iter().map(|block| u128::from(block.used_length)).sum::<u128>();
    if total > u128::from(MEMORY_MAX) {
        let limit = MEMORY_MAX >> 40;
        return Err(refuse(format!(
            "RAM blocks of {total:#x} bytes; at most {limit} TiB are served"
        )));
    }
    let mut blocks = Vec::new();
    for (block, pages) in seen.blocks.iter().zip(pages) {
        let device = seen.virtio_mem.iter().find(|device| {
            device.ram_block.as_ref() == Some(&block.id) && device.region_size == block.used_length
        });
        let mut present = PageBitmap::new(block.used_length / TARGET_PAGE_SIZE);
        for (index, word) in pages.map.words() {
            let first = index * 64;
            let end = present.nr_pages().min(first + 64);
            present.or_bits(first..end, &[word.normal]);
        }
        let discards =
            device.map(Discards::of).transpose().map_err(|error| refuse(error.to_string()))?;
        if let Some(discards) = &discards {
            discards.discarded(|pages| {
                present.clear_range(pages);
            });
        }
        let places = match block.mapped {
            Some(MappedRamHeader { pages_offset, .. }) => Places::Fixed(pages_offset),
            None => Places::Recorded(pages.records),
        };
        let (id, used_length) = (block.id.clone(), block.used_length);
        blocks.push(ImageBlock { id, used_length, present, discards, places });
    }
    let runstate = runstate(&device_state);
    if seen.error.is_some() {
        warnings
            .push("nothing describes the state of its devices, which is not checked".to_owned());
    }
    let mapped = seen.configuration.has(CAPABILITY_MAPPED_RAM);
    let mut configuration = seen.configuration;
    configuration.capabilities.clear();
    Ok(GuestImage {
        path: path.to_owned(),
        file,
        configuration,
        mapped,
        ram_section: seen.ram_section.unwrap_or_default(),
        early: early_bytes,
        device_state,
        virtio_mem: blocks
            .iter()
            .filter_map(|block| block.discards.as_ref())
            .map(|it| it.device().to_owned())
            .collect(),
        blocks,
        runstate,
        warnings,
    })
}

/// Where the sections of devices begin that follow RAM, of a file that was read that far, and as far as
/// anything describes it.
fn after_ram(seen: &Inspection) -> Result<u64, String> {
    match (&seen.error, seen.after_ram) {
        (None, Some(after_ram)) => Ok(after_ram),
        // Sections of devices have no length: what is in them only a description tells.
        (
            Some(InspectError::Undescribed { .. } | InspectError::Unsupported { .. }),
            Some(after_ram),
        ) => Ok(after_ram),
        (None, None) => Err("it has no RAM: not the whole of a guest".to_owned()),
        (Some(error), None) => Err(format!("not the whole of a guest: {error}")),
        (Some(error), Some(_)) => Err(format!("the state of its devices is damaged: {error}")),
    }
}

fn check_capabilities(seen: &Inspection) -> Result<(), String> {
    for capability in &seen.configuration.capabilities {
        match capability.as_str() {
            CAPABILITY_MAPPED_RAM => {}
            CAPABILITY_IGNORE_SHARED => {
                return Err(
                    "it was saved with x-ignore-shared, without the memory that was shared; save \
                            the guest without that capability"
                        .to_owned(),
                );
            }
            other => {
                let other = printable(other);
                return Err(format!(
                    "it was saved with the capability {other:?}, which is not understood"
                ));
            }
        }
    }
    Ok(())
}

fn check_records(seen: &Inspection) -> Result<(), String> {
    if seen.blocks.is_empty() {
        return Err("it has no RAM blocks".to_owned());
    }
    for (offset, command) in &seen.commands {
        match command {
            Command::OpenReturnPath
            | Command::Ping(_)
            | Command::PostcopyAdvise(_)
            | Command::SwitchoverStart => {}
            other => {
                return Err(format!(
                    "byte {offset:#x}: {other:?}: a recording of postcopy, not a file of a guest"
                ));
            }
        }
    }
    Ok(())
}

/// What is odd and may be served all the same; an error for what may not.
fn warnings(seen: &Inspection) -> Result<Vec<String>, String> {
    let mut warnings = Vec::new();
    for device in &seen.virtio_mem {
        if !SavedVirtioMem::has_blocks(device) {
            let path = printable(&device.path);
            return Err(format!("the geometry of the virtio-mem device {path:?} is impossible"));
        }
    }
    for warning in &seen.warnings {
        match warning {
            Warning::Rule { .. }
            | Warning::PluggedSize { .. }
            | Warning::BeyondRegion { .. }
            | Warning::BitmapSize { .. }
            | Warning::PackageSkipped { .. }
            | Warning::PackageEnd { .. } => return Err(printable(&warning.to_string())),
            // QEMU reads the sizes itself.
            Warning::NoSizes { .. } => {}
            other => warnings.push(printable(&other.to_string())),
        }
    }
    Ok(warnings)
}

/// The sections of devices in `start..end`, which must be whole.
fn device_state(file: &File, start: u64, end: u64) -> Result<Vec<u8>, String> {
    let cut = || {
        format!(
            "the state of its devices, from byte {start:#x} on, does not end as sections do: the file was \
             cut or is damaged"
        )
    };
    let len = end.checked_sub(start).ok_or_else(cut)?;
    let mut bytes = read(file, start, len + 1, 0)?;
    let ends = bytes.pop() == Some(EOF)
        && bytes.first() == Some(&FULL)
        && bytes.len() > FOOTER_LEN
        && bytes[bytes.len() - FOOTER_LEN] == FOOTER;
    if !ends {
        return Err(cut());
    }
    Ok(bytes)
}

fn read(file: &File, at: u64, len: u64, held: u64) -> Result<Vec<u8>, String> {
    if len.saturating_add(held) > DEVICES_MAX {
        let limit = DEVICES_MAX >> 20;
        return Err(format!(
            "byte {at:#x}: {len} bytes of device state; at most {limit} MiB are served"
        ));
    }
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, at)
        .map_err(|error| format!("cannot read byte {at:#x}: {error}"))?;
    Ok(bytes)
}

/// The name of the guest's state, where there is exactly one section that has it.
fn runstate(device_state: &[u8]) -> Option<String> {
    let mut found = device_state.windows(GLOBAL_STATE.len()).enumerate();
    let mut found = found.by_ref().filter(|(_, bytes)| *bytes == GLOBAL_STATE);
    let (at, _) = found.next()?;
    if found.next().is_some() {
        return None;
    }
    let field = device_state.get(at + GLOBAL_STATE.len() + GLOBAL_STATE_HEAD..)?;
    let field = field.get(..RUNSTATE_LEN)?;
    let name = field.split(|byte| *byte == 0).next()?;
    let name = str::from_utf8(name).ok()?;
    let plain =
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
    plain.then(|| name.to_owned())
}
