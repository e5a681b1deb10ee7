//! The discard channel between processes: the daemon, and clients with the library's
//! `RemoteRamDiscardManager`.

mod common;

use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::discard_channel::{
    all, attach, attach_at, blocks, channel_rig, replay, section, wait_logged,
};
use common::{BLOCK, PATIENCE, REGION, gpa, options, ram, rig_with};
use ram_discard::test_utils::{Calls, Exact, Recorder};
use ram_discard::{
    FreezeFor, MemoryState, RamDiscardListener, RamDiscardManager, RegisterError, Section,
};
use small_vmm::daemon::Daemon;
use small_vmm::driver::{RequestType, ResponseType};
use virtio_mem::discard_channel::{FrameReader, send, wire};
use wire::{ClientMessage, ServerMessage};

#[test]
fn replays_equal_the_blocks_of_the_api() {
    let mut rig = channel_rig();
    rig.plug(0, 1);
    rig.plug(63, 2);
    let early = attach(&rig.daemon);
    rig.plug(100, 200);
    rig.unplug(150, 7);
    rig.plug(511, 1);
    rig.unplug(0, 1);
    let late = attach(&rig.daemon);
    for manager in [&early, &late] {
        for state in MemoryState::BOTH {
            assert_eq!(replay(manager, state), blocks(&rig.daemon, state));
        }
        assert!(manager.is_populated(section(157, 300)).unwrap());
        assert!(!manager.is_populated(section(156, 158)).unwrap());
    }
    assert_eq!(early.words().unwrap(), late.words().unwrap());
    let config = rig.frontend.config().unwrap();
    let sizes = early.sizes().unwrap();
    assert_eq!(sizes.plugged_size, config.plugged_size);
    assert_eq!(sizes.requested_size, config.requested_size);
    assert_eq!(sizes.usable_region_size, config.usable_region_size);
    let geometry = early.geometry();
    assert_eq!((geometry.addr(), geometry.block_size()), (config.addr, BLOCK));
    assert_eq!((geometry.region_size(), geometry.node_id()), (REGION, None));
}

#[test]
fn events_come_in_order_to_every_client() {
    let mut rig = channel_rig();
    let (first, second) = (attach(&rig.daemon), attach(&rig.daemon));
    let (one, other) = (Calls::default(), Calls::default());
    first.register(all(), Recorder::boxed("a", &one)).unwrap();
    first.register(section(2, 4), Recorder::boxed("b", &one)).unwrap();
    second.register(all(), Recorder::boxed("c", &other)).unwrap();
    assert_eq!(rig.plug(1, 2), ResponseType::Ack);
    assert_eq!(rig.plug(8, 1), ResponseType::Ack);
    assert_eq!(rig.unplug(2, 1), ResponseType::Ack);
    let range = section;
    let expected = [
        ("a", true, range(1, 3)),
        ("b", true, range(2, 3)),
        ("a", true, range(8, 9)),
        ("b", false, range(2, 3)),
        ("a", false, range(2, 3)),
    ];
    assert_eq!(one.take(), expected);
    let events = [(true, range(1, 3)), (true, range(8, 9)), (false, range(2, 3))];
    assert_eq!(other.take(), events.map(|(populated, range)| ("c", populated, range)));
}

#[test]
fn unplug_all_and_a_system_reset_are_discards() {
    let mut rig = channel_rig();
    let client = attach(&rig.daemon);
    let calls = Calls::default();
    client.register(all(), Recorder::boxed("dma", &calls)).unwrap();
    for reset in [false, true] {
        rig.plug(0, 2);
        rig.plug(4, 1);
        calls.take();
        if reset {
            assert!(rig.daemon.api().system_reset().unwrap().is_success());
        } else {
            assert_eq!(rig.driver.unplug_all().unwrap().kind(), ResponseType::Ack);
        }
        let expected = [("dma", false, section(4, 5)), ("dma", false, section(0, 2))];
        assert_eq!(calls.take(), expected);
        assert_eq!(replay(&client, MemoryState::Populated), []);
    }
}

