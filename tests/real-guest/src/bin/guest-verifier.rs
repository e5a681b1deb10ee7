//! Runs in the guest: fills memory with a pattern, verifies it in scattered order for ever, changes some of it
//! all the time, and tells of it 50 times a second.
//!
//! `guest-verifier MIB PORT`: lines `tick T pass P bad B` go to PORT. Built for the guest as a static program of this
//! one file.

use std::fs::OpenOptions;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
/// Pages that are rewritten all the time, and pages that stay zeros although they were written.
const CHANGING: usize = 1024;
const ZEROS: usize = 2048;
/// Prime, so that each pass comes to every page, and no two that follow each other.
const STEP: usize = 7919;
/// Pages that are verified between two that are changed.
const CHANGE_EVERY: usize = 16;

type Page = [u64; WORDS];

fn fill(page: &mut Page, seed: u64) {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in page {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        *word = x;
    }
}

fn is_filled(page: &Page, seed: u64) -> bool {
    let mut expected = [0; WORDS];
    fill(&mut expected, seed);
    *page == expected
}

fn changing_seed(page: usize, changes: u64) -> u64 {
    1 << 40 | (page as u64) << 20 | changes
}

fn main() {
    let mut words = std::env::args().skip(1);
    let mib: usize = words.next().and_then(|mib| mib.parse().ok()).expect("MIB");
    let port = words.next().expect("PORT");
    let pages = mib * (1 << 20) / PAGE;
    let mut pattern: Vec<Page> = vec![[0; WORDS]; pages];
    for (index, page) in pattern.iter_mut().enumerate() {
        fill(page, index as u64);
    }
    let mut changing: Vec<Page> = vec![[0; WORDS]; CHANGING];
    let mut changes = vec![0u64; CHANGING];
    for (index, page) in changing.iter_mut().enumerate() {
        fill(page, changing_seed(index, 0));
    }
    let mut zeros: Vec<Page> = vec![[1; WORDS]; ZEROS];
    zeros.iter_mut().for_each(|page| page.fill(0));

    let (pass, bad) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (passes, bads) = (Arc::clone(&pass), Arc::clone(&bad));
    thread::spawn(move || {
        let mut port = OpenOptions::new().write(true).open(port).expect("the port opens");
        for tick in 0u64.. {
            let (pass, bad) = (passes.load(Ordering::Relaxed), bads.load(Ordering::Relaxed));
            let _ = port.write_all(format!("tick {tick} pass {pass} bad {bad}\n").as_bytes());
            thread::sleep(Duration::from_millis(20));
        }
    });
    let mut next = 0;
    loop {
        for count in 0..pages {
            let index = count * STEP % pages;
            if !is_filled(&pattern[index], index as u64) {
                bad.fetch_add(1, Ordering::Relaxed);
            }
            if count % CHANGE_EVERY == 0 {
                if !is_filled(&changing[next], changing_seed(next, changes[next])) {
                    bad.fetch_add(1, Ordering::Relaxed);
                }
                changes[next] += 1;
                fill(&mut changing[next], changing_seed(next, changes[next]));
                next = (next + 1) % CHANGING;
            }
        }
        let dirty = zeros.iter().filter(|page| page.iter().any(|word| *word != 0)).count();
        bad.fetch_add(dirty as u64, Ordering::Relaxed);
        pass.fetch_add(1, Ordering::Relaxed);
    }
}
