//! What the vCPUs know, as a section.

use vmstate::{Access, Count, Field, Reason, SliceAccess, VmState, VmStateDevice};

use crate::vcpu::{GivenState, PageState, VcpuState, Vcpus};

/// Words for a range: start, end, id, first writes.
const GIVEN_WORDS: u64 = 4;
/// Words for a page: address, id, generation.
const PAGE_WORDS: u64 = 3;

/// The state with its lists as words.
pub(super) struct State {
    next_id: u64,
    nr_given: u32,
    given: Vec<u64>,
    nr_pages: u32,
    pages: Vec<u64>,
}

pub(super) static VMSTATE: VmState<State> = VmState::new(
    "cpus",
    1,
    &[
        Field::u64("next_id", Access::Mutable(|s| s.next_id, |s, id| s.next_id = id)),
        Field::u32("nr_given", Access::Mutable(|s| s.nr_given, |s, nr| s.nr_given = nr)),
        Field::array_u64(
            "given",
            Count::From { count: |s| GIVEN_WORDS * u64::from(s.nr_given), limit: 1 << 20 },
            SliceAccess::Mutable(|s| &s.given, |s, given| s.given = given),
        ),
        Field::u32("nr_pages", Access::Mutable(|s| s.nr_pages, |s, nr| s.nr_pages = nr)),
        Field::array_u64(
            "pages",
            Count::From { count: |s| PAGE_WORDS * u64::from(s.nr_pages), limit: 1 << 26 },
            SliceAccess::Mutable(|s| &s.pages, |s, pages| s.pages = pages),
        ),
    ],
);

/// The vCPUs, paused.
pub(super) struct Cpus(pub(super) Vcpus);

impl VmStateDevice for Cpus {
    type State = State;

    fn snapshot(&mut self) -> Result<State, Reason> {
        let VcpuState { next_id, given, pages } = self.0.state();
        Ok(State {
            next_id,
            nr_given: u32::try_from(given.len())?,
            given: given.iter().flat_map(|g| [g.start, g.end, g.id, g.first_writes]).collect(),
            nr_pages: u32::try_from(pages.len())?,
            pages: pages.iter().flat_map(|p| [p.page, p.id, p.generation]).collect(),
        })
    }

    fn take_over(&mut self, state: State) -> Result<(), Reason> {
        let (given, _) = state.given.as_chunks();
        let (pages, _) = state.pages.as_chunks();
        let given = given.iter().map(|&[start, end, id, first_writes]| GivenState {
            start,
            end,
            id,
            first_writes,
        });
        let pages = pages.iter().map(|&[page, id, generation]| PageState { page, id, generation });
        let state =
            VcpuState { next_id: state.next_id, given: given.collect(), pages: pages.collect() };
        Ok(self.0.take_over(state)?)
    }
}
