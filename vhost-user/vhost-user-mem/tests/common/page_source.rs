//! Where the pages of a postcopy come from.

use std::collections::BTreeMap;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use migration::MigrationError;
use migration::lazy::{HandlerFailed, LazyRam, PageSource};
use ram_discard::ByteRange;

use super::PATIENCE;

/// The other host: has the pages of boot memory, and gives them away unless it is silent.
#[derive(Default)]
pub struct Source {
    pub pages: Mutex<BTreeMap<u64, Vec<u8>>>,
    pub silent: AtomicBool,
    pub asked: AtomicUsize,
}

impl PageSource for Source {
    fn request(&self, lazy: &LazyRam, block: usize, range: ByteRange) -> io::Result<()> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if !self.silent.load(Ordering::SeqCst) {
            self.give(lazy, block, range.start());
        }
        Ok(())
    }
}

impl Source {
    pub fn give(&self, lazy: &LazyRam, block: usize, offset: u64) {
        let pages = self.pages.lock().unwrap();
        lazy.place(block, offset, &pages[&offset]).unwrap();
    }

    pub fn wait_asked(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.asked.load(Ordering::SeqCst) == 0 {
            assert!(Instant::now() < deadline, "no page is asked for");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Panics where the guest would have to be stopped.
pub struct Loud;

impl HandlerFailed for Loud {
    fn handler_failed(&self, error: &MigrationError) {
        panic!("{error}");
    }
}
