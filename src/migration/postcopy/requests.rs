//! What the destination asked for and told, between the thread that hears it and the one that
//! sends.

use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::ByteRange;

/// Requests that wait for the next write on the main channel.
#[derive(Default)]
pub(super) struct Requests {
    told: Mutex<Told>,
    changed: Condvar,
}

/// What was told since the last look.
#[derive(Default)]
pub(super) struct Told {
    /// Pages asked for, of a block.
    pub(super) pages: Vec<(String, ByteRange)>,
    /// The destination has everything.
    pub(super) done: bool,
    /// Nothing more will be told.
    pub(super) closed: bool,
}

impl Requests {
    pub(super) fn push(&self, block: String, range: ByteRange) {
        self.told.lock().pages.push((block, range));
        self.changed.notify_all();
    }

    pub(super) fn done(&self) {
        self.told.lock().done = true;
        self.changed.notify_all();
    }

    pub(super) fn close(&self) {
        self.told.lock().closed = true;
        self.changed.notify_all();
    }

    /// What was asked for so far; with nothing to tell, waits for up to `patience`.
    pub(super) fn wait(&self, patience: Duration) -> Told {
        let mut told = self.told.lock();
        if !patience.is_zero() && told.pages.is_empty() && !told.closed {
            self.changed.wait_for(&mut told, patience);
        }
        let pages = std::mem::take(&mut told.pages);
        Told { pages, done: told.done, closed: told.closed }
    }

    /// Waits until the destination has everything, or cannot say so any more.
    pub(super) fn wait_for_end(&self) -> Told {
        let mut told = self.told.lock();
        while !told.done && !told.closed {
            self.changed.wait_for(&mut told, Duration::from_secs(1));
        }
        Told { pages: Vec::new(), done: told.done, closed: told.closed }
    }
}
