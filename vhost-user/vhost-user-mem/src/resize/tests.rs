//! Each reason from what leads to it, and from nothing less.

use std::time::{Duration, Instant};

use management_api::{Direction, ResizeState, StallKind};
use ram_discard::{GpaRange, PopulateRefused, Section};
use virtio_mem::controller::{Busy, FreezeHolder};
use virtio_mem::device::{BlockSpan, Request, Response};
use virtio_mem::region_memory::NotReady;

use super::seen::Seen;
use super::verdict::report;
use super::{Device, Now, QUIET, Reason, judge};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const ADDR: u64 = 4 * GIB;
/// VERSION_1 and UNPLUGGED_INACCESSIBLE.
const FEATURES: u64 = 1 << 32 | 1 << 1;

/// A device and what was seen of it, with a clock of its own.
struct World {
    seen: Seen,
    device: Device,
    start: Instant,
    at: Duration,
}

impl World {
    /// A guest that runs its driver and was asked for `requested` just now.
    fn asked(plugged: u64, requested: u64) -> Self {
        let mut world = Self::booting(plugged, requested);
        world.seen.connected(true, world.now());
        world.seen.driver(FEATURES, true, world.now());
        world
    }

    fn booting(plugged: u64, requested: u64) -> Self {
        let start = Instant::now();
        let device = Device {
            addr: ADDR,
            region_size: 16 * GIB,
            block_size: 2 * MIB,
            usable_region_size: 16 * GIB,
            plugged_size: plugged,
            requested_size: requested,
            mapped: true,
            unmapped: None,
        };
        Self { seen: Seen::new(plugged, requested, start), device, start, at: Duration::ZERO }
    }

    fn now(&self) -> Instant {
        self.start + self.at
    }

    fn pass(&mut self, time: Duration) {
        self.at += time;
    }

    fn plugged(&mut self, size: u64) {
        self.device.plugged_size = size;
        self.seen.plugged_size(size, self.now());
    }

    fn answer(&mut self, request: Request, response: Response) {
        self.seen.answered(request, response, self.now());
    }

    fn plug(&mut self, size: u64) {
        self.plugged(self.device.plugged_size + size);
        self.answer(plug_at(self.device.plugged_size - size), Response::Ack);
    }

    fn state(&self) -> ResizeState {
        judge(&self.seen, &self.device, self.now()).0.state
    }

    fn reason(&self) -> Option<Reason> {
        judge(&self.seen, &self.device, self.now()).0.reason
    }

    fn kind(&self) -> Option<StallKind> {
        self.reason().map(|reason| reason.kind())
    }

    fn text(&self) -> String {
        let now = Now { instant: self.now(), unix: Duration::from_secs(1_000) + self.at };
        report(&self.seen, &self.device, now).reason.unwrap().text
    }

    fn busy(&mut self, reason: &Busy) {
        self.seen.busy(reason);
        self.answer(plug_at(0), Response::Busy);
    }
}

fn plug_at(offset: u64) -> Request {
    Request::Plug(BlockSpan { addr: ADDR + offset, nb_blocks: 64 })
}

fn refused(listener: &str, reason: &str) -> Busy {
    let section = Section::new(0, MIB).unwrap();
    let (listener, reason) = (listener.to_owned(), reason.to_owned());
    Busy::Refused(PopulateRefused { listener, section, reason })
}

#[test]
fn a_guest_that_has_what_is_requested_is_done_whatever_else_there_is() {
    let world = World::booting(GIB, GIB);
    assert_eq!((world.state(), world.reason()), (ResizeState::Done, None));
}

#[test]
fn a_guest_that_was_just_asked_is_waited_for_and_one_that_moves_progresses() {
    let mut world = World::asked(0, GIB);
    assert_eq!(world.state(), ResizeState::Waiting);
    let wait = judge(&world.seen, &world.device, world.now()).1;
    assert_eq!(wait, Some(QUIET));
    world.pass(QUIET / 2);
    world.plug(128 * MIB);
    assert_eq!(world.state(), ResizeState::Progressing);
    world.pass(QUIET * 3 / 4);
    assert_eq!(world.state(), ResizeState::Progressing);
    world.plugged(GIB);
    assert_eq!(world.state(), ResizeState::Done);
}

