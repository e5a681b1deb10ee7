use std::cell::Cell;
use std::ops::Range;

use small_vmm::cloud_hypervisor::Guest;
use small_vmm::cloud_hypervisor::faults::{Asking, Trap};
use small_vmm::cloud_hypervisor::guest::{MIB, PAGE};
use small_vmm::cloud_hypervisor::receiver::Receive;

use super::ways::{Options, Saved, quick};
use crate::cloud_hypervisor::background::Background;
use crate::cloud_hypervisor::filling::Filling;
use crate::cloud_hypervisor::memory::Memory;
use crate::cloud_hypervisor::metrics::{RestoreMetrics, Source};
use crate::cloud_hypervisor::pace::Pace;
use crate::error::PagerError;
use crate::run::Run;
use crate::working_set::WorkingSet;

/// Addresses of the second mapping of boot memory.
const HIGH: u64 = 3 << 30;

fn touching(touches: &[u64]) -> Receive {
    Receive::new(true).asking(Asking { touches: touches.to_vec(), ..Asking::default() })
}

/// Runs by the id of their RAM block.
fn runs(saved: &Saved, set: &WorkingSet) -> Vec<(String, Range<u64>)> {
    let id = |block: usize| saved.image.image().blocks()[block].id().to_owned();
    set.runs().map(|(block, run)| (id(block), run)).collect()
}

#[test]
fn the_order_in_which_a_guest_touches_its_memory_is_recorded_and_replayed() {
    let guest = Guest::new();
    let saved = Saved::of(&guest);
    let path = saved.path("order");
    // A page of zeros counts as any other: the guest has touched it.
    let touches = [MIB, HIGH + MIB, 2 * MIB, 2 * MIB + PAGE];
    let options = Options { record: Some(&path), ..Options::new(false) };
    saved.restored(&options, &touching(&touches), &Run::new(None)).taken();
    let set = WorkingSet::load(&path, saved.image.image()).unwrap().expect("of this guest");
    let low = |run| ("boot/0x0".to_owned(), run);
    let high = |run| ("boot/0xc0000000".to_owned(), run);
    // The second page is touched by a device, before the guest runs.
    let expected = [low(1..2), low(256..257), high(256..257), low(512..514)];
    assert_eq!(runs(&saved, &set), expected);

    // Recorded again while it is replayed: what is new follows.
    let touches = [HIGH + MIB, HIGH + MIB + 7 * PAGE];
    let options = Options { record: Some(&path), replay: set, ..Options::new(false) };
    let found = saved.restored(&options, &touching(&touches), &Run::new(None)).taken();
    assert!(found.memory == guest.memory());
    let set = WorkingSet::load(&path, saved.image.image()).unwrap().expect("of this guest");
    assert_eq!(runs(&saved, &set), [&expected[..], &[high(263..264)]].concat());
}

#[test]
fn what_was_touched_is_recorded_also_when_the_restore_breaks_off() {
    let saved = Saved::of(&Guest::new());
    let path = saved.path("order");
    let options = Options { record: Some(&path), ..Options::new(false) };
    let asking = Asking { trap: Some(Trap::Stop), ..Asking::default() };
    let how = Receive::new(true).asking(asking);
    assert!(saved.restored(&options, &how, &quick()).done.is_err());
    let set = WorkingSet::load(&path, saved.image.image()).unwrap().expect("of this guest");
    assert_eq!(runs(&saved, &set), [("boot/0x0".to_owned(), 1..2)]);
}

/// What was filled of `guest` by a background that ends after so many looks at whether to go on.
fn filled_after(
    saved: &Saved,
    replay: &WorkingSet,
    ahead: &[(usize, Range<u64>)],
    looks: u32,
) -> Vec<(u64, u64)> {
    let image = &saved.image;
    let metrics = RestoreMetrics::new();
    let mappings = image.layout().mappings.iter();
    let memories: Vec<Memory> = mappings.map(|mapping| Memory::new(mapping).unwrap()).collect();
    let filling = Filling::new(image, &memories, &metrics);
    let background = Background::new(&filling);
    for (mapping, pages) in ahead {
        background.read_ahead(*mapping, pages.clone());
    }
    let left = Cell::new(looks);
    let ended = background.fill(replay, &Pace::new(None), &|| {
        left.set(left.get().checked_sub(1).ok_or(PagerError::Interrupted)?);
        Ok(())
    });
    assert!(matches!(ended, Ok(()) | Err(PagerError::Interrupted)));
    let pages = |source| metrics.pages(source);
    assert_eq!(pages(Source::Before) + pages(Source::Request), 0);
    let mut found = Vec::new();
    for (mapping, memory) in image.layout().mappings.iter().zip(&memories) {
        for page in 0..mapping.range.len() / PAGE {
            let mut bytes = vec![0; PAGE as usize];
            let at = mapping.file_offset + page * PAGE;
            std::os::unix::fs::FileExt::read_exact_at(memory.file(), &mut bytes, at).unwrap();
            if bytes.iter().any(|byte| *byte != 0) {
                found.push((mapping.range.start(), page));
            }
        }
    }
    let total: u64 =
        [Source::ReadAhead, Source::Replay, Source::Background].map(pages).iter().sum();
    assert_eq!(total, found.len() as u64);
    found
}

#[test]
fn what_was_touched_first_is_filled_first_and_what_is_being_touched_before_it() {
    let guest = Guest::new();
    let saved = Saved::of(&guest);
    let block = |id: &str| {
        let mut blocks = saved.image.image().blocks().iter();
        blocks.position(|block| block.id() == id).unwrap()
    };
    let mut replay = WorkingSet::default();
    replay.push(block("boot/0xc0000000"), 511..512);
    replay.push(block("boot/0x0"), 1023..1024);
    // Plugged blocks were filled before, and may have been written to by the guest since.
    replay.push(block("hot/vmem/0x100000000"), 0..2000);
    // Of another size than the image's, as a damaged file could have it.
    replay.push(99, 0..1);
    let mut after = Vec::new();
    for looks in 0..12 {
        let found = filled_after(&saved, &replay, &[], looks);
        if after.last() != Some(&found) {
            after.push(found);
        }
    }
    let first = vec![(HIGH, 511)];
    let second = vec![(0, 1023), (HIGH, 511)];
    assert_eq!(after[..3], [vec![], first, second.clone()]);
    // All of boot memory in the end, ascending, and nothing of virtio-mem.
    let low = vec![(0, 0), (0, 1), (0, 1023), (HIGH, 511)];
    let all = vec![(0, 0), (0, 1), (0, 1023), (HIGH, 0), (HIGH, 511)];
    assert_eq!(after[3..], [low, all]);
    // The newest of what is read ahead comes before all else.
    let ahead = [(0, 0..2), (1, 0..1)];
    assert_eq!(filled_after(&saved, &replay, &ahead, 1), [(HIGH, 0)]);
    assert_eq!(filled_after(&saved, &replay, &ahead, 2), [(0, 0), (0, 1), (HIGH, 0)]);
    assert_eq!(filled_after(&saved, &replay, &ahead, 100).len(), 5);
}
