//! What a file says about virtio-mem devices, and whether it agrees with itself.

use std::iter;

use ram_discard::{MemoryState, RamDiscardSource, Section};
use vmstate::wire::{SUBSECTION, WireRead};

use super::BITMAP_MAX;
use super::error::Warning;
use super::pages::PageMap;
use super::ram::SavedRamBlock;
use crate::stream::{FormatError, TARGET_PAGE_SIZE};

/// Last part of the id string of the section before RAM.
pub(super) const EARLY: &str = "virtio-mem-device-early";
/// Last part of the id string of the section after RAM.
pub(super) const NORMAL: &str = "virtio-mem";

/// Bytes of the geometry, and of the geometry and the plugged size.
pub(super) const GEOMETRY_LEN: usize = 28;
pub(super) const EARLY_HEAD_LEN: usize = GEOMETRY_LEN + 8;
/// Bytes of the two sizes that follow RAM.
const SIZES_LEN: usize = 16;
/// How the names of virtio's own subsections begin.
const SUBSECTION_PREFIX: &[u8] = b"virtio";

/// The part of an id string that names a virtio-mem section, and the path before it.
pub(super) fn split_id<'a>(idstr: &'a str, name: &str) -> Option<&'a str> {
    let path = idstr.strip_suffix(name)?;
    if path.is_empty() { Some(path) } else { path.strip_suffix('/') }
}

/// What a device is called in a warning: its path, if it has one.
pub(super) fn device_name(path: &str) -> String {
    if path.is_empty() { NORMAL.to_owned() } else { path.to_owned() }
}

/// A virtio-mem device, as a file has it. All sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SavedVirtioMem {
    /// Path of the device: its id string without the last part. Empty when it has none.
    pub path: String,
    /// Its instance.
    pub instance_id: u32,
    /// Guest-physical address of the region.
    pub addr: u64,
    /// The region.
    pub region_size: u64,
    /// A block.
    pub block_size: u64,
    /// NUMA node.
    pub node: u32,
    /// What the device says is plugged.
    pub plugged_size: u64,
    /// What the guest may use of the region, from its start; known after RAM.
    pub usable_region_size: Option<u64>,
    /// What the guest is asked to plug; known after RAM.
    pub requested_size: Option<u64>,
    /// Id of its RAM block.
    pub ram_block: Option<String>,
    /// One bit a block, 64 a word, the first in the lowest bit.
    bitmap: Vec<u64>,
}

impl SavedVirtioMem {
    /// Reads the early section: addr, region_size, block_size (be64), node (be32), size (be64) and
    /// the bitmap (be64 words). `None` when there are less bytes than that.
    pub(super) fn from_early(path: &str, instance_id: u32, bytes: &[u8]) -> Option<Self> {
        let (head, bitmap) = bytes.split_at_checked(EARLY_HEAD_LEN)?;
        let (node, size) = head[24..].split_at(4);
        Some(Self {
            path: path.to_owned(),
            instance_id,
            addr: be64(head, 0)?,
            region_size: be64(head, 8)?,
            block_size: be64(head, 16)?,
            node: u32::from_be_bytes(node.try_into().ok()?),
            plugged_size: be64(size, 0)?,
            usable_region_size: None,
            requested_size: None,
            ram_block: None,
            bitmap: bitmap
                .as_chunks::<8>()
                .0
                .iter()
                .map(|word| u64::from_be_bytes(*word))
                .collect(),
        })
    }

    /// Reads the section before RAM off a stream, from after its header to before its footer: the device, and
    /// its bytes as they were. `None` when `idstr` is not such a section's.
    ///
    /// # Errors
    ///
    /// When the geometry is impossible, or the stream ends.
    pub fn read_early(
        idstr: &str,
        instance_id: u32,
        reader: &mut dyn WireRead,
    ) -> Result<Option<(Self, Vec<u8>)>, FormatError> {
        let Some(path) = split_id(idstr, EARLY) else { return Ok(None) };
        let offset = reader.offset();
        let geometry = reader.peek(GEOMETRY_LEN, "the geometry of a virtio-mem device")?;
        let (region_size, block_size) =
            (be64(geometry, 8).unwrap_or(0), be64(geometry, 16).unwrap_or(0));
        let bitmap = Self::bitmap_len(region_size, block_size).filter(|len| *len <= BITMAP_MAX);
        let Some(bitmap) = bitmap else {
            let what = "size of a virtio-mem region with such blocks";
            return Err(FormatError::Value { offset, what, found: region_size });
        };
        let len = EARLY_HEAD_LEN as u64 + bitmap;
        let bytes = reader.bytes(len, len, "the blocks of a virtio-mem device")?;
        Ok(Self::from_early(path, instance_id, &bytes).map(|device| (device, bytes)))
    }