#[test]
fn a_refusal_makes_the_guest_busy_and_is_taken_back_everywhere() {
    let mut rig = channel_rig();
    rig.plug(0, 1);
    let clients = [attach(&rig.daemon), attach(&rig.daemon), attach(&rig.daemon)];
    let calls = Calls::default();
    for (client, names) in clients.iter().zip([["a1", "a2"], ["b1", "b2"], ["c1", "c2"]]) {
        for name in names {
            client.register(all(), Recorder::boxed(name, &calls)).unwrap();
        }
    }
    let refuser = Recorder::refusing("refuser", &calls, section(4, 5), "no IOMMU entries left");
    let refuser = clients[1].register(all(), refuser).unwrap();
    calls.take();
    let before = rig.frontend.config().unwrap();
    assert_eq!(rig.plug(2, 4), ResponseType::Busy);
    assert_eq!(rig.frontend.config().unwrap(), before);
    assert_eq!(rig.resident(1, REGION / BLOCK), 0);
    let told = calls.take();
    assert!(told.iter().all(|call| call.2 == section(2, 6)));
    for names in [["a1", "a2"], ["b1", "b2"], ["c1", "c2"]] {
        let own = told.iter().filter(|call| names.contains(&call.0));
        let own: Vec<_> = own.map(|call| (call.0, call.1)).collect();
        let [first, second] = names;
        assert_eq!(own, [(first, true), (second, true), (second, false), (first, false)]);
    }
    for client in &clients {
        assert_eq!(replay(client, MemoryState::Populated), [section(0, 1)]);
    }
    wait_logged(&rig.daemon, "no IOMMU entries left");
    clients[1].unregister(refuser).unwrap();
    assert_eq!(rig.plug(2, 4), ResponseType::Ack);
    assert_eq!(
        replay(&clients[0], MemoryState::Populated),
        blocks(&rig.daemon, MemoryState::Populated)
    );
}

/// Looks at the memory while it is told.
struct Looker(Box<dyn Fn() -> u64 + Send>, Arc<Mutex<Vec<u64>>>);

impl RamDiscardListener for Looker {
    fn name(&self) -> &str {
        "looker"
    }

    fn notify_populate(&mut self, _section: Section) -> Result<(), String> {
        Ok(())
    }

    fn notify_discard(&mut self, _section: Section) {
        self.1.lock().unwrap().push((self.0)());
    }
}

#[test]
fn memory_goes_only_after_the_acknowledgement() {
    let mut rig = channel_rig();
    let client = attach(&rig.daemon);
    let (ram, seen) = (Arc::clone(&rig.ram), Arc::default());
    let resident = move || ram.resident_bytes(gpa(0)..gpa(4)).unwrap();
    client.register(all(), Box::new(Looker(Box::new(resident), Arc::clone(&seen)))).unwrap();
    rig.plug(0, 4);
    rig.stamp(0, 4);
    assert_eq!(rig.unplug(1, 2), ResponseType::Ack);
    assert_eq!(*seen.lock().unwrap(), [4 * BLOCK]);
    assert_eq!(rig.resident(0, 4), 2 * BLOCK);
}

#[test]
fn a_client_killed_while_the_guest_waits_for_it_lets_the_guest_go_on() {
    let mut rig = channel_rig();
    let (stream, mut frames) = raw_client(&rig.daemon);
    let killer = thread::spawn(move || {
        let message: ServerMessage = frames.next(&stream).unwrap();
        assert!(matches!(message, ServerMessage::Populate { .. }));
        // And the connection is gone.
    });
    assert_eq!(rig.plug(0, 1), ResponseType::Ack);
    killer.join().unwrap();
}

/// A client that says nothing any more.
fn raw_client(daemon: &Daemon) -> (UnixStream, FrameReader) {
    let stream = UnixStream::connect(daemon.discard_socket()).unwrap();
    let hello = ClientMessage::Hello { min_version: wire::VERSION, max_version: wire::VERSION };
    send(&stream, &hello).unwrap();
    let mut frames = FrameReader::default();
    let (message, fd) = frames.next_with_fd(&stream, Instant::now() + PATIENCE).unwrap();
    assert!(matches!(message, ServerMessage::Welcome(_)) && fd.is_some());
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    (stream, frames)
}

#[test]
fn a_silent_client_is_dropped_and_the_guest_answered() {
    let mut rig = channel_rig();
    let other = attach(&rig.daemon);
    let (stream, mut frames) = raw_client(&rig.daemon);
    send(&stream, &ClientMessage::Freeze { id: 1 }).unwrap();
    let frozen = frames.next::<ServerMessage>(&stream).unwrap();
    assert!(matches!(frozen, ServerMessage::Frozen { id: 1, freeze: 1, .. }), "{frozen:?}");
    assert_eq!(rig.plug(0, 1), ResponseType::Busy, "frozen, so no client is asked");
    send(&stream, &ClientMessage::Thaw { id: 2, freeze: 1 }).unwrap();
    assert_eq!(frames.next::<ServerMessage>(&stream).unwrap(), ServerMessage::Done { id: 2 });
    assert_eq!(rig.plug(0, 1), ResponseType::Ack);
    let event = frames.next::<ServerMessage>(&stream).unwrap();
    assert!(matches!(event, ServerMessage::Populate { .. }), "{event:?}");
    let goodbye = frames.next::<ServerMessage>(&stream).unwrap();
    let ServerMessage::Goodbye { cause: wire::Farewell::Silent, .. } = goodbye else {
        panic!("{goodbye:?}")
    };
    wait_logged(&rig.daemon, "it did not answer in time");
    let metrics = rig.daemon.api().get("/metrics").unwrap().text;
    assert!(metrics.contains("virtio_mem_discard_clients_dropped_total 1"), "{metrics}");
    assert_eq!(other.lost(), None);
    assert_eq!(replay(&other, MemoryState::Populated), blocks(&rig.daemon, MemoryState::Populated));
}

