//! Which memory of a guest that is restored on demand has what the image has.
//!
//! A page is written once: it is claimed, written, and then filled; what asks for a page that another thread has
//! claimed waits for it. So what is read from a slow disk holds up only those who wait for that page. A claim that
//! comes to nothing is given up, and a thread that needs the page tries again.

use std::ops::Range;

use migration::page_bitmap::PageBitmap;
use parking_lot::{Condvar, Mutex};

use super::image::SavedGuest;
use super::memory::{self, Memory};
use super::metrics::{RestoreMetrics, Source};
use crate::error::PagerError;
use crate::image::PageReader;

/// Memory that is being filled.
pub(super) struct Filling<'a> {
    guest: &'a SavedGuest,
    memories: &'a [Memory],
    metrics: &'a RestoreMetrics,
    mappings: Vec<Filled>,
}

struct Filled {
    state: Mutex<State>,
    /// Claims were settled.
    changed: Condvar,
}

struct State {
    /// In the image, and neither filled nor claimed.
    outstanding: PageBitmap,
    filled: PageBitmap,
}

impl<'a> Filling<'a> {
    /// All memory of a guest. Regions of virtio-mem have all that the image has, and the rest has nothing yet.
    pub fn new(guest: &'a SavedGuest, memories: &'a [Memory], metrics: &'a RestoreMetrics) -> Self {
        let mappings = (0..memories.len()).map(|mapping| {
            let present = guest.block(mapping).present();
            let none = || PageBitmap::new(present.nr_pages());
            let mut state = State { outstanding: none(), filled: none() };
            let virtio_mem = guest.layout().mappings[mapping].virtio_mem;
            let what_it_has = if virtio_mem { &mut state.filled } else { &mut state.outstanding };
            // Run by run: what is absent is not even touched in a bitmap.
            for run in present.runs(0..present.nr_pages()) {
                what_it_has.set_range(run);
            }
            Filled { state: Mutex::new(state), changed: Condvar::new() }
        });
        Self { guest, memories, metrics, mappings: mappings.collect() }
    }

    /// The guest.
    pub fn guest(&self) -> &'a SavedGuest {
        self.guest
    }

    /// Its memory.
    pub fn memories(&self) -> &'a [Memory] {
        self.memories
    }

    /// What is measured.
    pub fn metrics(&self) -> &'a RestoreMetrics {
        self.metrics
    }

    /// Fills the first run of pages that the image has and that no thread has claimed, at most `most`; which it
    /// was, or `None` when there is none.
    ///
    /// # Errors
    ///
    /// When the image cannot be read, or there is no memory left.
    pub fn fill_next(
        &self,
        reader: &mut PageReader<'_>,
        mapping: usize,
        within: Range<u64>,
        most: u64,
        source: Source,
    ) -> Result<Option<Range<u64>>, PagerError> {
        let Filled { state, changed } = &self.mappings[mapping];
        let run = {
            let mut state = state.lock();
            let end = within.end.min(state.outstanding.nr_pages());
            let Some(run) = state.outstanding.next_run(within.start, end, most) else {
                return Ok(None);
            };
            state.outstanding.clear_range(run.clone());
            run
        };
        let written = memory::write(reader, self.guest, mapping, run.clone(), self.memories);
        let mut state = state.lock();
        match &written {
            Ok(()) => self.metrics.filled(source, state.filled.set_range(run.clone())),
            Err(_) => drop(state.outstanding.set_range(run.clone())),
        }
        drop(state);
        changed.notify_all();
        written.map(|()| Some(run))
    }

    /// Fills pages that were asked for, and waits until those are filled that others have claimed.
    ///
    /// # Errors
    ///
    /// When the image cannot be read, or there is no memory left.
    pub fn fill_whole(
        &self,
        reader: &mut PageReader<'_>,
        mapping: usize,
        pages: Range<u64>,
    ) -> Result<(), PagerError> {
        let present = self.guest.block(mapping).present();
        let Filled { state, changed } = &self.mappings[mapping];
        loop {
            while let Some(_run) =
                self.fill_next(reader, mapping, pages.clone(), u64::MAX, Source::Request)?
            {
            }
            let mut state = state.lock();
            loop {
                let mut wanted = present.runs(pages.clone()).flatten();
                let Some(page) = wanted.find(|page| !state.filled.test(*page)) else {
                    return Ok(());
                };
                if state.outstanding.test(page) {
                    // Its claim was given up.
                    break;
                }
                changed.wait(&mut state);
            }
        }
    }
}
