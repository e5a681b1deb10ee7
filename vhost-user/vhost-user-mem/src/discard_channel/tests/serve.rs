//! Clients that have the guest served while its memory arrives.

use super::*;
use virtio_mem::controller::FreezeHolder;

fn refused(raw: &mut Raw, id: u64, reason: &str) {
    match raw.hear() {
        ServerMessage::Failed { id: answered, reason: said } => {
            assert_eq!(answered, id);
            assert!(said.contains(reason), "{said}");
        }
        other => panic!("{other:?}"),
    }
}

/// Plugs a block, of which this client is told, and which it acknowledges.
fn plug_with(rig: &Rig, raw: &mut Raw, block: u64) -> Response {
    thread::scope(|scope| {
        let guest = scope.spawn(|| rig.plug(block, 1));
        let ServerMessage::Populate { event, .. } = raw.hear() else { panic!() };
        raw.say(&ClientMessage::Ack { event });
        guest.join().unwrap()
    })
}

fn wait_frozen(rig: &Rig) {
    let start = Instant::now();
    while !rig.controller.migration_active() {
        assert!(start.elapsed() < SOON);
    }
}

#[test]
fn a_guest_is_served_as_long_as_the_client_is_there_and_memory_arrives() {
    let rig = rig();
    let mut raw = Raw::attached(&rig);
    raw.say(&ClientMessage::Serve { id: 1 });
    refused(&mut raw, 1, "no memory arrives");
    rig.controller.freeze(FreezeHolder::Incoming).unwrap();
    assert_eq!(rig.plug(0, 1), Response::Busy);
    raw.say(&ClientMessage::Serve { id: 2 });
    assert_eq!(raw.hear(), ServerMessage::Done { id: 2 });
    assert_eq!(plug_with(&rig, &mut raw, 0), Response::Ack);
    let mut other = Raw::attached(&rig);
    other.say(&ClientMessage::Serve { id: 3 });
    refused(&mut other, 3, "another client");
    drop(raw);
    wait_frozen(&rig);
    assert_eq!(rig.plug(1, 1), Response::Busy);
    let start = Instant::now();
    other.say(&ClientMessage::Serve { id: 4 });
    // The first is forgotten a moment after block state is frozen.
    while other.hear() != (ServerMessage::Done { id: 4 }) {
        assert!(start.elapsed() < SOON);
        other.say(&ClientMessage::Serve { id: 4 });
    }
    assert_eq!(plug_with(&rig, &mut other, 1), Response::Ack);
    rig.controller.thaw(FreezeHolder::Incoming).unwrap();
    drop(other);
    let start = Instant::now();
    while rig.plug(2, 1) != Response::Ack {
        assert!(start.elapsed() < SOON, "its word is not needed any more");
    }
    assert!(!rig.controller.migration_active());
}

#[test]
fn what_the_client_does_not_acknowledge_is_not_populated() {
    let rig = rig();
    rig.controller.freeze(FreezeHolder::Incoming).unwrap();
    let mut raw = Raw::attached(&rig);
    let others = ram_discard::test_utils::Calls::default();
    let other = rig.attach();
    let all = ram_discard::Section::new(0, NR * BLOCK).unwrap();
    let recorder = ram_discard::test_utils::Recorder::boxed("other", &others);
    other.register(all, recorder).unwrap();
    raw.say(&ClientMessage::Serve { id: 1 });
    assert_eq!(raw.hear(), ServerMessage::Done { id: 1 });
    // It does not answer.
    assert_eq!(rig.plug(0, 1), Response::Busy);
    let first = ram_discard::Section::new(0, BLOCK).unwrap();
    assert_eq!(others.take(), [("other", true, first), ("other", false, first)]);
    wait_frozen(&rig);
    assert_eq!(rig.controller.plugged_ranges(), []);
    assert_eq!(rig.dropped(), 1);
}

#[test]
fn a_client_of_the_version_before_cannot_ask_for_it() {
    let rig = rig();
    rig.controller.freeze(FreezeHolder::Incoming).unwrap();
    let mut raw = Raw::new(&rig);
    raw.say(&ClientMessage::Hello { min_version: 2, max_version: 2 });
    assert!(matches!(raw.hear_with_fd().0, ServerMessage::Welcome(_)));
    raw.say(&ClientMessage::Serve { id: 1 });
    raw.assert_left(Farewell::Protocol);
    assert_eq!(rig.plug(0, 1), Response::Busy);
}
