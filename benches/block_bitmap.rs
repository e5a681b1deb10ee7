//! What requests and replays cost in a region of 1 TiB with blocks of 2 MiB (524288 blocks),
//! against the naive walk over one `bool` a block.

#[expect(dead_code, reason = "each bench uses its part")]
mod common;

use std::hint::black_box;
use std::ops::Range;

use virtio_mem::device::BlockBitmap;

use common::{compare, head, random, time};

const NR: usize = 524_288;
const RUNS: usize = 11;

fn states() -> [(&'static str, Vec<bool>); 5] {
    let mut seed = 0x9e37_79b9_7f4a_7c15;
    let mut long = vec![false; NR];
    let mut at = 0;
    let mut plugged = true;
    while at < NR {
        let len = 1 + usize::try_from(random(&mut seed) % 4096).unwrap();
        let end = (at + len).min(NR);
        long[at..end].fill(plugged);
        plugged = !plugged;
        at = end;
    }
    [
        ("all plugged", vec![true; NR]),
        ("1 GiB plugged", (0..NR).map(|block| block < 512).collect()),
        ("runs of 1..4096", long),
        ("random", (0..NR).map(|_| random(&mut seed).is_multiple_of(2)).collect()),
        ("alternating", (0..NR).map(|block| block % 2 == 0).collect()),
    ]
}

fn bitmap(model: &[bool]) -> BlockBitmap {
    let mut bitmap = BlockBitmap::new(model.len());
    for (block, _) in model.iter().enumerate().filter(|(_, plugged)| **plugged) {
        bitmap.set(block..block + 1, true);
    }
    bitmap
}

fn naive_replay(model: &[bool], plugged: bool, mut visit: impl FnMut(Range<usize>)) {
    let mut start = None;
    for (block, &state) in model.iter().enumerate() {
        match (start, state == plugged) {
            (None, true) => start = Some(block),
            (Some(first), false) => {
                visit(first..block);
                start = None;
            }
            _ => {}
        }
    }
    if let Some(first) = start {
        visit(first..model.len());
    }
}

fn main() {
    head("Replays of a 1 TiB region", "Vec<bool>");
    for (name, model) in states() {
        let bitmap = bitmap(&model);
        for (kind, plugged) in [("populated", true), ("discarded", false)] {
            compare(
                &format!("replay_{kind}, {name}"),
                RUNS,
                || time(4, || bitmap.runs(0..NR, plugged).for_each(|run| _ = black_box(run))),
                || time(4, || naive_replay(&model, plugged, |run| _ = black_box(run))),
            );
        }
    }
    head("Requests", "Vec<bool>");
    for nr in [1, 64, 32768] {
        let at = 100_003;
        let mut bits = BlockBitmap::new(NR);
        let mut model = vec![false; NR];
        compare(
            &format!("PLUG then UNPLUG of {nr} blocks, with their checks"),
            RUNS,
            || {
                time(64, || {
                    for plugged in [true, false] {
                        assert!(black_box(&bits).all(at..at + nr, !plugged));
                        bits.set(at..at + nr, plugged);
                    }
                })
            },
            || {
                time(64, || {
                    for plugged in [true, false] {
                        assert!(black_box(&model)[at..at + nr].iter().all(|&p| p != plugged));
                        model[at..at + nr].iter_mut().for_each(|p| *p = black_box(plugged));
                    }
                })
            },
        );
        bits.set(at..at + nr, true);
        model[at..at + nr].fill(true);
        compare(
            &format!("STATE of {nr} blocks"),
            RUNS,
            || time(64, || assert!(black_box(&bits).all(at..at + nr, true))),
            || time(64, || assert!(black_box(&model)[at..at + nr].iter().all(|&p| black_box(p)))),
        );
    }
}