#[test]
fn rate_and_expected_end_are_those_of_the_last_seconds() {
    let mut world = World::asked(0, 4 * GIB);
    // Far in the past, and not as fast.
    world.plug(128 * MIB);
    world.pass(Duration::from_secs(60));
    for _ in 0..8 {
        world.plug(128 * MIB);
        world.pass(Duration::from_secs(1));
    }
    let now = Now { instant: world.now(), unix: Duration::from_secs(1_000) };
    let resize = report(&world.seen, &world.device, now);
    assert_eq!((resize.state, resize.direction), (ResizeState::Progressing, Some(Direction::Grow)));
    assert_eq!(resize.remaining_size, 4 * GIB - 9 * 128 * MIB);
    assert_eq!(resize.rate, Some(7 * 128 * MIB / 8));
    assert_eq!(resize.expected_seconds, Some(resize.remaining_size.div_ceil(7 * 128 * MIB / 8)));
    assert_eq!(resize.since.as_deref(), Some("1970-01-01T00:16:39Z"));
    let last = resize.last_request.unwrap();
    assert_eq!((last.request_type.as_str(), last.response.as_str()), ("plug", "ack"));
}

#[test]
fn without_a_front_end_memory_driver_or_queue_it_is_told_at_once_which_is_missing() {
    let mut world = World::booting(0, GIB);
    assert_eq!(world.kind(), Some(StallKind::NoFrontEnd));
    world.seen.connected(true, world.now());
    (world.device.mapped, world.device.unmapped) = (false, Some((ADDR, ADDR + 16 * GIB)));
    assert_eq!(world.reason(), Some(Reason::DriverAbsent(None)), "memory comes with the driver");
    world.seen.driver(1 << 1, false, world.now());
    assert_eq!(world.kind(), Some(StallKind::NoMemory));
    assert!(world.text().contains("0x100000000 to 0x500000000"), "{}", world.text());
    (world.device.mapped, world.device.unmapped) = (true, None);
    world.seen.driver(0, false, world.now());
    assert_eq!(world.reason(), Some(Reason::DriverAbsent(None)));
    assert!(world.text().contains("CONFIG_VIRTIO_MEM"), "{}", world.text());
    world.seen.driver(1 << 1, false, world.now());
    assert_eq!(world.reason(), Some(Reason::DriverAbsent(Some(2))));
    world.seen.driver(1 << 1, true, world.now());
    assert_eq!(world.reason(), Some(Reason::FeaturesNotAccepted(2)));
    world.seen.driver(FEATURES, true, world.now());
    assert_eq!(world.state(), ResizeState::Waiting);
    world.seen.driver(FEATURES, false, world.now());
    assert_eq!(world.reason(), Some(Reason::QueueStopped));
    world.seen.connected(false, world.now());
    assert_eq!(world.kind(), Some(StallKind::NoFrontEnd));
    // What ran in the connection before is not what runs now.
    world.seen.connected(true, world.now());
    assert_eq!(world.reason(), Some(Reason::DriverAbsent(None)));
}

#[test]
fn part_of_the_region_without_memory_is_named_when_the_guest_stops_there() {
    let mut world = World::asked(0, GIB);
    world.device.unmapped = Some((ADDR + 512 * MIB, ADDR + 16 * GIB));
    assert_eq!(world.state(), ResizeState::Waiting);
    world.pass(QUIET);
    assert_eq!(world.kind(), Some(StallKind::NoMemory));
    let missing = GpaRange::new(ADDR, MIB).unwrap();
    let mut world = World::asked(0, GIB);
    world.busy(&Busy::Memory(NotReady::NotMapped(missing)));
    assert_eq!(world.kind(), Some(StallKind::NoMemory));
}

#[test]
fn a_freeze_names_all_who_hold_it_and_its_end_starts_the_clock_anew() {
    let mut world = World::asked(0, GIB);
    world.seen.frozen(true, world.now());
    assert_eq!(world.reason(), Some(Reason::Migration(vec![])));
    for holder in [FreezeHolder::Log, FreezeHolder::Api, FreezeHolder::Client(7)] {
        world.seen.frozen_by(holder, true);
    }
    for part in ["VHOST_F_LOG_ALL", "PUT /v1/migration", "client 7 of the discard channel"] {
        assert!(world.text().contains(part), "{}", world.text());
    }
    world.seen.busy(&Busy::Frozen);
    world.answer(plug_at(0), Response::Busy);
    world.pass(QUIET * 6);
    world.seen.frozen_by(FreezeHolder::Log, false);
    let holders = vec![FreezeHolder::Api, FreezeHolder::Client(7)];
    assert_eq!(world.reason(), Some(Reason::Migration(holders)));
    world.seen.frozen(false, world.now());
    assert_eq!(world.state(), ResizeState::Waiting, "the guest is told to try again");
    world.pass(QUIET);
    assert_eq!(world.kind(), Some(StallKind::GuestSilent));
}

