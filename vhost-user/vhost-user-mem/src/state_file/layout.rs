//! The bytes of the file: offsets, head, slots, checksum.

use std::ops::Range;
use std::path::Path;

use super::{BootId, Delta, Geometry, StateFileError};

const MAGIC: [u8; 8] = *b"VMEMSTAT";
const VERSION: u32 = 2;
const PAGE: u64 = 4096;

/// The two slots, each within one page.
pub(super) const SLOTS: [u64; 2] = [PAGE, 2 * PAGE];
/// The mark that the journaled request was answered.
pub(super) const ANSWERED: u64 = 3 * PAGE;
/// The requested size that survives the host: two slots, each within one page.
pub(super) const LASTING: [u64; 2] = [4 * PAGE, 5 * PAGE];
/// The bitmap's words.
pub(super) const BITMAP: u64 = 6 * PAGE;
/// What comes before the bitmap.
pub(super) const FILE_HEAD: u64 = BITMAP;

// The head: each offset follows from the field before.
const VERSION_AT: usize = MAGIC.len();
const ADDR_AT: usize = VERSION_AT + 8;
const REGION_AT: usize = ADDR_AT + 8;
const BLOCK_AT: usize = REGION_AT + 8;
const NODE_AT: usize = BLOCK_AT + 8;
const BOOT_AT: usize = NODE_AT + 8;
const HEAD_CRC_AT: usize = BOOT_AT + 16;
pub(super) const HEADER_LEN: usize = HEAD_CRC_AT + 8;

// A slot.
const SEQ_AT: usize = 0;
const REQUESTED_AT: usize = SEQ_AT + 8;
const USABLE_AT: usize = REQUESTED_AT + 8;
const PLUGGED_AT: usize = USABLE_AT + 8;
const CHECKSUM_AT: usize = PLUGGED_AT + 8;
const FLAGS_AT: usize = CHECKSUM_AT + 8;
const DELTA_AT: usize = FLAGS_AT + 8;
const FIRST_AT: usize = DELTA_AT + 8;
const NR_AT: usize = FIRST_AT + 8;
const JOURNAL_SEQ_AT: usize = NR_AT + 8;
const JOURNAL_AT: usize = JOURNAL_SEQ_AT + 8;
const SLOT_CRC_AT: usize = JOURNAL_AT + 24;
pub(super) const SLOT_LEN: usize = SLOT_CRC_AT + 8;

pub(super) const ANSWERED_LEN: usize = 16;
pub(super) const LASTING_LEN: usize = 24;

const FLAG_API_MIGRATION: u64 = 1;
const FLAG_JOURNAL: u64 = 2;
const FLAG_RESET_PENDING: u64 = 4;

/// Length of a file, bytes.
pub(super) fn file_len(geometry: &Geometry) -> u64 {
    BITMAP + nr_words(geometry) as u64 * 8
}

/// Words of the bitmap.
pub(super) fn nr_words(geometry: &Geometry) -> usize {
    usize::try_from(nr_blocks(geometry).div_ceil(64)).expect("the device bounds its blocks")
}

fn nr_blocks(geometry: &Geometry) -> u64 {
    geometry.region_size / geometry.block_size
}

fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn get(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

/// The head of a file.
pub(super) struct Header<'a>(&'a Geometry, BootId);

impl<'a> Header<'a> {
    pub(super) fn new(geometry: &'a Geometry, boot: BootId) -> Self {
        Self(geometry, boot)
    }

