//! The memory table, as the front-end's messages make it.

use std::os::fd::OwnedFd;

use rustix::fs::fstat;

use super::error::RelayError;
use super::message::{FrontendRequest, Message, u32_at, u64_at};
use crate::shared_file::FileKind;

/// Bytes of a region in a message, and in front of the first one.
const REGION: usize = 32;
const REGIONS: usize = 8;

/// A region of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    /// Guest-physical address.
    gpa: u64,
    /// Bytes.
    size: u64,
    /// Where the front-end has it mapped, by which rings are addressed.
    user_addr: u64,
    /// Where it starts in its file.
    offset: u64,
}

/// What is mapped, without overlaps.
#[derive(Debug, Default)]
pub(super) struct MemoryTable {
    regions: Vec<Region>,
}

impl MemoryTable {
    /// The table after a message about it. With SET_MEM_TABLE, regions and descriptors of the
    /// message come in the order of guest-physical addresses then, as the crate wants them.
    pub(super) fn after(
        &self,
        request: FrontendRequest,
        message: &mut Message,
    ) -> Result<Self, RelayError> {
        let refuse = |reason: String| RelayError::Value { request, reason };
        let regions: Vec<_> = message.body[REGIONS..].chunks_exact(REGION).map(parse).collect();
        if request == FrontendRequest::REM_MEM_REG {
            let [region] = regions[..] else {
                return Err(RelayError::Size { request, size: message.body.len() });
            };
            return self.without(region).map_err(refuse);
        }
        if request == FrontendRequest::ADD_MEM_REG {
            regions.iter().try_for_each(check).map_err(refuse)?;
            check_files(&regions, &message.fds).map_err(refuse)?;
            let mut all = self.regions.clone();
            all.extend(regions);
            return Self::of(all).map_err(refuse);
        }
        let count = u32_at(&message.body, 0) as usize;
        if count != regions.len() || message.body.len() != REGIONS + count * REGION {
            let size = message.body.len();
            return Err(refuse(format!("{count} regions in a payload of {size} bytes")));
        }
        regions.iter().try_for_each(check).map_err(refuse)?;
        check_files(&regions, &message.fds).map_err(refuse)?;
        sort(message, &regions);
        Self::of(regions).map_err(refuse)
    }

    fn of(mut regions: Vec<Region>) -> Result<Self, String> {
        regions.sort_by_key(|region| region.gpa);
        for pair in regions.windows(2) {
            if pair[1].gpa - pair[0].gpa < pair[0].size {
                return Err(format!("{} that overlaps {}", pair[1].name(), pair[0].name()));
            }
        }
        Ok(Self { regions })
    }

    fn without(&self, region: Region) -> Result<Self, String> {
        let identity = |region: &Region| (region.gpa, region.size, region.user_addr);
        let mut regions = self.regions.clone();
        if let Some(at) = regions.iter().position(|other| identity(other) == identity(&region)) {
            regions.remove(at);
            return Ok(Self { regions });
        }
        let known = regions.iter().find(|other| other.gpa == region.gpa);
        Err(known.map_or_else(
            || format!("{}, which was never added", region.name()),
            |known| {
                let (name, addr) = (region.name(), region.user_addr);
                let other = known.user_addr;
                format!(
                    "{name} at user address {addr:#x} instead of {} at {other:#x}",
                    known.name()
                )
            },
        ))
    }

    /// The guest-physical address of what the front-end has mapped at `user_addr`.
    pub(super) fn gpa_of(&self, user_addr: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = user_addr.checked_sub(region.user_addr)?;
            (offset < region.size).then(|| region.gpa + offset)
        })
    }
}

impl Region {
    fn name(&self) -> String {
        format!("a region at {:#x} of {:#x} bytes", self.gpa, self.size)
    }
}

fn parse(bytes: &[u8]) -> Region {
    Region {
        gpa: u64_at(bytes, 0),
        size: u64_at(bytes, 8),
        user_addr: u64_at(bytes, 16),
        offset: u64_at(bytes, 24),
    }
}

/// Refuses what could not be mapped, or not be addressed.
fn check(region: &Region) -> Result<(), String> {
    let name = region.name();
    if region.size == 0 {
        return Err(format!("{name}: a size of 0"));
    }
    for (what, start) in
        [("guest-physical", region.gpa), ("user", region.user_addr), ("file", region.offset)]
    {
        if start.checked_add(region.size).is_none() {
            return Err(format!("{name}: it passes the end of all {what} addresses"));
        }
    }
    let page_size = rustix::param::page_size() as u64;
    if !region.offset.is_multiple_of(page_size) {
        let offset = region.offset;
        return Err(format!("{name}: its offset {offset:#x} in the file is not that of a page"));
    }
    Ok(())
}

/// Refuses regions that pass the end of their file, where each access would be lost. What is shortened
/// later is found at an access. Other files than memory are not asked for their size.
fn check_files(regions: &[Region], files: &[OwnedFd]) -> Result<(), String> {
    for (region, file) in regions.iter().zip(files) {
        if FileKind::of(file) != FileKind::Memory {
            continue;
        }
        let name = region.name();
        let found =
            fstat(file).map_err(|error| format!("{name}: the size of its file: {error}"))?;
        let (end, found) = (region.offset + region.size, found.st_size);
        if u64::try_from(found).is_ok_and(|found| found < end) {
            return Err(format!("{name}: its file has {found:#x} bytes instead of {end:#x}"));
        }
    }
    Ok(())
}

/// Brings the regions of SET_MEM_TABLE into the order of their addresses, with their descriptors.
fn sort(message: &mut Message, regions: &[Region]) {
    let mut order: Vec<_> = (0..regions.len()).collect();
    order.sort_by_key(|&at| regions[at].gpa);
    let body = message.body.clone();
    let mut fds: Vec<_> = message.fds.drain(..).map(Some).collect();
    for (to, &from) in order.iter().enumerate() {
        let bytes = |at: usize| REGIONS + at * REGION..REGIONS + (at + 1) * REGION;
        message.body[bytes(to)].copy_from_slice(&body[bytes(from)]);
        message.fds.extend(fds.get_mut(from).and_then(Option::take));
    }
}
