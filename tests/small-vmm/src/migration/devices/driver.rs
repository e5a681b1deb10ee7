//! What the guest's driver knows, as a section.

use std::sync::Arc;

use vmstate::{Access, Count, Field, Reason, SliceAccess, VmState, VmStateDevice};

use crate::guest_driver::DriverState;
use crate::machine::Machine;

pub(super) struct State {
    nr_words: u32,
    driver: DriverState,
}

pub(super) static VMSTATE: VmState<State> = VmState::new(
    "driver",
    1,
    &[
        Field::u64("ring", Access::Immutable(|s| s.driver.ring)),
        Field::u16("ring_size", Access::Immutable(|s| s.driver.ring_size)),
        Field::u16(
            "ring_index",
            Access::Mutable(|s| s.driver.ring_index, |s, index| s.driver.ring_index = index),
        ),
        Field::bool(
            "probed",
            Access::Mutable(|s| s.driver.probed, |s, probed| s.driver.probed = probed),
        ),
        Field::u32("nr_words", Access::Mutable(|s| s.nr_words, |s, nr| s.nr_words = nr)),
        Field::array_u64(
            "plugged",
            Count::From { count: |s| u64::from(s.nr_words), limit: 1 << 20 },
            SliceAccess::Mutable(|s| &s.driver.plugged, |s, words| s.driver.plugged = words),
        ),
    ],
);

/// The driver, between two requests.
pub(super) struct Driver(pub(super) Arc<Machine>);

impl VmStateDevice for Driver {
    type State = State;

    fn snapshot(&mut self) -> Result<State, Reason> {
        let driver = self.0.with_driver(|driver| driver.state())?;
        Ok(State { nr_words: u32::try_from(driver.plugged.len())?, driver })
    }

    fn take_over(&mut self, state: State) -> Result<(), Reason> {
        self.0.with_driver(|driver| driver.take_over(&state.driver));
        Ok(())
    }
}
