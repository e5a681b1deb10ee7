//! What a start of the host leaves of a state.

use super::*;

const OTHER_BOOT: BootId = BootId([7; 16]);

/// What a file of another boot is taken for: a new device with a requested size.
fn assert_new(saved: &Saved, requested_size: u64) {
    assert!(saved.other_boot && !saved.api_migration && !saved.reset_pending);
    assert_eq!((saved.requested_size, saved.plugged_blocks), (requested_size, 0));
    assert!(saved.plugged.iter().all(|&word| word == 0) && saved.journal.is_none());
}

#[test]
fn after_a_start_of_the_host_only_the_requested_size_is_left() {
    let rig = Rig::new();
    let mut file = rig.create();
    let busy = Commit { api_migration: true, reset_pending: true, ..commit(SET, 5 * BLOCK) };
    file.commit(&busy).unwrap();
    drop(file);
    let bytes = rig.bytes();
    // Whatever reached the disk of what is not synced.
    let lost = |from: u64, to: u64| {
        let mut bytes = bytes.clone();
        bytes[from as usize..to as usize].fill(0xa5);
        bytes
    };
    let (first, second) = (lost(SLOTS[0], SLOTS[1]), lost(SLOTS[1], layout::ANSWERED));
    for bytes in [bytes.clone(), first, second, lost(BITMAP, BITMAP + 16)] {
        rig.set_bytes(&bytes);
        let (mut file, saved) = StateFile::open_in(&rig.path(), &geometry(), OTHER_BOOT).unwrap();
        assert_new(&saved, 5 * BLOCK);
        assert_eq!(rig.bytes(), bytes, "opening changes nothing");
        file.commit(&commit(Delta::Set { first_block: 1, nr_blocks: 2 }, 5 * BLOCK)).unwrap();
        drop(file);
        let (_, saved) = StateFile::open_in(&rig.path(), &geometry(), OTHER_BOOT).unwrap();
        assert!(!saved.other_boot && !saved.api_migration && !saved.reset_pending);
        assert_eq!((saved.plugged_blocks, saved.plugged[0]), (2, 0b110));
        assert_new(&rig.open().unwrap(), 5 * BLOCK);
    }
}

#[test]
fn a_synced_size_that_is_torn_is_the_one_before() {
    let rig = Rig::new();
    let mut file = rig.create();
    for blocks in 1..4 {
        file.commit(&commit(Delta::None, blocks * BLOCK)).unwrap();
    }
    drop(file);
    let bytes = rig.bytes();
    let open = |bytes: &[u8]| {
        rig.set_bytes(bytes);
        StateFile::open_in(&rig.path(), &geometry(), OTHER_BOOT).map(|(_, saved)| saved)
    };
    assert_new(&open(&bytes).unwrap(), 3 * BLOCK);
    let torn = |slots: &[u64]| {
        let mut bytes = bytes.clone();
        slots.iter().for_each(|&at| bytes[at as usize + 9] ^= 1);
        bytes
    };
    // The file was made with the first, so the third size is the fourth of them.
    assert_new(&open(&torn(&[LASTING[0]])).unwrap(), 2 * BLOCK);
    assert_new(&open(&torn(&[LASTING[1]])).unwrap(), 3 * BLOCK);
    assert!(open(&torn(&LASTING)).is_err());
    rig.set_bytes(&torn(&LASTING));
    let (mut file, _) = StateFile::open(&rig.path(), &geometry()).unwrap();
    file.commit(&commit(Delta::None, 3 * BLOCK)).unwrap();
    drop(file);
    assert_new(&open(&rig.bytes()).unwrap(), 3 * BLOCK);
}

#[test]
fn the_newest_synced_size_is_found_at_any_number_and_only_in_its_place() {
    let rig = Rig::new();
    drop(rig.create());
    let made = rig.bytes();
    let open = |lastings: [(u64, u64, u64); 2]| {
        let mut bytes = made.clone();
        for (place, seq, requested_size) in lastings {
            let lasting = Lasting { seq, requested_size }.to_bytes();
            bytes[place as usize..][..layout::LASTING_LEN].copy_from_slice(&lasting);
        }
        rig.set_bytes(&bytes);
        StateFile::open_in(&rig.path(), &geometry(), OTHER_BOOT)
    };
    for seq in [2, 1 << 62, (1 << 62) + 2, 1 << 63, u64::MAX - 1, 0] {
        let older = seq.wrapping_sub(1);
        let (mut file, saved) =
            open([(LASTING[0], seq, 2 * BLOCK), (LASTING[1], older, BLOCK)]).unwrap();
        assert_eq!(saved.requested_size, 2 * BLOCK, "{seq}");
        file.commit(&commit(Delta::None, 3 * BLOCK)).unwrap();
        drop(file);
        let again = BootId([0x77; 16]);
        let (_, saved) = StateFile::open_in(&rig.path(), &geometry(), again).unwrap();
        assert_eq!(saved.requested_size, 3 * BLOCK, "{seq}");
    }
    let (_, saved) = open([(LASTING[0], 5, 2 * BLOCK), (LASTING[1], 3, BLOCK)]).unwrap();
    assert_eq!(saved.requested_size, BLOCK);
}
