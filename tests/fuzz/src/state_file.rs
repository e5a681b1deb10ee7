//! Files of any content, and good files with edits, opened as a state file.
//!
//! What is promised: no panic; refused, or taken over with sums that agree; a file that is refused
//! is left as it was; what is taken over can be changed and found again; no allocation of a size
//! that only the file's content names. A file of another boot of the host is one of a new device.

use std::alloc::System;
use std::path::{Path, PathBuf};

use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tempfile::TempDir;
use vhost_user_mem::state_file::{
    BootId, Commit, Delta, Geometry, JournalUpdate, Saved, StateFile, StateFileError,
};
use virtio_mem::device::{self, DeviceState, VirtioMem};

use crate::input::Input;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const BLOCK: u64 = 4096;
/// What opening may allocate besides a few times the file: names, errors, buffers.
const SMALL: usize = 64 << 10;

// From spec-notes/state-file.md.
const HEAD_CRC: usize = 64;
const SLOTS: [usize; 2] = [4096, 8192];
const SLOT_CRC: usize = 104;
const SLOT_PLUGGED: usize = 24;
const SLOT_CHECKSUM: usize = 32;
const LASTING: [usize; 2] = [16384, 20480];
const LASTING_CRC: usize = 16;
const BITMAP: usize = 24576;
/// Of a host that was started anew.
const OTHER_BOOT: BootId = BootId([0x5a; 16]);

/// Bounds the time of one input.
const EDITS: usize = 64;

fn geometry(blocks: u64) -> Geometry {
    Geometry { addr: 1 << 32, region_size: blocks * BLOCK, block_size: BLOCK, node_id: None }
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        // In memory, where there is such a place.
        let shm = Path::new("/dev/shm");
        let dir = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() };
        Self(dir.unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("state")
    }
}

fn delta(input: &mut Input<'_>, blocks: u64) -> Delta {
    let (kind, first, nr) = (input.u8(), input.u16(), input.u16());
    let first_block = u64::from(first) % blocks;
    let nr_blocks = 1 + u64::from(nr) % (blocks - first_block);
    match kind % 8 {
        0 => Delta::None,
        1 => Delta::ClearAll,
        2..=4 => Delta::Clear { first_block, nr_blocks },
        _ => Delta::Set { first_block, nr_blocks },
    }
}

