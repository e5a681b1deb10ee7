//! VIRTIO 1.4, 5.15 over a real socket and a real ring: what the device MUST do with requests.
//! Clause names (D31, F6, ...) are those of `spec-notes/virtio-mem.md`.

mod common;

use common::{ADDR, BLOCK, REGION, Rig, gpa, options, ram, rig, rig_with};
use small_vmm::driver::{BlockState, MemRequest, RequestType, ResponseType, Shape};
use small_vmm::memory::{GuestRam, Layout};
use small_vmm::split_ring::{Next, Segment};
use std::sync::Arc;
use std::time::Duration;

const NAMING_BLOCKS: [RequestType; 3] =
    [RequestType::Plug, RequestType::Unplug, RequestType::State];

#[test]
fn d31_d38_d50_bad_ranges_are_errors_and_change_nothing() {
    let mut rig = rig_with(options().requested_size(256 << 20), ram());
    rig.plug(0, 4);
    let config = rig.frontend.config().unwrap();
    let usable = config.usable_region_size;
    assert!(usable < REGION);
    let blocks = |size: u64| u16::try_from(size / BLOCK).unwrap();
    let bad = [
        (ADDR + 1, 1),
        (ADDR + BLOCK / 2, 1),
        (ADDR - BLOCK, 1),
        (0, 1),
        (ADDR + usable, 1),
        (ADDR + usable - BLOCK, 2),
        (ADDR, blocks(usable) + 1),
        (ADDR, 0),
        (ADDR + usable, 0),
        (!(BLOCK - 1), 1),
        (!(BLOCK - 1), u16::MAX),
        (1 << 63, 1),
        (ADDR + REGION, 1),
    ];
    for (addr, nb_blocks) in bad {
        for kind in NAMING_BLOCKS {
            let response = rig.execute(kind, addr, nb_blocks);
            assert_eq!(response.kind(), ResponseType::Error, "{kind:?} {addr:#x} {nb_blocks}");
            assert_eq!(response.len, 10);
        }
    }
    assert_eq!(rig.frontend.config().unwrap(), config);
}

#[test]
fn d32_d39_a_block_in_the_asked_state_is_an_error_wherever_it_stands() {
    for taken in 0..4 {
        let mut rig = rig();
        assert_eq!(rig.plug(taken, 1), ResponseType::Ack);
        rig.stamp(taken, taken + 1);
        assert_eq!(rig.plug(0, 4), ResponseType::Error);
        assert_eq!(rig.unplug(0, 4), ResponseType::Error);
        rig.assert_stamped(taken, taken + 1);
        assert_eq!(rig.plugged_size(), BLOCK);
    }
}

#[test]
fn d28_plugging_beyond_the_requested_size_is_nack() {
    let mut rig = rig_with(options().requested_size(4 * BLOCK), ram());
    assert_eq!(rig.plug(0, 5), ResponseType::Nack);
    assert_eq!(rig.plug(0, 4), ResponseType::Ack);
    assert_eq!(rig.plug(4, 1), ResponseType::Nack);
    assert!(rig.daemon.api().resize(BLOCK).unwrap().is_success());
    assert_eq!(rig.plug(4, 1), ResponseType::Nack);
    assert_eq!(rig.unplug(0, 4), ResponseType::Ack);
    assert_eq!(rig.plug(0, 1), ResponseType::Ack);
}

#[test]
fn d25_d35_acked_blocks_are_writable_and_counted() {
    let mut rig = rig();
    for block in 0..64 {
        assert_eq!(rig.plug(block, 1), ResponseType::Ack);
        rig.stamp(block, block + 1);
        assert_eq!(rig.plugged_size(), (block + 1) * BLOCK, "visible when the answer is");
    }
    rig.assert_stamped(0, 64);
}