#[test]
fn a_registration_against_requests_tells_each_block_once() {
    let mut rig = channel_rig();
    let socket = rig.daemon.discard_socket();
    let done = AtomicBool::new(false);
    let nr_blocks = usize::try_from(REGION / BLOCK).unwrap();
    thread::scope(|scope| {
        let clients: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut rounds = 0;
                    loop {
                        // The last round has no requests against it.
                        let last = done.load(Ordering::Acquire);
                        let client = attach_at(&socket);
                        let exact = Exact::new(nr_blocks, BLOCK);
                        let id = client.register(all(), Box::new(exact.clone())).unwrap();
                        if last {
                            assert_eq!(exact.populated(), replay(&client, MemoryState::Populated));
                            return rounds;
                        }
                        client.unregister(id).unwrap();
                        assert_eq!(exact.populated(), []);
                        assert_eq!(exact.told_twice(), 0);
                        rounds += 1;
                    }
                })
            })
            .collect();
        for round in 0..400u64 {
            let first = round * 37 % 500;
            let nb_blocks = u16::try_from(1 + round % 12).unwrap();
            assert_eq!(rig.plug(first, nb_blocks), ResponseType::Ack);
            if round < 395 {
                assert_eq!(rig.unplug(first, nb_blocks), ResponseType::Ack);
            } else {
                rig.unplug(first, 1);
            }
        }
        done.store(true, Ordering::Release);
        for client in clients {
            assert!(client.join().unwrap() > 0);
        }
    });
}

#[test]
fn a_daemon_that_is_killed_is_unavailable_and_its_successor_knows_the_blocks() {
    let mut rig = rig_with(options().discard_socket().state_file(), ram());
    rig.plug(3, 4);
    let client = attach(&rig.daemon);
    client.register(all(), Recorder::boxed("dma", &Calls::default())).unwrap();
    let frozen = client.freeze(FreezeFor::Source).unwrap();
    frozen.check().unwrap();
    rig.daemon.restart().unwrap();
    assert!(frozen.check().is_err(), "a daemon that was restarted has not held it");
    let start = Instant::now();
    while client.lost().is_none() {
        assert!(start.elapsed() < PATIENCE);
        thread::yield_now();
    }
    assert!(client.is_populated(all()).is_err());
    assert!(client.replay_populated(all(), &mut |_| ControlFlow::Continue(())).is_err());
    assert!(client.freeze(FreezeFor::Source).is_err() && client.sizes().is_err());
    assert!(frozen.check().is_err());
    let late = client.register(all(), Recorder::boxed("late", &Calls::default()));
    assert!(matches!(late, Err(RegisterError::Unavailable(_))));
    let successor = attach(&rig.daemon);
    assert_ne!(successor.generation(), client.generation());
    let frozen_again = successor.freeze(FreezeFor::Source).unwrap();
    assert!(frozen.check().is_err(), "the freeze of one daemon is not that of the next");
    frozen_again.thaw().unwrap();
    assert!(frozen.thaw().is_err());
    assert_eq!(replay(&successor, MemoryState::Populated), [section(3, 7)]);
    assert_eq!(rig.daemon.api().device().unwrap()["migration_active"], false);
}

#[test]
fn the_daemon_ends_in_time_while_the_guest_waits_for_a_silent_client() {
    let mut rig = channel_rig();
    let (stream, mut frames) = raw_client(&rig.daemon);
    let kind = RequestType::Plug as u16;
    let request = small_vmm::driver::MemRequest { kind, addr: gpa(0), nb_blocks: 1, padding: 0 };
    rig.driver.submit(&request.to_bytes(), &small_vmm::driver::Shape::default()).unwrap();
    rig.driver.ring_mut().kick().unwrap();
    let event = frames.next::<ServerMessage>(&stream).unwrap();
    assert!(matches!(event, ServerMessage::Populate { .. }), "{event:?}");
    let status = rig.daemon.terminate(Duration::from_secs(2)).unwrap();
    assert!(status.success(), "{status}");
    assert!(!rig.daemon.discard_socket().exists());
}

#[test]
fn a_region_without_blocks_has_a_channel_with_nothing_on_it() {
    let options = small_vmm::daemon::DaemonOptions::new(common::ADDR, 0).block_size(BLOCK);
    let daemon = common::daemon(options.discard_socket());
    let client = attach(&daemon);
    assert!(client.words().unwrap().is_empty());
    let outside = client.register(section(0, 1), Recorder::boxed("dma", &Calls::default()));
    assert!(matches!(outside, Err(RegisterError::OutsideRegion { .. })));
    client.freeze(FreezeFor::Source).unwrap().thaw().unwrap();
}