fn commit(input: &mut Input<'_>, blocks: u64) -> Commit<'static> {
    let journal = match input.u8() % 3 {
        0 => JournalUpdate::Keep,
        1 => JournalUpdate::Forget,
        _ => JournalUpdate::Record(&[7; 24]),
    };
    Commit {
        requested_size: u64::from(input.u16()) % (blocks + 1) * BLOCK,
        usable_region_size: blocks * BLOCK,
        api_migration: input.u8() & 1 == 1,
        reset_pending: input.u8() & 1 == 1,
        delta: delta(input, blocks),
        journal,
    }
}

/// A good file after some commits.
fn good(input: &mut Input<'_>, blocks: u64) -> Vec<u8> {
    let folder = Folder::new();
    let mut file = StateFile::create(&folder.path(), &geometry(blocks), 0, 0).unwrap();
    for _ in 0..input.u8() % 4 {
        file.commit(&commit(input, blocks)).unwrap();
        if input.u8() & 1 == 1 {
            file.mark_answered().unwrap();
        }
    }
    std::fs::read(folder.path()).unwrap()
}

/// Where edits do most: the parts that are read.
fn place(input: &mut Input<'_>, len: usize) -> usize {
    let (part, at) = (input.u8(), usize::from(input.u8()));
    match part % 8 {
        0 => at % 64,
        1 | 2 => SLOTS[0] + at % 120,
        3 | 4 => SLOTS[1] + at % 120,
        5 if at % 3 == 0 => LASTING[at % 2] + at % 24,
        5 => 12288 + at % 16,
        6 => BITMAP + at,
        _ => usize::from(input.u16()) % len.max(1),
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(target) = bytes.get_mut(at..at + value.len()) {
        target.copy_from_slice(value);
    }
}

fn edit(bytes: &mut Vec<u8>, input: &mut Input<'_>) {
    match input.u8() % 8 {
        0 => bytes.truncate(usize::from(input.u16())),
        1 => bytes.resize(bytes.len() + usize::from(input.u8()), 0),
        2 | 3 => {
            let at = place(input, bytes.len());
            put(bytes, at, &[input.u8()]);
        }
        4 => {
            let at = place(input, bytes.len()) / 8 * 8;
            put(bytes, at, &input.u64().to_le_bytes());
        }
        5 => {
            let at = place(input, bytes.len()) / 8 * 8;
            put(bytes, at, &u64::from(input.u8()).to_le_bytes());
        }
        6 => repair_sums(bytes, usize::from(input.u8() & 1)),
        _ => repair(bytes),
    }
}

/// Makes the checksums of head and slots right again, so that edits get further.
fn repair(bytes: &mut [u8]) {
    let slots = [(SLOTS[0], SLOT_CRC), (SLOTS[1], SLOT_CRC)];
    let lasting = [(LASTING[0], LASTING_CRC), (LASTING[1], LASTING_CRC)];
    for (start, len) in [(0, HEAD_CRC)].into_iter().chain(slots).chain(lasting) {
        if let Some(covered) = bytes.get(start..start + len)
            && covered.iter().any(|&byte| byte != 0)
        {
            let crc = u64::from(crc32fast::hash(covered));
            put(bytes, start + len, &crc.to_le_bytes());
        }
    }
}

/// Makes the sums of one slot those of the bitmap that is there.
fn repair_sums(bytes: &mut [u8], slot: usize) {
    let Some(bitmap) = bytes.get(BITMAP..) else { return };
    let words: Vec<u64> =
        bitmap.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
    let ones = words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
    put(bytes, SLOTS[slot] + SLOT_PLUGGED, &ones.to_le_bytes());
    put(bytes, SLOTS[slot] + SLOT_CHECKSUM, &checksum(&words).to_le_bytes());
    repair(bytes);
}

fn checksum(words: &[u64]) -> u64 {
    let mix = |value: u64| {
        let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    };
    let nonzero = words.iter().zip(1u64..).filter(|(word, _)| **word != 0);
    nonzero.fold(0, |sum, (&word, index)| sum ^ mix(mix(index) ^ word))
}

/// Whether the parts of what was read agree with each other and with the geometry.
fn assert_consistent(saved: &Saved, blocks: u64) {
    let ones = saved.plugged.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
    assert_eq!(ones, saved.plugged_blocks);
    assert_eq!(saved.plugged.len() as u64, blocks.div_ceil(64));
    if let (Some(last), tail @ 1..) = (saved.plugged.last(), blocks % 64) {
        assert_eq!(last >> tail, 0, "blocks behind the region");
    }
}

/// The device that the daemon would make of it, if it takes it.
fn restore(saved: &Saved, asked: &Geometry) -> Option<VirtioMem> {
    let Geometry { addr, region_size, block_size, node_id } = *asked;
    let geometry = device::Geometry::new(addr, region_size, block_size, node_id).unwrap();
    if saved.other_boot {
        return VirtioMem::new(geometry, saved.requested_size).ok();
    }
    let Saved { requested_size, usable_region_size, plugged, .. } = saved.clone();
    VirtioMem::restore(geometry, DeviceState { requested_size, usable_region_size, plugged }).ok()
}

/// Opens content, checks every promise; the file, where it was taken.
fn open(
    folder: &Folder,
    bytes: &[u8],
    asked: &Geometry,
    boot: BootId,
) -> Result<(StateFile, Saved), StateFileError> {
    std::fs::write(folder.path(), bytes).unwrap();
    let region = Region::new(ALLOCATOR);
    let result = StateFile::open_in(&folder.path(), asked, boot);
    let allocated = region.change().bytes_allocated;
    assert!(
        allocated <= 4 * bytes.len() + SMALL,
        "{allocated} bytes allocated for a file of {}",
        bytes.len()
    );
    if let Err(error) = &result {
        assert!(!error.to_string().is_empty());
    }
    if result.is_err() || result.as_ref().is_ok_and(|(_, saved)| restore(saved, asked).is_none()) {
        let left = std::fs::read(folder.path()).unwrap();
        assert!(left == bytes, "a file that was refused has changed");
    }
    result
}

/// Runs one input.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let folder = Folder::new();
    let choice = input.u8();
    let blocks = [1, 63, 64, 200, 1000][usize::from(choice >> 2) % 5];
    let asked = match choice & 3 {
        // More than any file here holds.
        0 => geometry(device::MAX_BLOCKS),
        _ => geometry(blocks),
    };
    let bytes = if choice & 3 == 1 {
        input.rest().to_vec()
    } else {
        let mut bytes = good(&mut input, blocks);
        for _ in 0..EDITS {
            if input.is_empty() {
                break;
            }
            edit(&mut bytes, &mut input);
        }
        bytes
    };
    let this = BootId::of_host().unwrap();
    let boot = if choice & 0x80 == 0 { this } else { OTHER_BOOT };
    let Ok((mut file, saved)) = open(&folder, &bytes, &asked, boot) else { return };
    if saved.other_boot {
        assert!(saved.plugged_blocks == 0 && saved.journal.is_none());
        assert!(!saved.api_migration && !saved.reset_pending);
    }
    assert_consistent(&saved, blocks);
    drop(file);
    let (again, same) = StateFile::open_in(&folder.path(), &asked, boot).unwrap();
    assert_eq!(same, saved, "the second look shows something else");
    file = again;
    let change = Commit {
        requested_size: BLOCK,
        usable_region_size: asked.region_size,
        api_migration: !saved.api_migration,
        reset_pending: !saved.reset_pending,
        delta: Delta::Set { first_block: blocks - 1, nr_blocks: 1 },
        journal: JournalUpdate::Record(&[9; 24]),
    };
    file.commit(&change).unwrap();
    drop(file);
    let (_, changed) = StateFile::open_in(&folder.path(), &asked, boot).unwrap();
    assert_consistent(&changed, blocks);
    let mut plugged = saved.plugged;
    let last = usize::try_from(blocks - 1).unwrap();
    plugged[last / 64] |= 1 << (last % 64);
    assert_eq!(changed.plugged, plugged);
    assert_eq!((changed.requested_size, changed.api_migration), (BLOCK, !saved.api_migration));
    assert_eq!(changed.reset_pending, !saved.reset_pending);
    assert!(changed.journal.is_some_and(|entry| entry.request == [9; 24]));
}