    /// Reads the section after RAM: usable_region_size and requested_size (be64). QEMU has them
    /// within the state of the virtio transport, which is not described: they follow the queues
    /// and stand before the first subsection.
    pub(super) fn read_sizes(&mut self, bytes: &[u8]) -> Option<()> {
        let sizes = match bytes.len() {
            SIZES_LEN => bytes,
            _ => {
                let from = self.find_config(bytes)?;
                let end = subsections(bytes, from).unwrap_or(bytes.len());
                bytes.get(end.checked_sub(SIZES_LEN).filter(|at| *at >= from)?..end)?
            }
        };
        self.usable_region_size = be64(sizes, 0);
        self.requested_size = be64(sizes, 8);
        Some(())
    }

    /// The end of the copy of the device's configuration space, which only the device
    /// writes; what a guest writes stands before it.
    fn find_config(&self, bytes: &[u8]) -> Option<usize> {
        const REGION_SIZE_END: usize = 32;
        let at = bytes.windows(REGION_SIZE_END).position(|config| {
            config[..8] == self.block_size.to_le_bytes()
                && config[16..24] == self.addr.to_le_bytes()
                && config[24..] == self.region_size.to_le_bytes()
        })?;
        Some(at + REGION_SIZE_END)
    }

    /// Bytes of the bitmap that the geometry asks for, in whole words; `None` when the geometry is
    /// impossible.
    pub(super) fn bitmap_len(region_size: u64, block_size: u64) -> Option<u64> {
        region_size.checked_div(block_size)?.div_ceil(64).checked_mul(8)
    }

    /// How many blocks the region has, 0 for an impossible geometry.
    fn blocks(&self) -> u64 {
        self.region_size.checked_div(self.block_size).unwrap_or(0)
    }

    /// Whether the blocks can be told from each other: the geometry is possible.
    pub fn has_blocks(&self) -> bool {
        self.block_size.is_power_of_two()
            && self.block_size >= TARGET_PAGE_SIZE
            && self.region_size.is_multiple_of(self.block_size)
    }

    fn is_plugged(&self, block: u64) -> bool {
        let word = usize::try_from(block / 64).ok().and_then(|index| self.bitmap.get(index));
        word.is_some_and(|word| word >> (block % 64) & 1 != 0)
    }

    /// What is plugged: maximal ascending ranges, bytes from the start of the region. Empty when
    /// the geometry is impossible.
    pub fn plugged(&self) -> impl Iterator<Item = Section> {
        let blocks = if self.has_blocks() { self.blocks() } else { 0 };
        let mut at = 0;
        iter::from_fn(move || {
            let start = self.next(at, blocks, true)?;
            at = self.next(start, blocks, false).unwrap_or(blocks);
            Section::from_bounds(start * self.block_size, at * self.block_size)
        })
    }

