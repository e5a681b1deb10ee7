mod host_starts;

use super::*;
use proptest::prelude::*;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use tempfile::TempDir;

const BLOCK: u64 = 4096;
const NR: u64 = 200;

fn geometry() -> Geometry {
    Geometry { addr: 1 << 32, region_size: NR * BLOCK, block_size: BLOCK, node_id: None }
}

struct Rig {
    dir: TempDir,
}

impl Rig {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn create(&self) -> StateFile {
        StateFile::create(&self.path(), &geometry(), 0, 0).unwrap()
    }

    fn open(&self) -> Result<Saved, StateFileError> {
        StateFile::open(&self.path(), &geometry()).map(|(_, saved)| saved)
    }

    fn open_file(&self) -> StateFile {
        StateFile::open(&self.path(), &geometry()).unwrap().0
    }

    fn mode(&self) -> u32 {
        std::fs::metadata(self.path()).unwrap().permissions().mode() & 0o777
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap()
    }

    fn set_bytes(&self, bytes: &[u8]) {
        std::fs::write(self.path(), bytes).unwrap();
    }
}

fn commit(delta: Delta, requested_size: u64) -> Commit<'static> {
    Commit {
        requested_size,
        usable_region_size: NR * BLOCK,
        api_migration: false,
        reset_pending: false,
        delta,
        journal: JournalUpdate::Record(&[7; 24]),
    }
}

const SET: Delta = Delta::Set { first_block: 3, nr_blocks: 130 };

#[test]
fn what_was_committed_is_found_again() {
    let rig = Rig::new();
    let mut file = rig.create();
    file.commit(&commit(SET, 5 * BLOCK)).unwrap();
    file.commit(&commit(Delta::Clear { first_block: 64, nr_blocks: 1 }, BLOCK)).unwrap();
    drop(file);
    let saved = rig.open().unwrap();
    assert_eq!((saved.requested_size, saved.plugged_blocks), (BLOCK, 129));
    assert_eq!(saved.plugged, [u64::MAX << 3, u64::MAX - 1, 0b11111, 0]);
    assert_eq!(saved.journal, Some(JournalEntry { request: [7; 24], answered: false }));
}

#[test]
fn an_answered_request_is_remembered_as_answered_until_the_next() {
    let rig = Rig::new();
    let mut file = rig.create();
    file.commit(&commit(SET, 0)).unwrap();
    file.mark_answered().unwrap();
    let keep = Commit { journal: JournalUpdate::Keep, ..commit(Delta::None, BLOCK) };
    file.commit(&keep).unwrap();
    drop(file);
    assert!(rig.open().unwrap().journal.unwrap().answered);
    let (mut file, _) = StateFile::open(&rig.path(), &geometry()).unwrap();
    file.commit(&commit(Delta::ClearAll, 0)).unwrap();
    drop(file);
    assert!(!rig.open().unwrap().journal.unwrap().answered);
}

#[test]
fn a_file_in_use_is_refused() {
    let rig = Rig::new();
    let _file = rig.create();
    assert!(matches!(rig.open(), Err(StateFileError::InUse(_))));
}

#[test]
fn a_lock_that_cannot_be_had_is_told_from_one_that_is_held() {
    let rig = Rig::new();
    drop(rig.create());
    let file = File::open(rig.path()).unwrap();
    let path_only = rustix::fs::OFlags::PATH;
    let no_lock = rustix::fs::open(rig.path(), path_only, rustix::fs::Mode::empty()).unwrap();
    let error = lock(&File::from(no_lock), &rig.path()).unwrap_err();
    assert!(matches!(error, StateFileError::NotLocked { .. }), "{error}");
    assert!(error.to_string().contains("cannot be locked"), "{error}");
    let _held = rig.open_file();
    assert!(matches!(lock(&file, &rig.path()), Err(StateFileError::InUse(_))));
}

