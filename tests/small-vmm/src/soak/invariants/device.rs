//! The sizes of the device.

use crate::guest_driver::GuestDriver;
use crate::soak::host::{BLOCK, REGION};
use crate::soak::world::World;

/// What the usable region has beyond the requested size.
const SPARE: u64 = 256 << 20;

/// The sizes at the last look.
#[derive(Default)]
pub(super) struct Sizes {
    epoch: Option<u64>,
    plugged: u64,
    requested: u64,
    usable: u64,
    /// The most that was requested between the two last looks: a PLUG that was judged by it may have
    /// waited for listeners meanwhile.
    most_requested: u64,
}

impl Sizes {
    /// Looks at them while the guest is settled on a host.
    pub(super) fn look(&mut self, world: &World) {
        let (epoch, journal) = (world.epoch(), &world.journal);
        // A driver that has booted may still unplug everything, at another host, too.
        let probed = |driver: &mut GuestDriver| driver.state().is_ok_and(|state| state.probed);
        let probed = world.machine().with_driver(probed);
        // Before the sizes are read: what is requested later counts at the next look, too.
        let most_requested = world.take_requested();
        let Some(device) = world.host().device(journal) else { return };
        let number = |name: &str| device[name].as_u64().unwrap_or(u64::MAX);
        let (plugged, requested, usable) =
            (number("plugged_size"), number("requested_size"), number("usable_region_size"));
        let later = world.take_requested();
        world.will_request(requested.max(later));
        let most_requested = most_requested.max(later).max(requested);
        let check = |right: bool, invariant: &str| {
            if !right {
                let detail = format!(
                    "plugged {plugged:#x}, requested {requested:#x}, usable {usable:#x}; before \
                     {:#x}, {:#x}, {:#x}",
                    self.plugged, self.requested, self.usable
                );
                journal.violated(invariant, detail);
            }
        };
        let multiple = [plugged, requested, usable].iter().all(|size| size.is_multiple_of(BLOCK));
        check(multiple, "sizes are multiples of the block size");
        check(usable <= REGION && plugged <= usable, "plugged <= usable <= region");
        check(
            requested == 0 || usable >= (requested + SPARE).min(REGION),
            "the usable region has 256 MiB more than what is requested",
        );
        let frozen = device["migration_active"] != false;
        if !world.may_have_reset(frozen) && probed && self.epoch == Some(epoch) {
            check(usable >= self.usable, "the usable region never shrinks but at a reset");
            let most = self.plugged.max(most_requested).max(self.most_requested);
            check(plugged <= most, "no more is plugged than was ever requested");
        }
        let epoch = probed.then_some(epoch);
        *self = Self { epoch, plugged, requested, usable, most_requested };
    }
}
