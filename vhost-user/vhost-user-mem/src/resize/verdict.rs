//! What follows from what was seen.

use std::time::{Duration, Instant};

use management_api::{Direction, LastRequest, Resize, ResizeState};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_mem::controller::MemController;
use virtio_mem::device::{ConfigSpace, Response};

use super::Now;
use super::reason::Reason;
use super::seen::Seen;

/// Without progress for this long, a guest that could go on stands still. A block of Linux takes less
/// to add, and to take away unless it is in use.
pub const QUIET: Duration = Duration::from_secs(10);

/// Linux plugs no more than this while it is not online, or two of its memory blocks if that is more.
const OFFLINE_MAX: [u64; 3] = [1 << 30, 2 << 30, 4 << 30];

/// Sizes of memory blocks that Linux takes, as powers of two.
const LINUX_BLOCKS: std::ops::RangeInclusive<u32> = 27..=31;

/// What the device itself tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Guest-physical address of the region.
    pub addr: u64,
    /// Its size.
    pub region_size: u64,
    /// Size of a block.
    pub block_size: u64,
    /// What may be plugged, from the start.
    pub usable_region_size: u64,
    /// What is plugged.
    pub plugged_size: u64,
    /// What the guest is asked to plug.
    pub requested_size: u64,
    /// Whether any memory is mapped in the region.
    pub mapped: bool,
    /// The first guest-physical range of the region at which none is, start and end.
    pub unmapped: Option<(u64, u64)>,
}

impl Device {
    /// A device as it is now.
    pub fn of(controller: &MemController) -> Self {
        Self::with(controller, &controller.config())
    }

    /// The same, of which the configuration is known.
    pub fn with(controller: &MemController, config: &ConfigSpace) -> Self {
        let unmapped = controller.memory().first_unmapped();
        Self {
            addr: config.addr,
            region_size: config.region_size,
            block_size: controller.geometry().block_size(),
            usable_region_size: config.usable_region_size,
            plugged_size: config.plugged_size,
            requested_size: config.requested_size,
            mapped: controller.memory().is_mapped(),
            unmapped: unmapped.map(|range| (range.start(), range.end())),
        }
    }

    /// What the guest can use at most, with memory blocks of this size.
    fn reach(&self, block: u64) -> u64 {
        let start = self.addr.next_multiple_of(block);
        let end = (self.addr + self.usable_region_size) / block * block;
        end.saturating_sub(start)
    }

    /// Whether, and by which size of memory blocks, what is left is out of reach.
    fn out_of_reach(&self) -> Option<Reason> {
        let smallest = self.block_size.max(1 << LINUX_BLOCKS.start());
        LINUX_BLOCKS.map(|bits| 1 << bits).filter(|block| *block >= smallest).find_map(|block| {
            let reach = self.reach(block);
            // Of larger blocks than the smallest it is known only that they would explain it.
            let explains = reach == self.plugged_size && (reach != 0 || block == smallest);
            (explains && reach < self.requested_size).then_some(Reason::OutOfReach { block, reach })
        })
    }
}

/// How a resize stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether it is done.
    pub state: ResizeState,
    /// Why it stands still, if it does.
    pub reason: Option<Reason>,
}

impl Verdict {
    /// Whether there is nothing new to tell after `other`.
    pub(super) fn is_as(&self, other: &Self) -> bool {
        self.state == other.state
            && match (&self.reason, &other.reason) {
                (None, None) => true,
                (Some(reason), Some(other)) => reason.is_as(other),
                _ => false,
            }
    }

    fn stalled(reason: Reason) -> Self {
        Self { state: ResizeState::Stalled, reason: Some(reason) }
    }
}