    pub(super) fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..MAGIC.len()].copy_from_slice(&MAGIC);
        put(&mut bytes, VERSION_AT, u64::from(VERSION));
        put(&mut bytes, ADDR_AT, self.0.addr);
        put(&mut bytes, REGION_AT, self.0.region_size);
        put(&mut bytes, BLOCK_AT, self.0.block_size);
        put(&mut bytes, NODE_AT, node(self.0));
        bytes[BOOT_AT..HEAD_CRC_AT].copy_from_slice(&self.1.0);
        let crc = crc32fast::hash(&bytes[..HEAD_CRC_AT]);
        put(&mut bytes, HEAD_CRC_AT, u64::from(crc));
        bytes
    }

    /// Checks a head against the geometry that is asked for; gives the boot it was written in.
    pub(super) fn check(
        bytes: &[u8; HEADER_LEN],
        geometry: &Geometry,
        path: &Path,
    ) -> Result<BootId, StateFileError> {
        let damaged =
            |what: &str| StateFileError::Damaged { path: path.to_owned(), what: what.to_owned() };
        if bytes[..MAGIC.len()] != MAGIC {
            return Err(damaged("it does not start as one"));
        }
        // Read before anything that a newer version may have laid out otherwise.
        let version = get(bytes, VERSION_AT);
        if version > u64::from(VERSION) {
            let found = u32::try_from(version).unwrap_or(u32::MAX);
            return Err(StateFileError::Newer { path: path.to_owned(), found, known: VERSION });
        }
        if version != 0 && version < u64::from(VERSION) {
            return Err(damaged(&format!("version {version} is older than {VERSION}")));
        }
        let crc = u64::from(crc32fast::hash(&bytes[..HEAD_CRC_AT]));
        if version != u64::from(VERSION) || get(bytes, HEAD_CRC_AT) != crc {
            return Err(damaged("the checksum of its head is wrong"));
        }
        let hex = |value: u64| format!("{value:#x}");
        let named = |value: u64| match value.checked_sub(1) {
            None => "none".to_owned(),
            Some(node) => node.to_string(),
        };
        for (field, found, expected) in [
            ("addr", hex(get(bytes, ADDR_AT)), hex(geometry.addr)),
            ("region_size", hex(get(bytes, REGION_AT)), hex(geometry.region_size)),
            ("block_size", hex(get(bytes, BLOCK_AT)), hex(geometry.block_size)),
            ("node_id", named(get(bytes, NODE_AT)), named(node(geometry))),
        ] {
            if found != expected {
                let path = path.to_owned();
                return Err(StateFileError::Geometry { path, field, found, expected });
            }
        }
        let mut boot = [0; 16];
        boot.copy_from_slice(&bytes[BOOT_AT..HEAD_CRC_AT]);
        Ok(BootId(boot))
    }
}

/// The node as it is saved: 0 for none, else one more than the node.
fn node(geometry: &Geometry) -> u64 {
    geometry.node_id.map_or(0, |node| u64::from(node) + 1)
}

/// One commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) seq: u64,
    pub(super) requested_size: u64,
    pub(super) usable_region_size: u64,
    pub(super) plugged_blocks: u64,
    /// Of the bitmap with the delta applied.
    pub(super) checksum: u64,
    pub(super) api_migration: bool,
    pub(super) reset_pending: bool,
    pub(super) delta: Delta,
    pub(super) journal: Option<[u8; 24]>,
    /// The commit that recorded the journal.
    pub(super) journal_seq: u64,
}

impl Default for Slot {
    fn default() -> Self {
        Self {
            seq: 0,
            requested_size: 0,
            usable_region_size: 0,
            plugged_blocks: 0,
            checksum: 0,
            api_migration: false,
            reset_pending: false,
            delta: Delta::None,
            journal: None,
            journal_seq: 0,
        }
    }
}

impl Slot {
    /// Where it stands: the slots take turns, so that a commit never touches the newest.
    pub(super) fn place(&self) -> u64 {
        SLOTS[usize::from(self.seq % 2 == 1)]
    }

    /// Whether this is the commit that follows `other`. Numbers wrap: no file that is accepted
    /// has a last commit.
    pub(super) fn follows(&self, other: &Self) -> bool {
        self.seq == other.seq.wrapping_add(1)
    }

