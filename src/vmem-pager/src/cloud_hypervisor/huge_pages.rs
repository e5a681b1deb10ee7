//! The huge pages that a restored guest takes of the system's pools.

use std::fs;

use migration::page_bitmap::bytes_of;
use migration::stream::TARGET_PAGE_SIZE;
use ram_discard::ByteRange;

use super::image::SavedGuest;
use super::memory::Memory;
use crate::error::PagerError;

/// Sets aside all huge pages that a guest has memory in, and on demand all of its boot memory, since each page is
/// asked for; so that none of them can be missing later, when the guest waits for it.
///
/// # Errors
///
/// When a pool does not have as many.
pub(super) fn reserve(
    guest: &SavedGuest,
    memories: &[Memory],
    eager: bool,
) -> Result<(), PagerError> {
    let mut taken: Vec<(u64, u64)> = Vec::new();
    for (index, memory) in memories.iter().enumerate() {
        let Some(page) = memory.huge_page() else { continue };
        let free = free_pages(page);
        for part in parts(guest, index, page, eager) {
            memory.reserve(part).map_err(|source| {
                let needed = needed(guest, memories, page, eager);
                let before: u64 = taken.iter().filter(|(of, _)| *of == page).map(|(_, count)| count).sum();
                let free = free.map_or_else(String::new, |free| {
                    format!(", of which {} are to be had", free + before)
                });
                let name = guest.layout().mappings[index].name();
                let what = format!(
                    "{name}: the guest needs {needed} huge pages of {} KiB{free} ({source}): free some, or have more \
                     of them (/proc/sys/vm/nr_hugepages)",
                    page >> 10
                );
                PagerError::System { action: "restore", source: std::io::Error::other(what) }
            })?;
        }
        let count = parts(guest, index, page, eager).map(|part| part.len() / page).sum();
        taken.push((page, count));
    }
    Ok(())
}

/// Huge pages of a size that a guest takes in all.
fn needed(guest: &SavedGuest, memories: &[Memory], page: u64, eager: bool) -> u64 {
    let of = memories.iter().enumerate().filter(|(_, memory)| memory.huge_page() == Some(page));
    of.flat_map(|(index, _)| parts(guest, index, page, eager)).map(|part| part.len() / page).sum()
}

/// The parts of a mapping that will be taken, whole huge pages, ascending.
fn parts(
    guest: &SavedGuest,
    index: usize,
    page: u64,
    eager: bool,
) -> impl Iterator<Item = ByteRange> {
    let mapping = &guest.layout().mappings[index];
    let present = guest.block(index).present();
    let (pages, unit) = (present.nr_pages(), page / TARGET_PAGE_SIZE);
    let all = mapping.reserve || !eager && !mapping.virtio_mem;
    let mut from = 0;
    std::iter::from_fn(move || {
        let start = match all {
            true if from < pages => from,
            true => return None,
            false => present.next_set(from, pages)? / unit * unit,
        };
        let mut end = if all { pages } else { (start + unit).min(pages) };
        // Huge pages that follow each other are one part.
        while end < pages && present.next_set(end, (end + unit).min(pages)).is_some() {
            end = (end + unit).min(pages);
        }
        from = end;
        Some(bytes_of(start..end))
    })
}

/// Huge pages of a size that nothing has taken or set aside; `None` where the system does not tell.
fn free_pages(page: u64) -> Option<u64> {
    let read = |name: &str| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/{name}", page >> 10);
        fs::read_to_string(path).ok()?.trim().parse::<u64>().ok()
    };
    Some(read("free_hugepages")?.saturating_sub(read("resv_hugepages")?))
}