#[test]
fn d23_d41_unplug_gives_memory_back_and_leaves_the_neighbours() {
    let mut rig = rig();
    rig.plug(0, 8);
    rig.stamp(0, 8);
    assert_eq!(rig.resident(0, 8), 8 * BLOCK);
    assert_eq!(rig.unplug(2, 3), ResponseType::Ack);
    assert_eq!((rig.resident(2, 5), rig.resident(0, 8)), (0, 5 * BLOCK));
    rig.assert_stamped(0, 2);
    rig.assert_stamped(5, 8);
    assert_eq!(rig.plug(2, 1), ResponseType::Ack);
    rig.assert_stamped(0, 2);
}

#[test]
fn d45_d46_d47_unplug_all_unplugs_everything_and_fits_the_usable_region() {
    let mut rig = rig_with(options().requested_size(512 << 20), ram());
    rig.plug(0, 100);
    rig.stamp(0, 4);
    assert!(rig.daemon.api().resize(BLOCK).unwrap().is_success());
    let before = rig.frontend.config().unwrap();
    assert_eq!(before.usable_region_size, 768 << 20, "it does not shrink with the request");
    let channel = rig.channel.take().unwrap();
    let seen = channel.config_changes();
    let garbage = MemRequest::new(RequestType::UnplugAll, u64::MAX, 77).with_padding(0xff);
    assert_eq!(rig.driver.execute(garbage).unwrap().kind(), ResponseType::Ack);
    let after = rig.frontend.config().unwrap();
    assert_eq!((after.plugged_size, after.usable_region_size), (0, (256 << 20) + BLOCK));
    assert_eq!(rig.resident(0, REGION / BLOCK), 0);
    assert!(channel.wait_beyond(seen, common::PATIENCE), "D9: the usable region has changed");
    assert_eq!(rig.driver.unplug_all().unwrap().kind(), ResponseType::Ack, "twice is once");
}

#[test]
fn d52_state_tells_plugged_unplugged_and_mixed() {
    let mut rig = rig();
    rig.plug(1, 2);
    let mut state = |block, nb| {
        let response = rig.execute(RequestType::State, gpa(block), nb);
        assert_eq!(response.kind(), ResponseType::Ack);
        response.state()
    };
    assert_eq!(state(1, 2), BlockState::Plugged);
    assert_eq!(state(3, 500), BlockState::Unplugged);
    assert_eq!(state(0, 2), BlockState::Mixed);
    assert_eq!(state(2, 2), BlockState::Mixed);
    assert_eq!(state(0, 512), BlockState::Mixed);
}

#[test]
fn d29_d30_d36_d42_d48_padding_is_ignored() {
    let mut rig = rig();
    for (kind, block) in [
        (RequestType::Plug, 0),
        (RequestType::State, 0),
        (RequestType::Unplug, 0),
        (RequestType::UnplugAll, 0),
    ] {
        let request = MemRequest::new(kind, gpa(block), 1).with_padding(0xff);
        assert_eq!(rig.driver.execute(request).unwrap().kind(), ResponseType::Ack, "{kind:?}");
    }
}

#[test]
fn d34_d40_d44_d51_while_migrating_changes_are_busy_and_state_answers() {
    let mut rig = rig();
    rig.plug(0, 2);
    rig.stamp(0, 2);
    assert!(rig.daemon.api().set_migration(true).unwrap().is_success());
    assert_eq!(rig.plug(2, 1), ResponseType::Busy);
    assert_eq!(rig.unplug(0, 1), ResponseType::Busy);
    assert_eq!(rig.driver.unplug_all().unwrap().kind(), ResponseType::Busy);
    assert_eq!(rig.execute(RequestType::State, gpa(0), 2).state(), BlockState::Plugged);
    rig.assert_stamped(0, 2);
    let channel = rig.channel.as_ref().unwrap();
    let seen = channel.config_changes();
    assert!(rig.daemon.api().set_migration(false).unwrap().is_success());
    assert!(channel.wait_beyond(seen, common::PATIENCE), "the guest is told that it may go on");
    assert_eq!(rig.plug(2, 1), ResponseType::Ack);
}