#[test]
fn busy_names_who_made_it_so_until_the_guest_tries_again() {
    for (busy, reason, part) in [
        (
            refused("guest memory", "no huge pages"),
            Reason::HostMemory("no huge pages".to_owned()),
            "no huge pages",
        ),
        (
            refused("discard channel", "client 3: \u{1b}[31mno\n"),
            Reason::Refused("discard channel".into(), "client 3: \u{1b}[31mno\n".into()),
            r"client 3: \u{1b}[31mno\n",
        ),
        (
            // Of a request that was done before the daemon was started again.
            Busy::Discard(std::io::ErrorKind::PermissionDenied.into()),
            Reason::HostMemory(
                "cannot discard the memory of unplugged blocks: permission denied".to_owned(),
            ),
            "the memory of unplugged blocks: permission denied",
        ),
        (
            Busy::Store(std::io::ErrorKind::StorageFull.into()),
            Reason::StateNotSaved("no storage space".to_owned()),
            "no storage space",
        ),
    ] {
        let mut world = World::asked(0, GIB);
        world.plug(128 * MIB);
        world.busy(&busy);
        assert_eq!(world.reason(), Some(reason), "told at once, in the middle of progress");
        assert!(world.text().contains(part), "{}", world.text());
        world.pass(Duration::from_secs(50));
        world.plug(128 * MIB);
        assert_eq!(world.state(), ResizeState::Progressing);
        world.busy(&busy);
        assert_eq!(world.state(), ResizeState::Stalled);
        world.pass(Duration::from_secs(1));
        world.device.requested_size = 2 * GIB;
        world.seen.requested_size(2 * GIB, world.now());
        assert_eq!(world.state(), ResizeState::Waiting, "a resize has the guest try again");
    }
}

#[test]
fn a_request_that_is_busy_without_a_reason_has_not_the_one_of_the_request_before() {
    let mut world = World::asked(0, GIB);
    world.busy(&refused("dma", "no"));
    world.answer(plug_at(0), Response::Busy);
    assert_eq!(world.state(), ResizeState::Waiting);
}

#[test]
fn error_breaks_the_driver_until_it_speaks_again_whatever_is_requested() {
    let mut world = World::asked(0, GIB);
    world.answer(plug_at(1), Response::Error);
    assert_eq!(world.reason(), Some(Reason::DriverBroken("plug")));
    world.seen.requested_size(2 * GIB, world.now());
    world.pass(QUIET * 2);
    assert_eq!(world.reason(), Some(Reason::DriverBroken("plug")));
    world.plug(128 * MIB);
    assert_eq!(world.state(), ResizeState::Progressing);
}

#[test]
fn nack_is_a_reason_only_when_the_guest_leaves_it_at_that() {
    let mut world = World::asked(0, GIB);
    world.answer(plug_at(0), Response::Nack);
    assert_eq!(world.state(), ResizeState::Waiting);
    world.pass(QUIET);
    assert_eq!(world.reason(), Some(Reason::Rejected("plug")));
}

#[test]
fn memory_that_the_guest_unplugs_at_once_is_memory_that_it_cannot_add() {
    let mut world = World::asked(GIB, 4 * GIB);
    world.plug(128 * MIB);
    let undo = |world: &mut World| {
        let Request::Plug(span) = plug_at(world.device.plugged_size - 128 * MIB) else { panic!() };
        world.plugged(world.device.plugged_size - 128 * MIB);
        world.answer(Request::Unplug(span), Response::Ack);
    };
    undo(&mut world);
    assert_eq!(world.reason(), Some(Reason::GuestCannotAdd));
    // It tries again, and fails again: no progress, and nothing new to tell.
    world.pass(Duration::from_secs(50));
    world.plug(128 * MIB);
    assert_eq!(world.reason(), Some(Reason::GuestCannotAdd));
    undo(&mut world);
    assert_eq!(world.reason(), Some(Reason::GuestCannotAdd));
    world.plug(128 * MIB);
    world.plug(128 * MIB);
    assert_eq!(world.state(), ResizeState::Progressing);
}

