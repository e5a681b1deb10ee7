//! Which rings run, as the front-end's messages say.

use std::collections::BTreeMap;

/// Rings that are followed; the crate refuses indices that it does not have.
const RINGS: u32 = 64;

/// Started and enabled rings, as bits.
#[derive(Debug, Default)]
pub(super) struct Rings {
    started: u64,
    enabled: u64,
    /// Rings that the crate has accepted a message about.
    known: u64,
    /// A reset disabled all rings, and none has been enabled since.
    reset: bool,
    /// Entries of those that the front-end has told the size of.
    sizes: BTreeMap<u32, u16>,
}

impl Rings {
    fn bit(index: u32) -> u64 {
        if index < RINGS { 1 << index } else { 0 }
    }

    /// The crate has accepted the size of a ring.
    pub(super) fn resize(&mut self, index: u32, size: u16) {
        if index < RINGS {
            self.sizes.insert(index, size);
        }
    }

    /// Entries of a ring; as many as there can be while the front-end has not said.
    pub(super) fn size(&self, index: u32) -> u16 {
        self.sizes.get(&index).copied().unwrap_or(super::requests::QUEUE_SIZE_MAX)
    }

    /// A kick descriptor came.
    pub(super) fn start(&mut self, index: u32) {
        self.started |= Self::bit(index);
        self.known |= Self::bit(index);
    }

    /// The base was fetched.
    pub(super) fn stop(&mut self, index: u32) {
        self.started &= !Self::bit(index);
    }

    pub(super) fn enable(&mut self, index: u32, on: bool) {
        self.known |= Self::bit(index);
        if on {
            self.enabled |= Self::bit(index);
            self.reset = false;
        } else {
            self.enabled &= !Self::bit(index);
        }
    }

    /// Without VHOST_USER_F_PROTOCOL_FEATURES, rings are enabled from the start.
    pub(super) fn enable_all(&mut self) {
        self.enabled = u64::MAX;
        self.reset = false;
    }

    /// A device reset.
    pub(super) fn reset(&mut self) {
        self.enabled = 0;
        self.reset = true;
    }

    /// Enabled rings, of those that are known to exist.
    pub(super) fn enabled(&self) -> impl Iterator<Item = u32> + use<> {
        let enabled = self.enabled & self.known;
        (0..RINGS).filter(move |&index| enabled & Self::bit(index) != 0)
    }

    /// Whether requests of the ring are served.
    pub(super) fn runs(&self, index: u32) -> bool {
        !self.reset && self.started & self.enabled & Self::bit(index) != 0
    }

    /// Whether the device may not speak: all rings are stopped, or were reset.
    pub(super) fn suspended(&self) -> bool {
        self.reset || self.started == 0
    }
}