#[test]
fn d9_d10_resizes_are_announced_and_plugs_are_not() {
    let mut rig = rig();
    let seen = rig.channel.as_ref().unwrap().config_changes();
    for block in 0..200 {
        rig.plug(block, 1);
    }
    assert_eq!(rig.channel.as_ref().unwrap().config_changes(), seen);
    assert!(rig.daemon.api().resize(BLOCK).unwrap().is_success());
    let channel = rig.channel.as_ref().unwrap();
    assert!(channel.wait_beyond(seen, common::PATIENCE));
}

#[test]
fn f1_f2_f3_f4_every_layout_of_descriptors_is_the_same_request() {
    let mut rig = rig();
    for (name, shape) in Shape::all_valid() {
        for kind in [RequestType::Plug, RequestType::Unplug] {
            let request = MemRequest::new(kind, gpa(3), 5).to_bytes();
            let response = rig.driver.execute_shaped(&request, &shape).unwrap();
            assert_eq!((response.kind(), response.len), (ResponseType::Ack, 10), "{name}");
        }
    }
}

/// A chain that is no request: returned unused, nothing changed, and the next request works.
fn assert_refused(rig: &mut Rig, shape: &Shape) {
    let request = MemRequest::new(RequestType::Plug, gpa(0), 1).to_bytes();
    let response = rig.driver.execute_shaped(&request, shape).unwrap();
    assert_eq!(response.len, 0, "{shape:?}");
    assert!(response.is_untouched(), "{shape:?}");
    assert_eq!(rig.plugged_size(), 0, "{shape:?}");
    assert_eq!(rig.execute(RequestType::State, gpa(0), 1).state(), BlockState::Unplugged);
}

#[test]
fn f5_f6_f7_short_requests_and_short_responses_change_nothing() {
    let mut rig = rig();
    for short in [0, 1, 2, 16, 23] {
        assert_refused(&mut rig, &Shape::new(&[short], &[10]));
    }
    for short in [0, 1, 2, 8, 9] {
        assert_refused(&mut rig, &Shape::new(&[24], &[short]));
    }
    assert_refused(&mut rig, &Shape::new(&[24], &[]));
    assert_refused(&mut rig, &Shape::new(&[], &[10]));
}

/// Adds a chain of segments, waits for it and returns the used length.
fn run_chain(rig: &mut Rig, chain: &[Segment]) -> u32 {
    let ring = rig.driver.ring_mut();
    ring.add(chain).unwrap();
    ring.force_kick().unwrap();
    ring.poll_used(common::PATIENCE).unwrap().len
}

#[test]
fn f6_f7_f8_buffers_that_cannot_be_answered_execute_nothing() {
    let mut rig = rig();
    let (request, response) = (0x20_0000, 0x20_1000);
    let bytes = MemRequest::new(RequestType::Plug, gpa(0), 1).to_bytes();
    rig.ram.write(request, &bytes).unwrap();
    let (read, write) = (Segment::readable, Segment::writable);
    let chains: [Vec<Segment>; 8] = [
        // Writable before readable.
        vec![write(response, 10), read(request, 24)],
        // The response is outside of memory, at its end, wraps, or is huge.
        vec![read(request, 24), write(0x4000_0000, 10)],
        vec![read(request, 24), write(common::BOOT - 5, 10)],
        vec![read(request, 24), write(u64::MAX - 4, 10)],
        vec![read(0x4000_0000, 24), write(response, 10)],
        // Both in blocks that are not plugged.
        vec![read(gpa(3), 24), write(response, 10)],
        vec![read(request, 24), write(gpa(3), 10)],
        // A loop.
        vec![read(request, 1), read(request, 1).with_next(Next::Head)],
    ];
    for chain in chains {
        assert_eq!(run_chain(&mut rig, &chain), 0, "{chain:?}");
        assert_eq!(rig.plugged_size(), 0, "{chain:?}");
    }
    assert_eq!(rig.resident(0, REGION / BLOCK), 0, "unplugged memory was not touched");
    assert_eq!(run_chain(&mut rig, &[read(request, 24), write(response, 10)]), 10);
    assert_eq!(rig.plugged_size(), BLOCK);
}

