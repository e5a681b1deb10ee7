//! Records that must be refused by name.

use super::*;
use MemoryState::{Discarded, Populated};

fn change(number: u32, state: MemoryState, block: &str, ranges: &[(u64, u64)]) -> BlockStateChange {
    let range = |&(start, end)| ByteRange::from_bounds(start * PAGE, end * PAGE).unwrap();
    let ranges = ranges.iter().map(range).collect();
    BlockStateChange { number, state, block: block.to_owned(), ranges }
}

#[test]
fn changes_of_block_state_that_are_not_possible_are_refused_by_name() {
    let end = BLOCKS as u64 * PAGES;
    for (change, reason) in [
        (change(2, Populated, "vmem0", &[(0, PAGES)]), "change 2 of block state, where 1 is due"),
        (change(1, Populated, "vmem1", &[(0, PAGES)]), "\"vmem1\": it is not in the list"),
        (change(1, Populated, "ram", &[(0, PAGES)]), "\"ram\": nothing of it is ever discarded"),
        (change(1, Populated, "vmem0", &[(0, end + PAGES)]), "is past its end"),
        (change(1, Populated, "vmem0", &[(0, PAGES + 1)]), "not made of units of 0x40000 bytes"),
        (change(1, Discarded, "vmem0", &[(PAGES + 1, 2 * PAGES)]), "not made of units"),
        (
            change(1, Populated, "vmem0", &[(0, 2 * PAGES)]),
            "to be populated, and a part of it is already",
        ),
        (
            change(1, Discarded, "vmem0", &[(PAGES, 3 * PAGES)]),
            "was discarded, and a part of it was before",
        ),
        // Also the last of several.
        (
            change(1, Populated, "vmem0", &[(0, PAGES), (PAGES, 2 * PAGES)]),
            "a part of it is already",
        ),
    ] {
        let mut pair = patient(&[1]);
        let refused = pair.load.block_state(&change, 0x77).unwrap_err().to_string();
        assert!(refused.contains(reason) && refused.contains("0x77"), "{refused}");
        assert!((0..BLOCKS).all(|block| pair.to.device().is_plugged(block) == (block == 1)));
    }
}

#[test]
fn of_several_ranges_that_cannot_all_be_populated_none_is() {
    let mut pair = patient(&[1]);
    *pair.to.device().refuses.lock().unwrap() = Some(5);
    let ranges = [(3 * PAGES, 4 * PAGES), (5 * PAGES, 6 * PAGES)];
    let refused = pair.load.block_state(&change(1, Populated, "vmem0", &ranges), 0).unwrap();
    assert_eq!(refused.as_deref(), Some("no huge page is left"));
    assert!(!pair.to.device().is_plugged(3));
}

#[test]
fn an_answer_to_what_was_not_sent_is_none() {
    let mut pair = patient(&[1]);
    assert!(!pair.save.answered(1, None).unwrap());
    pair.step(Op::Request { block: 4, plug: true });
    assert!(!pair.save.answered(1, None).unwrap(), "it was answered");
    pair.switch().unwrap();
}

#[test]
fn what_the_destination_cannot_have_discarded_is_refused_by_name() {
    let mut pair = patient(&[1]);
    pair.freeze();
    pair.save.outstanding().unwrap();
    let end = BLOCKS as u64 * BLOCK;
    for (block, start, len) in
        [("other", 0, PAGE), ("vmem0", 0, PAGE / 2), ("vmem0", 100, PAGE), ("vmem0", end, PAGE)]
    {
        let range = ByteRange::new(start, len).unwrap();
        let refused = pair.save.discarded(block, range).unwrap_err().to_string();
        assert!(refused.contains(block) && refused.contains("discarded"), "{refused}");
    }
}
