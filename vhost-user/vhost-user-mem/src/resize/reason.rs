//! Why a resize stands still, and what to say of it.

use management_api::{StallKind, StallReason};
use program::size::format_size;
use virtio_mem::controller::{Busy, FreezeHolder};
use virtio_mem::region_memory::NotReady;
use vmstate::printable;

use super::seen::Seen;
use super::{Device, Now};

/// When Linux tries again what was BUSY or failed, without being told of a change.
const RETRY: &str = "Linux tries again after 50 s, later every 5 min, or at the next resize";

/// Why a resize stands still.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// No front-end is connected.
    NoFrontEnd,
    /// Block state is frozen, by these and perhaps by others.
    Migration(Vec<FreezeHolder>),
    /// No memory is mapped at part of the region.
    NoMemory,
    /// The queue has not run in this connection; what was accepted, if anything was.
    DriverAbsent(Option<u64>),
    /// VIRTIO_F_VERSION_1 is not among what the driver accepted.
    FeaturesNotAccepted(u64),
    /// The queue has run and was stopped.
    QueueStopped,
    /// The host could not give or take memory, for this reason.
    HostMemory(String),
    /// This listener refused, for this reason.
    Refused(String, String),
    /// The state could not be saved, for this reason.
    StateNotSaved(String),
    /// The last request of this kind was answered with ERROR.
    DriverBroken(&'static str),
    /// The last request of this kind was answered with NACK.
    Rejected(&'static str),
    /// The guest unplugs what it has just plugged.
    GuestCannotAdd,
    /// With memory blocks of `block` bytes, the guest can use no more than `reach`.
    OutOfReach {
        /// Bytes.
        block: u64,
        /// Bytes.
        reach: u64,
    },
    /// The guest stopped after as much as Linux lets be offline.
    NotOnline,
    /// The guest asks for nothing.
    GuestSilent,
    /// The guest does not unplug the rest.
    Unmovable,
}

impl Reason {
    /// Why a request was BUSY; `None` when that was a freeze, which is known as long as it lasts.
    pub(super) fn of_busy(busy: &Busy) -> Option<Self> {
        match busy {
            Busy::Memory(NotReady::NotMapped(_)) => Some(Self::NoMemory),
            Busy::Memory(error) => Some(Self::HostMemory(error.to_string())),
            Busy::Discard(_) => Some(Self::HostMemory(busy.to_string())),
            Busy::Refused(refused) if refused.listener == "guest memory" => {
                Some(Self::HostMemory(refused.reason.clone()))
            }
            Busy::Refused(refused) => {
                Some(Self::Refused(refused.listener.clone(), refused.reason.clone()))
            }
            Busy::Store(error) => Some(Self::StateNotSaved(error.to_string())),
            _ => None,
        }
    }

    /// Its kind.
    pub fn kind(&self) -> StallKind {
        match self {
            Self::NoFrontEnd => StallKind::NoFrontEnd,
            Self::Migration(_) => StallKind::Migration,
            Self::NoMemory => StallKind::NoMemory,
            Self::DriverAbsent(_) => StallKind::DriverAbsent,
            Self::FeaturesNotAccepted(_) => StallKind::FeaturesNotAccepted,
            Self::QueueStopped => StallKind::QueueStopped,
            Self::HostMemory(_) => StallKind::HostMemory,
            Self::Refused(..) => StallKind::Refused,
            Self::StateNotSaved(_) => StallKind::StateNotSaved,
            Self::DriverBroken(_) => StallKind::DriverBroken,
            Self::Rejected(_) => StallKind::Rejected,
            Self::GuestCannotAdd => StallKind::GuestCannotAdd,
            Self::OutOfReach { .. } => StallKind::OutOfReach,
            Self::NotOnline => StallKind::NotOnline,
            Self::GuestSilent => StallKind::GuestSilent,
            Self::Unmovable => StallKind::Unmovable,
        }
    }

    /// Whether there is nothing new to tell after `other`: what a host says of each range may differ.
    pub(super) fn is_as(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Migration(_), Self::Migration(_)) | (Self::Refused(..), Self::Refused(..)) => {
                self == other
            }
            _ => self.kind() == other.kind(),
        }
    }

    /// What the API says of it.
    pub(super) fn told(&self, seen: &Seen, device: &Device, now: Now) -> StallReason {
        StallReason { kind: self.kind(), text: self.sentence(seen, device, now) }
    }

    fn sentence(&self, seen: &Seen, device: &Device, now: Now) -> String {
        let since = now.at(seen.progress_at.unwrap_or(seen.asked_at).max(seen.free_since));
        let last = seen.last.as_ref().map_or_else(
            || "it has sent no request".to_owned(),
            |last| {
                let (request, response) = (last.request.name(), last.response.name());
                format!(
                    "its last request was {request}, answered {response} at {}",
                    now.at(last.at)
                )
            },
        );
        let refused_at = seen.last.as_ref().map_or_else(String::new, |last| now.at(last.at));
        let (plugged, requested) = (device.plugged_size, device.requested_size);
        let left = format_size(plugged.abs_diff(requested));
        match self {
            Self::NoFrontEnd => {
                "no front-end is connected: start the virtual machine with this device".to_owned()
            }
            Self::Migration(holders) => {
                let by = if holders.is_empty() {
                    "by another part of this process".to_owned()
                } else {
                    holders.iter().map(|holder| by(*holder)).collect::<Vec<_>>().join(", and ")
                };
                format!("migration is active, and the guest is told BUSY until it ends: {by}")
            }
            Self::NoMemory => {
                let (start, end) = (device.addr, device.addr + device.region_size);
                let missing = device.unmapped.unwrap_or((start, end));
                format!(
                    "the front-end shares no memory at guest-physical {:#x} to {:#x} of the region \
                     {start:#x} to {end:#x}: its memory must be shared, and cover the region (is \
                     --addr right?)",
                    missing.0, missing.1
                )
            }
            Self::DriverAbsent(features) => format!(
                "the guest's driver has not started (features {}): the guest has not booted yet, or \
                 has no virtio_mem module (CONFIG_VIRTIO_MEM), or does not see the device",
                features.map_or_else(|| "not accepted".to_owned(), |bits| format!("{bits:#x}"))
            ),
            Self::FeaturesNotAccepted(features) => format!(
                "the driver accepted the features {features:#x}, without VIRTIO_F_VERSION_1: a \
                 legacy driver cannot use this device"
            ),
            Self::QueueStopped => "the queue of the device is stopped: the guest is paused, was \
                                   reset and has not booted yet, or its driver is unloaded"
                .to_owned(),
            Self::HostMemory(reason) => format!(
                "the host could not serve the guest's request at {refused_at} (BUSY): {}. Free \
                 memory or huge pages, then {RETRY}",
                printable(reason)
            ),
            Self::Refused(listener, reason) => format!(
                "{} refused the guest's request at {refused_at} (BUSY): {}. {RETRY}",
                printable(listener),
                printable(reason)
            ),
            Self::StateNotSaved(reason) => format!(
                "the state of the device could not be saved at {refused_at} (BUSY): {}. {RETRY}",
                printable(reason)
            ),
            Self::DriverBroken(request) => format!(
                "a {request} request was answered with ERROR at {refused_at}: Linux marks the device \
                 broken then (see its kernel log) and asks no more until it is booted again"
            ),
            Self::Rejected(request) => format!(
                "a {request} request was answered with NACK at {refused_at}: the guest asked for \
                 more than the requested size, and has not asked for what is left since"
            ),
            Self::GuestCannotAdd => format!(
                "the guest plugged memory and unplugged it again at once: its kernel could not add \
                 it (see its kernel log). It may be too small for the memory that describes it \
                 (1.6 % of what is added): grow in smaller steps; or the address is beyond what \
                 its CPU can address. {RETRY}"
            ),
            Self::OutOfReach { block, reach } => format!(
                "{left} are out of the guest's reach: with memory blocks of {} it can use {} of the \
                 {} usable at {:#x}. Have the region start and end at multiples of that, or request \
                 less",
                format_size(*block),
                format_size(*reach),
                format_size(device.usable_region_size),
                device.addr
            ),
            Self::NotOnline => format!(
                "the guest asks for no more since {since}, with {} plugged: where Linux stops while \
                 that much is not online. Have it put memory online: \
                 /sys/devices/system/memory/auto_online_blocks, or memhp_default_state=online_movable",
                format_size(plugged)
            ),
            Self::GuestSilent => format!(
                "the guest asks for nothing since {since} ({last}): memory may be plugged but not \
                 online (auto_online_blocks), or its kernel log tells why"
            ),
            Self::Unmovable => format!(
                "the guest keeps {left} more than requested since {since} ({last}): memory in use, or \
                 that it cannot move, as its kernel's. {RETRY}; memory put online as movable \
                 (memhp_default_state=online_movable) can be unplugged"
            ),
        }
    }
}

fn by(holder: FreezeHolder) -> String {
    match holder {
        FreezeHolder::Log => "the front-end logs writes (VHOST_F_LOG_ALL)".to_owned(),
        FreezeHolder::Api => {
            "the management API holds it (PUT /v1/migration {\"active\": false} ends that)"
                .to_owned()
        }
        FreezeHolder::Client(id) => format!("client {id} of the discard channel holds it"),
        FreezeHolder::Incoming => "memory is still arriving (postcopy)".to_owned(),
    }
}