#[test]
fn unplugging_what_was_plugged_last_is_what_a_shrink_does() {
    let mut world = World::asked(0, GIB);
    world.plug(128 * MIB);
    world.device.requested_size = 0;
    world.seen.requested_size(0, world.now());
    let Request::Plug(span) = plug_at(0) else { panic!() };
    world.plugged(0);
    world.answer(Request::Unplug(span), Response::Ack);
    assert_eq!(world.state(), ResizeState::Done);
    world.device.requested_size = GIB;
    world.seen.requested_size(GIB, world.now());
    assert_eq!(world.state(), ResizeState::Waiting);
}

#[test]
fn memory_blocks_that_do_not_fit_are_out_of_reach() {
    let mut world = World::asked(0, 512 * MIB);
    // Not aligned, and usable up to its end only.
    (world.device.addr, world.device.region_size) = (ADDR + 2 * MIB, 512 * MIB);
    world.device.usable_region_size = 512 * MIB;
    for _ in 0..3 {
        world.plug(128 * MIB);
    }
    assert_eq!(world.state(), ResizeState::Progressing);
    world.pass(QUIET);
    let (block, reach) = (128 * MIB, 384 * MIB);
    assert_eq!(world.reason(), Some(Reason::OutOfReach { block, reach }));
    assert!(world.text().contains("128 MiB are out of the guest's reach"), "{}", world.text());
    // Blocks of 512 MiB would explain that nothing is plugged; but then anything would.
    world.plugged(0);
    world.seen.requested_size(512 * MIB, world.now());
    world.pass(QUIET);
    assert_eq!(world.kind(), Some(StallKind::GuestSilent));
    (world.device.region_size, world.device.usable_region_size) = (128 * MIB, 128 * MIB);
    assert_eq!(world.kind(), Some(StallKind::OutOfReach));
}

#[test]
fn a_guest_that_stops_where_linux_does_has_memory_that_is_not_online() {
    let mut world = World::asked(0, 4 * GIB);
    for _ in 0..8 {
        world.plug(128 * MIB);
    }
    world.pass(QUIET);
    assert_eq!(world.reason(), Some(Reason::NotOnline));
    assert!(world.text().contains("auto_online_blocks"), "{}", world.text());
    world.plug(128 * MIB);
    world.pass(QUIET);
    assert_eq!(world.reason(), Some(Reason::GuestSilent));
    assert!(
        world.text().contains("plug, answered ack at 1970-01-01T00:16:50Z"),
        "{}",
        world.text()
    );
}

#[test]
fn a_guest_that_never_asked_is_silent() {
    let mut world = World::asked(0, GIB);
    world.pass(QUIET);
    assert_eq!(world.reason(), Some(Reason::GuestSilent));
    assert!(world.text().contains("it has sent no request"), "{}", world.text());
    assert!(world.text().contains("since 1970-01-01T00:16:40Z"), "{}", world.text());
}

#[test]
fn a_shrink_that_stalls_names_what_is_left_and_since_when() {
    let mut world = World::asked(GIB, 256 * MIB);
    world.pass(Duration::from_secs(5));
    world.plugged(512 * MIB);
    world.answer(Request::Unplug(BlockSpan { addr: ADDR, nb_blocks: 64 }), Response::Ack);
    assert_eq!(world.state(), ResizeState::Progressing);
    world.pass(QUIET);
    assert_eq!(world.reason(), Some(Reason::Unmovable));
    let text = world.text();
    assert!(
        text.contains("keeps 256 MiB more than requested since 1970-01-01T00:16:45Z"),
        "{text}"
    );
    let now = Now { instant: world.now(), unix: Duration::from_secs(1_015) };
    let resize = report(&world.seen, &world.device, now);
    assert_eq!((resize.direction, resize.rate), (Some(Direction::Shrink), None));
    assert_eq!(resize.since.as_deref(), Some("1970-01-01T00:16:45Z"));
    assert_eq!(resize.remaining_size, 256 * MIB);
}

#[test]
fn a_guest_that_boots_again_and_unplugs_all_begins_anew() {
    let mut world = World::asked(0, GIB);
    world.plug(512 * MIB);
    world.pass(QUIET * 2);
    assert_eq!(world.state(), ResizeState::Stalled);
    world.plugged(0);
    world.answer(Request::UnplugAll, Response::Ack);
    assert_eq!(world.state(), ResizeState::Waiting);
    world.plug(128 * MIB);
    assert_eq!(world.state(), ResizeState::Progressing);
}