/// How a resize stands `now`, and after which time it may stand otherwise without anything
/// being seen.
pub fn judge(seen: &Seen, device: &Device, now: Instant) -> (Verdict, Option<Duration>) {
    if device.plugged_size == device.requested_size {
        return (Verdict { state: ResizeState::Done, reason: None }, None);
    }
    if let Some(reason) = certain(seen, device) {
        return (Verdict::stalled(reason), None);
    }
    let moved = seen.progress_at.unwrap_or(seen.asked_at).max(seen.free_since);
    let quiet_at = moved + QUIET;
    if now < quiet_at {
        let progressing = seen.progress_at.is_some_and(|at| now < at + QUIET);
        let state = if progressing { ResizeState::Progressing } else { ResizeState::Waiting };
        return (Verdict { state, reason: None }, Some(quiet_at.duration_since(now)));
    }
    (Verdict::stalled(likely(seen, device)), None)
}

/// What keeps the guest for certain, whatever the time.
fn certain(seen: &Seen, device: &Device) -> Option<Reason> {
    if !seen.connected {
        return Some(Reason::NoFrontEnd);
    }
    if seen.frozen {
        return Some(Reason::Migration(seen.holders.iter().copied().collect()));
    }
    if !device.mapped {
        // QEMU and others share their memory once the driver has accepted features, and not before.
        let begun = seen.features.is_some() || seen.has_run;
        return Some(if begun { Reason::NoMemory } else { Reason::DriverAbsent(None) });
    }
    if !seen.runs && seen.has_run {
        return Some(Reason::QueueStopped);
    }
    if !seen.runs {
        return Some(Reason::DriverAbsent(seen.features));
    }
    if let Some(features) = seen.features
        && features & (1 << VIRTIO_F_VERSION_1) == 0
    {
        return Some(Reason::FeaturesNotAccepted(features));
    }
    let last = seen.last.as_ref()?;
    match last.response {
        Response::Error => Some(Reason::DriverBroken(last.request.name())),
        // A guest that was asked again, or whose queue started anew, tries again.
        Response::Busy if last.at >= seen.free_since => last.busy.clone(),
        _ if seen.undone => Some(Reason::GuestCannotAdd),
        _ => None,
    }
}

/// What likely keeps a guest that could go on, and does not.
fn likely(seen: &Seen, device: &Device) -> Reason {
    let usable_end = device.addr.saturating_add(device.usable_region_size);
    if device.unmapped.is_some_and(|(start, _)| start < usable_end) {
        return Reason::NoMemory;
    }
    if device.plugged_size > device.requested_size {
        return Reason::Unmovable;
    }
    if let Some(last) = &seen.last
        && last.response == Response::Nack
        && last.at >= seen.asked_at
    {
        return Reason::Rejected(last.request.name());
    }
    let grown = device.plugged_size.saturating_sub(seen.from);
    let stopped_at_offline =
        OFFLINE_MAX.contains(&device.plugged_size) || OFFLINE_MAX.contains(&grown);
    match device.out_of_reach() {
        Some(reason) if !stopped_at_offline => reason,
        _ if stopped_at_offline => Reason::NotOnline,
        _ => Reason::GuestSilent,
    }
}

/// The verdict as the API has it.
pub(super) fn report(seen: &Seen, device: &Device, now: Now) -> Resize {
    let (verdict, _) = judge(seen, device, now.instant);
    let remaining_size = device.plugged_size.abs_diff(device.requested_size);
    let done = verdict.state == ResizeState::Done;
    let progressing = verdict.state == ResizeState::Progressing;
    let rate = if progressing { seen.rate(now.instant) } else { None };
    Resize {
        state: verdict.state,
        direction: (!done).then_some(if device.plugged_size < device.requested_size {
            Direction::Grow
        } else {
            Direction::Shrink
        }),
        remaining_size,
        rate,
        expected_seconds: rate.map(|rate| remaining_size.div_ceil(rate)),
        since: (!done).then(|| now.at(seen.progress_at.unwrap_or(seen.asked_at))),
        reason: verdict.reason.map(|reason| reason.told(seen, device, now)),
        last_request: seen.last.as_ref().map(|last| LastRequest {
            request_type: last.request.name().to_owned(),
            response: last.response.name().to_owned(),
            at: now.at(last.at),
        }),
    }
}