    pub(super) fn to_bytes(self) -> [u8; SLOT_LEN] {
        let (kind, first, nr) = match self.delta {
            Delta::None => (0, 0, 0),
            Delta::Set { first_block, nr_blocks } => (1, first_block, nr_blocks),
            Delta::Clear { first_block, nr_blocks } => (2, first_block, nr_blocks),
            Delta::ClearAll => (3, 0, 0),
        };
        let mut flags = 0;
        if self.api_migration {
            flags |= FLAG_API_MIGRATION;
        }
        if self.journal.is_some() {
            flags |= FLAG_JOURNAL;
        }
        if self.reset_pending {
            flags |= FLAG_RESET_PENDING;
        }
        let mut bytes = [0; SLOT_LEN];
        for (at, value) in [
            (SEQ_AT, self.seq),
            (REQUESTED_AT, self.requested_size),
            (USABLE_AT, self.usable_region_size),
            (PLUGGED_AT, self.plugged_blocks),
            (CHECKSUM_AT, self.checksum),
            (FLAGS_AT, flags),
            (DELTA_AT, kind),
            (FIRST_AT, first),
            (NR_AT, nr),
            (JOURNAL_SEQ_AT, self.journal_seq),
        ] {
            put(&mut bytes, at, value);
        }
        bytes[JOURNAL_AT..JOURNAL_AT + 24].copy_from_slice(&self.journal.unwrap_or_default());
        let crc = crc32fast::hash(&bytes[..SLOT_CRC_AT]);
        put(&mut bytes, SLOT_CRC_AT, u64::from(crc));
        bytes
    }

    /// What stands at `place`; `None` when the slot was never written.
    pub(super) fn from_bytes(
        bytes: &[u8; SLOT_LEN],
        place: u64,
    ) -> Result<Option<Self>, &'static str> {
        if *bytes == [0; SLOT_LEN] {
            return Ok(None);
        }
        if get(bytes, SLOT_CRC_AT) != u64::from(crc32fast::hash(&bytes[..SLOT_CRC_AT])) {
            return Err("the checksum of a commit is wrong");
        }
        let (first_block, nr_blocks) = (get(bytes, FIRST_AT), get(bytes, NR_AT));
        let delta = match get(bytes, DELTA_AT) {
            0 => Delta::None,
            1 => Delta::Set { first_block, nr_blocks },
            2 => Delta::Clear { first_block, nr_blocks },
            3 => Delta::ClearAll,
            _ => return Err("a commit has an unknown change"),
        };
        let flags = get(bytes, FLAGS_AT);
        let mut journal = [0; 24];
        journal.copy_from_slice(&bytes[JOURNAL_AT..JOURNAL_AT + 24]);
        let slot = Self {
            seq: get(bytes, SEQ_AT),
            requested_size: get(bytes, REQUESTED_AT),
            usable_region_size: get(bytes, USABLE_AT),
            plugged_blocks: get(bytes, PLUGGED_AT),
            checksum: get(bytes, CHECKSUM_AT),
            api_migration: flags & FLAG_API_MIGRATION != 0,
            reset_pending: flags & FLAG_RESET_PENDING != 0,
            delta,
            journal: (flags & FLAG_JOURNAL != 0).then_some(journal),
            journal_seq: get(bytes, JOURNAL_SEQ_AT),
        };
        // The next commit would be written over the newest.
        if slot.place() != place {
            return Err("a commit stands in the place of the other");
        }
        Ok(Some(slot))
    }

    /// Whether a bitmap is the one this commit left.
    pub(super) fn verify(&self, words: &[u64], geometry: &Geometry) -> Result<(), &'static str> {
        let sums = sums(words, 0);
        if sums.checksum != self.checksum || sums.ones != self.plugged_blocks {
            return Err("the checksum of its bitmap is wrong");
        }
        let tail = nr_blocks(geometry) % 64;
        if tail != 0 && words.last().is_some_and(|word| word >> tail != 0) {
            return Err("its bitmap has blocks past the end of the region");
        }
        Ok(())
    }
}

/// What a commit keeps of the bitmap.
pub(super) struct Sums {
    /// XOR over all words of a mix of index and word: a change of some words changes it by those
    /// words only.
    pub(super) checksum: u64,
    /// Number of set bits.
    pub(super) ones: u64,
}

/// The sums of `words`, the first of which has the index `first`.
pub(super) fn sums(words: &[u64], first: usize) -> Sums {
    let mut sums = Sums { checksum: 0, ones: 0 };
    for (index, &word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
        sums.checksum ^= mix(mix((first + index) as u64 + 1) ^ word);
        sums.ones += u64::from(word.count_ones());
    }
    sums
}