    /// The first block from `at` on, below `end`, that is plugged or not.
    fn next(&self, mut at: u64, end: u64, plugged: bool) -> Option<u64> {
        while at < end {
            // Beyond the bitmap nothing is plugged.
            let word = usize::try_from(at / 64).ok().and_then(|index| self.bitmap.get(index));
            let Some(&word) = word else { return (!plugged).then_some(at) };
            let word = (if plugged { word } else { !word }) >> (at % 64);
            if word != 0 {
                at += u64::from(word.trailing_zeros());
                return (at < end).then_some(at);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// Finds the device's RAM block among `blocks`, each with its id and its used length in bytes: of the
    /// region's size, and named after the device if more than one is.
    pub fn find_block<'a>(
        &self,
        blocks: impl Iterator<Item = (&'a str, u64)> + Clone,
    ) -> Option<usize> {
        let prefix = format!("{}/", self.path);
        let of_size =
            || blocks.clone().enumerate().filter(|(_, (_, used))| *used == self.region_size);
        let is_named = |id: &str| !self.path.is_empty() && id.starts_with(&prefix);
        let single = |found: Vec<usize>| match found[..] {
            [index] => Some(index),
            _ => None,
        };
        let named = of_size().filter(|(_, (id, _))| is_named(id)).map(|(index, _)| index);
        single(named.collect()).or_else(|| single(of_size().map(|(index, _)| index).collect()))
    }

    /// What is odd about the device itself.
    pub(super) fn check(&self, warnings: &mut Vec<Warning>) {
        let device = || device_name(&self.path);
        let mut rule = |holds: bool, what, value, rule| {
            if !holds {
                warnings.push(Warning::Rule { device: device(), what, value, rule });
            }
        };
        let Self { addr, region_size, block_size, .. } = *self;
        let aligned = |size: u64| block_size != 0 && size.is_multiple_of(block_size);
        let power = block_size.is_power_of_two() && block_size >= TARGET_PAGE_SIZE;
        rule(power, "block_size", block_size, "a power of two of at least a page");
        const MULTIPLE: &str = "a multiple of the block size";
        rule(aligned(region_size), "region_size", region_size, MULTIPLE);
        rule(aligned(addr), "addr", addr, MULTIPLE);
        const WITHIN: &str = "within the region";
        if let Some(usable) = self.usable_region_size {
            rule(aligned(usable), "usable_region_size", usable, MULTIPLE);
            rule(usable <= region_size, "usable_region_size", usable, WITHIN);
        }
        if let Some(requested) = self.requested_size {
            let usable = self.usable_region_size.unwrap_or(region_size);
            rule(aligned(requested), "requested_size", requested, MULTIPLE);
            rule(requested <= region_size, "requested_size", requested, WITHIN);
            rule(requested <= usable, "requested_size", requested, "within the usable region");
        }
        if !self.has_blocks() {
            return;
        }
        let expected = Self::bitmap_len(region_size, block_size).unwrap_or(0);
        let found = self.bitmap.len() as u64 * 8;
        if found != expected {
            warnings.push(Warning::BitmapSize { device: device(), found, expected });
        }
        let marked: u64 = self.bitmap.iter().map(|word| u64::from(word.count_ones())).sum();
        let (mut plugged, mut end) = (0, 0);
        for range in self.plugged() {
            plugged += range.len();
            end = range.end();
        }
        let beyond = marked - plugged / block_size;
        if beyond != 0 {
            warnings.push(Warning::BeyondRegion { device: device(), blocks: beyond });
        }
        if plugged != self.plugged_size {
            let (size, counted) = (self.plugged_size, plugged);
            warnings.push(Warning::PluggedSize { device: device(), size, counted });
        }
        if let Some(usable) = self.usable_region_size.filter(|usable| end > *usable) {
            warnings.push(Warning::BeyondUsable { device: device(), end, usable });
        }
    }

    /// Looks for pages of the device's block that lie in discarded memory.
    pub(super) fn check_pages(&self, block: &SavedRamBlock, pages: &PageMap) -> Option<Warning> {
        if !self.has_blocks() {
            return None;
        }
        let block_pages = self.block_size / TARGET_PAGE_SIZE;
        let (mut normal, mut zero, mut first) = (0, 0, None);
        for (index, word) in pages.words() {
            let mut discarded = 0u64;
            let mut page = 0;
            while page < 64 {
                let block = (index * 64 + page) / block_pages;
                let next = ((block + 1) * block_pages).saturating_sub(index * 64).min(64);
                if !self.is_plugged(block) {
                    discarded |= bits(page, next);
                }
                page = next;
            }
            normal += u64::from((word.normal & discarded).count_ones());
            zero += u64::from((word.zero & discarded).count_ones());
            let stray = (word.normal | word.zero) & discarded;
            if stray != 0 && first.is_none() {
                let page = index * 64 + u64::from(stray.trailing_zeros());
                first = Some(page * TARGET_PAGE_SIZE);
            }
        }
        let (device, block) = (device_name(&self.path), block.id.clone());
        first.map(|first| Warning::DiscardedPages { device, block, normal, zero, first })
    }
}

/// Plugged is populated. Of a device whose geometry is impossible nothing is.
impl RamDiscardSource for SavedVirtioMem {
    fn region_size(&self) -> u64 {
        self.region_size
    }

    fn granularity(&self) -> u64 {
        if self.has_blocks() { self.block_size } else { TARGET_PAGE_SIZE }
    }

    fn next_range(&self, section: Section, state: MemoryState) -> Option<Section> {
        if !self.has_blocks() {
            return (state == MemoryState::Discarded).then_some(section);
        }
        let end = section.end().div_ceil(self.block_size);
        let plugged = state.is_populated();
        let start = self.next(section.start() / self.block_size, end, plugged)?;
        let after = self.next(start, end, !plugged).unwrap_or(end);
        let bounds = (start.checked_mul(self.block_size)?, after.checked_mul(self.block_size));
        let range = Section::from_bounds(bounds.0, bounds.1.unwrap_or(u64::MAX))?;
        range.intersection(section)
    }
}

/// Bits `[from, to)` of a word, `to` being 64 at most.
fn bits(from: u64, to: u64) -> u64 {
    let below = |bit: u64| if bit == 64 { u64::MAX } else { (1 << bit) - 1 };
    below(to) & !below(from)
}

/// Where the first virtio subsection starts, from `from` on.
fn subsections(bytes: &[u8], from: usize) -> Option<usize> {
    const HEAD: usize = 2;
    let starts = |at: &usize| {
        let rest = &bytes[*at..];
        let name = rest.get(HEAD..).and_then(|name| name.get(..usize::from(rest[1])));
        rest[0] == SUBSECTION && name.is_some_and(|name| name.starts_with(SUBSECTION_PREFIX))
    };
    (from..bytes.len().saturating_sub(HEAD)).find(starts)
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}
