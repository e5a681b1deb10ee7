//! What the bitmap of a block of 1 TiB costs (268435456 pages, 32 MiB of bitmap): masking discarded
//! memory against memset over the same bytes, and searching against a walk over all words.

#[expect(dead_code, reason = "each bench uses its part")]
mod common;

use std::hint::black_box;
use std::ops::Range;
use std::time::{Duration, Instant};

use migration::page_bitmap::PageBitmap;

use common::{compare, head, random};

const NR: u64 = 1 << 28;
/// Pages of a device block of 2 MiB.
const BLOCK: u64 = 512;
const RUNS: usize = 11;

/// Discarded runs of pages, in runs of up to `longest` blocks of `block` pages with as much between.
fn discarded(block: u64, longest: u64) -> Vec<Range<u64>> {
    let mut seed = 0x9e37_79b9_7f4a_7c15;
    let mut runs = Vec::new();
    let mut at = 0;
    while at < NR {
        let end = at + (1 + random(&mut seed) % longest) * block;
        runs.push(at..end.min(NR));
        at = end + (1 + random(&mut seed) % longest) * block;
    }
    runs
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn memset(bytes: &mut [u64]) -> Duration {
    bytes.fill(u64::MAX);
    timed(|| black_box(&mut *bytes).fill(black_box(0)))
}

fn main() {
    let mut plain = vec![0; (NR / 64) as usize];
    let mut bitmap = PageBitmap::new(NR);

    head("Masking the discarded memory of 1 TiB, all dirty before", "memset");
    for (name, runs) in [
        ("every other block of 2 MiB", discarded(BLOCK, 1)),
        ("runs of 1..8 blocks of 2 MiB", discarded(BLOCK, 8)),
        ("runs of 1..4096 blocks of 2 MiB", discarded(BLOCK, 4096)),
        ("every other block of 128 KiB", discarded(32, 1)),
        ("all", std::iter::once(0..NR).collect()),
    ] {
        let mask = || {
            bitmap.set_range(0..NR);
            timed(|| runs.iter().for_each(|run| _ = bitmap.clear_range(run.clone())))
        };
        compare(name, RUNS, mask, || memset(&mut plain));
    }

    head("Masking again, after a sync that found little", "memset");
    let runs = discarded(BLOCK, 1);
    let again = || {
        bitmap.clear_all();
        (0..1000).for_each(|at| _ = bitmap.set(at * 250_007));
        timed(|| runs.iter().for_each(|run| _ = bitmap.clear_range(run.clone())))
    };
    compare("every other block of 2 MiB, 1000 dirty pages", RUNS, again, || memset(&mut plain));

    head("Finding all runs of dirty pages", "all words");
    for (name, dirty) in [
        ("none", vec![]),
        ("1000 pages far apart", (0..1000).map(|at| at * 250_007..at * 250_007 + 1).collect()),
        ("every other block of 2 MiB", discarded(BLOCK, 1)),
        ("every other page of 4 GiB", (0..1 << 19).map(|at| 2 * at..2 * at + 1).collect()),
    ] {
        bitmap.clear_all();
        dirty.iter().for_each(|run: &Range<u64>| _ = bitmap.set_range(run.clone()));
        plain.copy_from_slice(bitmap.words());
        compare(
            name,
            RUNS,
            || timed(|| bitmap.runs(0..NR).for_each(|run| _ = black_box(run))),
            || timed(|| naive_runs(&plain, |run| _ = black_box(run))),
        );
    }
}

/// The runs, from a look at each word.
fn naive_runs(words: &[u64], mut visit: impl FnMut(Range<u64>)) {
    let mut start = None;
    for (at, &word) in (0u64..).zip(words) {
        match (word, start) {
            (0, None) | (u64::MAX, Some(_)) => continue,
            (u64::MAX, None) => start = Some(at * 64),
            (0, Some(first)) => {
                visit(first..at * 64);
                start = None;
            }
            (mut rest, _) => {
                for page in at * 64..(at + 1) * 64 {
                    match (rest & 1, start) {
                        (1, None) => start = Some(page),
                        (0, Some(first)) => {
                            visit(first..page);
                            start = None;
                        }
                        _ => {}
                    }
                    rest >>= 1;
                }
            }
        }
    }
    if let Some(first) = start {
        visit(first..words.len() as u64 * 64);
    }
}
