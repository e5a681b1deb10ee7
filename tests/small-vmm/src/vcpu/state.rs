//! What vCPUs know, to be moved to another VMM.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Given, Vcpus, Written};
use crate::memory::PAGE_SIZE;

/// What the vCPUs use and what they wrote there. Addresses are guest-physical.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VcpuState {
    /// The id that the next range gets.
    pub next_id: u64,
    /// The ranges in use, ascending.
    pub given: Vec<GivenState>,
    /// What was written last, by page, ascending; also of pages that are not in use any more.
    pub pages: Vec<PageState>,
}

/// A range in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GivenState {
    /// First address.
    pub start: u64,
    /// Behind the last address.
    pub end: u64,
    /// What tells it from the same range at another time.
    pub id: u64,
    /// Pages of it that were written at least once.
    pub first_writes: u64,
}

/// What was written to a page last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageState {
    /// Address of the page.
    pub page: u64,
    /// The range it belonged to.
    pub id: u64,
    /// How often it was written, in the way of [`stamp`](crate::memory::stamp).
    pub generation: u64,
}

impl Vcpus {
    /// What the threads know. They must be paused, or it is of no single moment.
    pub fn state(&self) -> VcpuState {
        let usage = self.shared.usage();
        let given = usage.given.iter().map(|(start, entry)| GivenState {
            start: *start,
            end: entry.end,
            id: entry.id,
            first_writes: entry.first_writes.load(Ordering::Relaxed),
        });
        let mut pages = Vec::new();
        for index in 0..self.shared.pages.len() {
            let of_thread = self.shared.pages(index);
            pages.extend(of_thread.iter().map(|(page, written)| PageState {
                page: *page,
                id: written.id,
                generation: written.generation,
            }));
        }
        pages.sort_unstable_by_key(|page| page.page);
        VcpuState {
            next_id: self.shared.next_id.load(Ordering::Relaxed),
            given: given.collect(),
            pages,
        }
    }

    /// Goes on with what other threads know, also if they were more or fewer. The threads must be
    /// paused.
    ///
    /// # Errors
    ///
    /// What makes no sense; nothing has changed then.
    pub fn take_over(&self, state: VcpuState) -> Result<(), String> {
        self.check(&state)?;
        let mut usage = self.shared.usage_mut();
        usage.given = state
            .given
            .iter()
            .map(|given| {
                let first_writes = Arc::new(AtomicU64::new(given.first_writes));
                (given.start, Given { end: given.end, id: given.id, first_writes })
            })
            .collect();
        self.shared.next_id.store(state.next_id, Ordering::Relaxed);
        let count = self.shared.pages.len() as u64;
        for index in 0..count {
            let mine = state.pages.iter().filter(|page| (page.page / PAGE_SIZE) % count == index);
            *self.shared.pages(index as usize) = mine
                .map(|page| (page.page, Written { id: page.id, generation: page.generation }))
                .collect();
        }
        Ok(())
    }

    fn check(&self, state: &VcpuState) -> Result<(), String> {
        let mut end = 0;
        for given in &state.given {
            let pages =
                given.start.is_multiple_of(PAGE_SIZE) && given.end.is_multiple_of(PAGE_SIZE);
            if !pages || given.start < end || given.start >= given.end {
                return Err(format!("{:#x} to {:#x} is not a range", given.start, given.end));
            }
            if given.id >= state.next_id {
                return Err(format!("range {} of {}", given.id, state.next_id));
            }
            let regions = self.shared.ram.regions();
            let inside = regions.iter().any(|region| {
                region.range().contains(&given.start) && given.end <= region.range().end
            });
            if !inside {
                return Err(format!(
                    "{:#x} to {:#x} is not memory of the guest",
                    given.start, given.end
                ));
            }
            end = given.end;
        }
        match state.pages.iter().find(|page| !page.page.is_multiple_of(PAGE_SIZE)) {
            Some(page) => Err(format!("{:#x} is not the address of a page", page.page)),
            None => Ok(()),
        }
    }
}