#[test]
fn other_geometries_are_refused_by_name_and_left_alone() {
    let rig = Rig::new();
    drop(rig.create());
    let before = rig.bytes();
    for (changed, name) in [
        (Geometry { addr: 0, ..geometry() }, "addr"),
        (Geometry { region_size: 2 * NR * BLOCK, ..geometry() }, "region_size"),
        (Geometry { block_size: 2 * BLOCK, ..geometry() }, "block_size"),
        (Geometry { node_id: Some(0), ..geometry() }, "node_id"),
    ] {
        match StateFile::open(&rig.path(), &changed) {
            Err(StateFileError::Geometry { field, .. }) => assert_eq!(field, name),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(rig.bytes(), before);
}

#[test]
fn a_newer_version_is_refused_and_left_alone() {
    let rig = Rig::new();
    drop(rig.create());
    let mut bytes = rig.bytes();
    bytes[8] = 3;
    rig.set_bytes(&bytes);
    assert!(matches!(rig.open(), Err(StateFileError::Newer { found: 3, known: 2, .. })));
    assert_eq!(rig.bytes(), bytes);
}

#[test]
fn a_file_cut_anywhere_or_with_a_tail_is_refused() {
    let rig = Rig::new();
    let mut file = rig.create();
    file.commit(&commit(SET, 0)).unwrap();
    drop(file);
    let bytes = rig.bytes();
    for len in (0..bytes.len()).step_by(61).chain([bytes.len() - 1]) {
        rig.set_bytes(&bytes[..len]);
        assert!(rig.open().is_err(), "{len}");
    }
    rig.set_bytes(&[&bytes[..], &[0]].concat());
    assert!(rig.open().is_err());
}

#[test]
fn a_flipped_bit_is_refused_or_changes_nothing() {
    let rig = Rig::new();
    let mut file = rig.create();
    file.commit(&commit(SET, 0)).unwrap();
    file.commit(&commit(Delta::Clear { first_block: 70, nr_blocks: 2 }, 0)).unwrap();
    drop(file);
    let good = rig.open().unwrap();
    let bytes = rig.bytes();
    // The rest of each page is not read.
    for at in (0..bytes.len()).filter(|at| at % 4096 < 160) {
        for bit in [0, 3, 7] {
            let mut broken = bytes.clone();
            broken[at] ^= 1 << bit;
            rig.set_bytes(&broken);
            if let Ok(saved) = rig.open() {
                assert_eq!(saved, good, "byte {at} bit {bit}");
            }
        }
    }
}

#[test]
fn a_whole_new_state_takes_the_place_of_the_old() {
    let rig = Rig::new();
    let mut file = rig.create();
    file.commit(&commit(SET, BLOCK)).unwrap();
    let words = [1, 0, u64::MAX, 1 << 7];
    let forget = Commit { journal: JournalUpdate::Forget, ..commit(Delta::None, 7 * BLOCK) };
    std::fs::set_permissions(rig.path(), Permissions::from_mode(0o640)).unwrap();
    file.replace(&forget, &words).unwrap();
    assert!(matches!(rig.open(), Err(StateFileError::InUse(_))), "the new file is locked too");
    assert_eq!(std::fs::read_dir(rig.dir.path()).unwrap().count(), 1);
    assert_eq!(rig.mode(), 0o640);
    file.commit(&commit(Delta::Set { first_block: 1, nr_blocks: 1 }, 8 * BLOCK)).unwrap();
    drop(file);
    let saved = rig.open().unwrap();
    assert_eq!((saved.requested_size, saved.plugged_blocks), (8 * BLOCK, 67));
    assert_eq!(saved.plugged, [3, 0, u64::MAX, 1 << 7]);
}

#[test]
fn a_new_state_that_cannot_be_written_leaves_the_old() {
    let rig = Rig::new();
    let mut file = rig.create();
    file.commit(&commit(SET, BLOCK)).unwrap();
    let before = rig.bytes();
    assert!(file.replace(&commit(Delta::None, 0), &[0; 3]).is_err(), "too few words");
    let moved = rig.dir.path().with_extension("moved");
    std::fs::rename(rig.dir.path(), &moved).unwrap();
    assert!(file.replace(&commit(Delta::None, 0), &[0; 4]).is_err());
    std::fs::rename(&moved, rig.dir.path()).unwrap();
    assert_eq!(rig.bytes(), before);
    file.commit(&commit(Delta::ClearAll, 0)).unwrap();
    drop(file);
    assert_eq!(rig.open().unwrap().plugged_blocks, 0);
}

/// The device may refuse what was saved, and the file is to be left as it was then.
#[test]
fn unplugging_everything_writes_the_pages_of_the_bitmap_that_change() {
    let rig = Rig::new();
    let blocks_a_page = 4096 * 8;
    let geometry = Geometry { region_size: 4 * blocks_a_page * BLOCK, ..geometry() };
    let mut file = StateFile::create(&rig.path(), &geometry, 0, 0).unwrap();
    for first_block in [5, blocks_a_page - 1, 3 * blocks_a_page] {
        file.commit(&commit(Delta::Set { first_block, nr_blocks: 2 }, 0)).unwrap();
    }
    // A mark in the page that holds nothing, to be found again.
    let third = BITMAP + 2 * 4096;
    file.file.write_all_at(&[0xff], third).unwrap();
    file.commit(&commit(Delta::ClearAll, 0)).unwrap();
    let bytes = rig.bytes();
    let set: Vec<usize> = (BITMAP as usize..bytes.len()).filter(|&at| bytes[at] != 0).collect();
    assert_eq!(set, [third as usize]);
    drop(file);
    let (_, saved) = StateFile::open(&rig.path(), &geometry).unwrap();
    assert!(saved.plugged_blocks == 0 && saved.plugged.iter().all(|&word| word == 0));
}

#[test]
fn opening_a_file_that_a_kill_left_half_written_changes_nothing_of_it() {
    let rig = Rig::new();
    let mut file = rig.create();
    file.commit(&commit(SET, 0)).unwrap();
    drop(file);
    let mut bytes = rig.bytes();
    bytes[usize::try_from(BITMAP).unwrap()..].fill(0);
    rig.set_bytes(&bytes);
    assert_eq!(rig.open().unwrap().plugged_blocks, 130);
    assert_eq!(rig.bytes(), bytes);
    let (mut file, _) = StateFile::open(&rig.path(), &geometry()).unwrap();
    file.commit(&commit(Delta::Clear { first_block: 150, nr_blocks: 1 }, 0)).unwrap();
    drop(file);
    assert_eq!(rig.open().unwrap().plugged_blocks, 130);
}

/// The file with its two commits as these numbers, each at the place that is given for it.
fn numbered(bytes: &[u8], at: [(u64, u64); 2]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for (place, seq) in at {
        let slot = Slot { seq, ..Slot::default() };
        bytes[place as usize..][..layout::SLOT_LEN].copy_from_slice(&slot.to_bytes());
    }
    bytes
}

#[test]
fn commits_of_any_number_that_are_accepted_are_so_after_each_further_commit() {
    let rig = Rig::new();
    drop(rig.create());
    let made = rig.bytes();
    let largest = u64::MAX;
    for seq in [1, 2, 3, 1 << 62, (1 << 62) + 1, 1 << 63, largest - 1, largest, 0] {
        let places = [(SLOTS[0], seq), (SLOTS[1], seq.wrapping_sub(1))];
        let [even, odd] =
            if seq % 2 == 0 { places } else { [(SLOTS[1], seq), (SLOTS[0], seq - 1)] };
        rig.set_bytes(&numbered(&made, [even, odd]));
        for (size, delta) in [(1, SET), (2, Delta::ClearAll), (3, SET), (4, Delta::None)] {
            let mut file = rig.open_file();
            file.commit(&commit(delta, size * BLOCK)).unwrap();
            drop(file);
            assert_eq!(rig.open().unwrap().requested_size, size * BLOCK, "{seq}");
        }
        assert_eq!(rig.open().unwrap().plugged_blocks, 130, "{seq}");
    }
}

#[test]
fn commits_in_each_others_place_are_refused() {
    let rig = Rig::new();
    drop(rig.create());
    let made = rig.bytes();
    for at in [[(SLOTS[0], 1), (SLOTS[1], 2)], [(SLOTS[0], 3), (SLOTS[1], 2)]] {
        rig.set_bytes(&numbered(&made, at));
        let error = rig.open().unwrap_err().to_string();
        assert!(error.contains("place of the other"), "{error}");
    }
}

#[test]
fn a_change_past_the_end_of_the_region_is_not_committed() {
    let rig = Rig::new();
    let mut file = rig.create();
    let before = rig.bytes();
    // Within the last word of the bitmap.
    for delta in [
        Delta::Set { first_block: NR, nr_blocks: 1 },
        Delta::Set { first_block: NR - 1, nr_blocks: 2 },
        Delta::Clear { first_block: NR - 1, nr_blocks: 2 },
    ] {
        file.commit(&commit(delta, BLOCK)).unwrap_err();
        assert_eq!(rig.bytes(), before);
    }
}

#[test]
fn a_link_to_a_file_that_is_not_made_yet_stays_one() {
    let rig = Rig::new();
    let link = rig.dir.path().join("link");
    std::os::unix::fs::symlink("middle", &link).unwrap();
    std::os::unix::fs::symlink(rig.path(), rig.dir.path().join("middle")).unwrap();
    let mut file = StateFile::create(&link, &geometry(), BLOCK, NR * BLOCK).unwrap();
    file.commit(&commit(SET, BLOCK)).unwrap();
    file.replace(&commit(Delta::None, 2 * BLOCK), &[1, 0, 0, 0]).unwrap();
    drop(file);
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(rig.open().unwrap().plugged_blocks, 1);
}

#[test]
fn only_the_owner_may_read_a_new_file() {
    let rig = Rig::new();
    let _file = rig.create();
    assert_eq!(rig.mode(), 0o600);
}

#[test]
fn a_state_in_memory_is_continued_from_its_file() {
    let mut file = StateFile::in_memory(&geometry(), BLOCK, NR * BLOCK).unwrap();
    let current = file.current();
    file.commit(&commit(SET, 5 * BLOCK)).unwrap();
    let next = |current: &Current| {
        let left = current.current().try_clone().unwrap();
        StateFile::continue_with(left, None, &geometry()).unwrap()
    };
    assert_eq!(next(&current).1.plugged_blocks, 130);
    file.replace(&commit(Delta::None, BLOCK), &[3, 0, 0, 0]).unwrap();
    let (mut file, saved) = next(&current);
    assert_eq!((saved.plugged_blocks, saved.requested_size), (2, BLOCK));
    file.commit(&commit(Delta::ClearAll, BLOCK)).unwrap();
    assert_eq!(next(&current).1.plugged_blocks, 0);
}

/// What a kill may leave of a commit's writes: the slot whole or not at all, and then any part of
/// the bitmap's words.
fn images(before: &[u8], after: &[u8]) -> Vec<(Vec<u8>, bool)> {
    let bitmap = usize::try_from(BITMAP).unwrap();
    let lasting = usize::try_from(LASTING[0]).unwrap();
    // The synced size is the first to be written.
    let synced = [&before[..lasting], &after[lasting..bitmap], &before[bitmap..]].concat();
    let mut images = vec![(before.to_vec(), false), (synced, false), (after.to_vec(), true)];
    for cut in (bitmap..=after.len()).step_by(4) {
        let image = [&after[..bitmap], &after[bitmap..cut], &before[cut..]].concat();
        images.push((image, true));
    }
    images
}

fn any_delta() -> impl Strategy<Value = Delta> {
    let span = (0..NR).prop_flat_map(|first| (Just(first), 1..=NR - first));
    prop_oneof![
        1 => Just(Delta::None),
        4 => span.clone().prop_map(|(first_block, nr_blocks)| Delta::Set { first_block, nr_blocks }),
        4 => span.prop_map(|(first_block, nr_blocks)| Delta::Clear { first_block, nr_blocks }),
        1 => Just(Delta::ClearAll),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_kill_at_any_write_leaves_the_state_before_or_after(
        deltas in prop::collection::vec(any_delta(), 1..6),
    ) {
        let rig = Rig::new();
        let mut file = rig.create();
        let mut model = vec![false; usize::try_from(NR).unwrap()];
        for (step, delta) in deltas.into_iter().enumerate() {
            let before_model = model.clone();
            let before = rig.bytes();
            file.commit(&commit(delta, step as u64 * BLOCK)).unwrap();
            let range = |first: u64, nr: u64| {
                usize::try_from(first).unwrap()..usize::try_from(first + nr).unwrap()
            };
            match delta {
                Delta::None => {}
                Delta::Set { first_block, nr_blocks } => {
                    model[range(first_block, nr_blocks)].fill(true);
                }
                Delta::Clear { first_block, nr_blocks } => {
                    model[range(first_block, nr_blocks)].fill(false);
                }
                Delta::ClearAll => model.fill(false),
            }
            let after = rig.bytes();
            let copy = Rig::new();
            for (image, committed) in images(&before, &after) {
                copy.set_bytes(&image);
                let saved = copy.open().unwrap();
                let expected = if committed { &model } else { &before_model };
                let bit = |i: usize| saved.plugged[i / 64] >> (i % 64) & 1 == 1;
                prop_assert!((0..expected.len()).all(|i| bit(i) == expected[i]));
                copy.open().unwrap();
            }
        }
    }

    #[test]
    fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..20000)) {
        let rig = Rig::new();
        rig.set_bytes(&bytes);
        prop_assert!(rig.open().is_err());
        prop_assert_eq!(rig.bytes(), bytes);
    }
}

#[test]
fn what_a_killed_daemon_left_beside_the_file_is_removed_at_the_next_start_and_nothing_else() {
    let rig = Rig::new();
    drop(rig.create());
    let beside = |name: &str| rig.dir.path().join(name);
    let (empty, whole) = ("state.new-0000000000000000", "state.new-00000000000000ff");
    let (linked, making) = ("state.new-1111111111111111", "state.new-2222222222222222");
    let (other, folder) = ("other.new-0000000000000000", "state.new-3333333333333333");
    let leave = || {
        std::fs::write(beside(empty), "").unwrap();
        std::fs::copy(rig.path(), beside(whole)).unwrap();
        let _ = std::fs::hard_link(rig.path(), beside(linked));
    };
    std::fs::write(beside(making), "").unwrap();
    let locked = File::open(beside(making)).unwrap();
    lock(&locked, &beside(making)).unwrap();
    std::fs::write(beside(other), "").unwrap();
    std::fs::create_dir(beside(folder)).unwrap();
    let found = || {
        let entries = std::fs::read_dir(rig.dir.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort_unstable();
        names
    };
    leave();
    let held = rig.open_file();
    assert_eq!(found(), [other, "state", making, folder]);
    // While the file is held, a second daemon removes nothing.
    leave();
    assert!(matches!(rig.open(), Err(StateFileError::InUse(_))));
    assert_eq!(found().len(), 7);
    drop(held);
    // Also where a killed daemon did not get to name its file.
    std::fs::remove_file(rig.path()).unwrap();
    std::fs::remove_file(beside(linked)).unwrap();
    let file = rig.create();
    assert_eq!(found(), [other, "state", making, folder]);
    drop((file, locked));
    assert_eq!(rig.open().unwrap().plugged_blocks, 0);
    assert_eq!(found(), [other, "state", folder]);
}