#[test]
fn f8_a_response_in_a_plugged_block_is_written_but_not_in_one_being_unplugged() {
    let mut rig = rig();
    rig.plug(0, 4);
    let request = 0x20_0000;
    let unplug = |rig: &Rig, block| {
        let bytes = MemRequest::new(RequestType::Unplug, gpa(block), 1).to_bytes();
        rig.ram.write(request, &bytes).unwrap();
    };
    let chain = |addr| [Segment::readable(request, 24), Segment::writable(addr, 10)];
    unplug(&rig, 1);
    assert_eq!(run_chain(&mut rig, &chain(gpa(1) + 64)), 0);
    assert_eq!(rig.plugged_size(), 4 * BLOCK);
    assert_eq!(run_chain(&mut rig, &chain(gpa(2) + 64)), 10);
    assert_eq!(rig.plugged_size(), 3 * BLOCK);
}

#[test]
fn f9_unknown_types_are_errors() {
    let mut rig = rig();
    for kind in [4, 5, 0x100, 0xffff] {
        let request = MemRequest { kind, addr: gpa(0), nb_blocks: 1, padding: 0 };
        assert_eq!(rig.driver.execute(request).unwrap().kind(), ResponseType::Error);
    }
}

#[test]
fn f10_a_broken_avail_index_neither_spins_nor_ends_the_queue() {
    let mut rig = rig();
    let index = rig.driver.ring().next_avail();
    rig.driver.ring().set_avail_idx(index.wrapping_add(5000)).unwrap();
    rig.driver.ring().force_kick().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    rig.driver.ring().set_avail_idx(index).unwrap();
    assert_eq!(rig.plug(0, 1), ResponseType::Ack);
}

#[test]
fn f11_many_requests_in_one_kick_are_answered_in_a_serial_order() {
    let mut rig = rig();
    let requests: Vec<_> = (0..32)
        .flat_map(|block| {
            [RequestType::Plug, RequestType::Plug, RequestType::Unplug]
                .map(|kind| MemRequest::new(kind, gpa(block), 1))
        })
        .take(42)
        .collect();
    let answers = rig.driver.execute_batch(&requests).unwrap();
    for three in answers.chunks(3) {
        let kinds: Vec<_> = three.iter().map(|answer| answer.kind()).collect();
        assert_eq!(kinds, [ResponseType::Ack, ResponseType::Error, ResponseType::Ack]);
    }
}

#[test]
fn requests_for_memory_that_is_not_mapped_are_busy() {
    let boot_only = Layout::new().memfd("boot", 0, common::BOOT).unwrap();
    let mut rig = rig_with(options(), Arc::new(GuestRam::new(boot_only).unwrap()));
    assert_eq!(rig.plug(0, 1), ResponseType::Busy);
    assert_eq!(rig.driver.unplug_all().unwrap().kind(), ResponseType::Ack, "nothing is plugged");
    assert!(rig.daemon.api().device().unwrap()["resident_size"].is_null());
}

#[test]
fn a_region_of_several_files_with_offsets_is_discarded_at_the_right_places() {
    let layout = Layout::new()
        .memfd("boot", 0, common::BOOT)
        .unwrap()
        .memfd_at("region", ADDR, REGION, 3 << 20)
        .unwrap()
        .split(ADDR, 4)
        .unwrap();
    let mut rig = rig_with(options(), Arc::new(GuestRam::new(layout).unwrap()));
    let last = REGION / BLOCK;
    assert_eq!(rig.plug(0, u16::try_from(last).unwrap()), ResponseType::Ack);
    // Around the border of the first two pieces.
    let border = last / 4;
    rig.stamp(border - 4, border + 4);
    assert_eq!(rig.unplug(border - 2, 4), ResponseType::Ack);
    assert_eq!(rig.resident(border - 2, border + 2), 0);
    rig.assert_stamped(border - 4, border - 2);
    rig.assert_stamped(border + 2, border + 4);
}