/// The finaliser of splitmix64: every bit of the result depends on every bit of the value.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The words a delta touches; `None` when it names blocks outside the region.
pub(super) fn words_of(delta: Delta, geometry: &Geometry) -> Option<Range<usize>> {
    match delta {
        Delta::None => Some(0..0),
        Delta::ClearAll => Some(0..nr_words(geometry)),
        Delta::Set { first_block, nr_blocks } | Delta::Clear { first_block, nr_blocks } => {
            let end = first_block.checked_add(nr_blocks)?;
            if end > self::nr_blocks(geometry) {
                return None;
            }
            let start = usize::try_from(first_block / 64).ok()?;
            let end = usize::try_from(end.div_ceil(64)).ok()?;
            (start < end).then_some(start..end)
        }
    }
}

/// Applies a delta whose words exist.
pub(super) fn change(words: &mut [u64], delta: Delta) {
    let (first, nr, set) = match delta {
        Delta::None => return,
        Delta::ClearAll => {
            // Words that are zero already are not written, so that their pages stay shared.
            words.iter_mut().filter(|word| **word != 0).for_each(|word| *word = 0);
            return;
        }
        Delta::Set { first_block, nr_blocks } => (first_block, nr_blocks, true),
        Delta::Clear { first_block, nr_blocks } => (first_block, nr_blocks, false),
    };
    let end = first + nr;
    let mut at = first;
    while at < end {
        let low = at % 64;
        let len = (64 - low).min(end - at);
        let mask = (u64::MAX >> (64 - len)) << low;
        if let Some(word) = usize::try_from(at / 64).ok().and_then(|i| words.get_mut(i)) {
            *word = if set { *word | mask } else { *word & !mask };
        }
        at += len;
    }
}

/// Applies a delta that was read, and returns the words it touched; `None` when it names blocks
/// outside the region.
pub(super) fn apply(words: &mut [u64], delta: Delta, geometry: &Geometry) -> Option<Range<usize>> {
    let range = words_of(delta, geometry)?;
    change(words, delta);
    Some(range)
}

/// The mark that the request of a commit was answered.
pub(super) fn answered_bytes(seq: u64) -> [u8; ANSWERED_LEN] {
    let mut bytes = [0; ANSWERED_LEN];
    put(&mut bytes, 0, seq);
    put(&mut bytes, 8, !seq);
    bytes
}

/// The commit whose request was answered; `None` when the mark is torn or was never made.
pub(super) fn answered_seq(bytes: &[u8; ANSWERED_LEN]) -> Option<u64> {
    let seq = get(bytes, 0);
    (get(bytes, 8) == !seq).then_some(seq)
}

/// The requested size, where it outlives the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Lasting {
    pub(super) seq: u64,
    pub(super) requested_size: u64,
}

impl Lasting {
    /// Where it stands: the slots take turns, so that the newest is never written.
    pub(super) fn place(&self) -> u64 {
        LASTING[usize::from(self.seq % 2 == 1)]
    }

    pub(super) fn to_bytes(self) -> [u8; LASTING_LEN] {
        let mut bytes = [0; LASTING_LEN];
        put(&mut bytes, 0, self.seq);
        put(&mut bytes, 8, self.requested_size);
        let crc = crc32fast::hash(&bytes[..16]);
        put(&mut bytes, 16, u64::from(crc));
        bytes
    }

    /// What stands at `place`; `None` when the slot was never written, or not as a whole.
    pub(super) fn from_bytes(bytes: &[u8; LASTING_LEN], place: u64) -> Option<Self> {
        let whole = get(bytes, 16) == u64::from(crc32fast::hash(&bytes[..16]));
        let lasting = Self { seq: get(bytes, 0), requested_size: get(bytes, 8) };
        // One in the place of the other would be overwritten while it is the newest.
        (whole && lasting.place() == place).then_some(lasting)
    }

    /// The newer of two. Numbers wrap.
    pub(super) fn newest(one: Option<Self>, other: Option<Self>) -> Option<Self> {
        match (one, other) {
            (Some(a), Some(b)) if a.seq.wrapping_sub(b.seq) >> 63 == 0 => Some(a),
            (Some(_), Some(b)) => Some(b),
            _ => one.or(other),
        }
    }
}
