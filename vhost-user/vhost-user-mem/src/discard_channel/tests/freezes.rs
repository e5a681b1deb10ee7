//! Freezes of clients, which end unless they are renewed.

use super::*;

fn is_frozen(message: &ServerMessage, number: u64) -> bool {
    matches!(message, ServerMessage::Frozen { freeze, .. } if *freeze == number)
}

#[test]
fn a_freeze_that_is_not_renewed_ends_and_its_client_is_told() {
    let limits = Limits { freeze_expiry: Duration::from_secs(1), ..LIMITS };
    let rig = rig_with(NR, BLOCK, limits);
    let mut raw = Raw::attached(&rig);
    raw.say(&ClientMessage::Freeze { id: 1 });
    let frozen = ServerMessage::Frozen { id: 1, freeze: 1, event: 0, expiry_ms: 1000 };
    assert_eq!(raw.hear(), frozen);
    assert_eq!(rig.plug(0, 1), Response::Busy);
    // Requests that keep coming do not put it off.
    let start = Instant::now();
    while raw.hear_thawed_or_sizes() {
        assert!(start.elapsed() < SOON, "it does not end");
    }
    raw.say(&ClientMessage::Renew { id: 2, freeze: 1 });
    assert!(matches!(raw.hear(), ServerMessage::Failed { id: 2, .. }));
    raw.say(&ClientMessage::Thaw { id: 3, freeze: 1 });
    assert!(matches!(raw.hear(), ServerMessage::Failed { id: 3, .. }));
    while rig.controller.migration_active() {
        assert!(start.elapsed() < SOON);
    }
    assert_eq!(rig.metric("discard_freezes_expired_total"), 1.0);
    thread::scope(|scope| {
        let guest = scope.spawn(|| rig.plug(0, 1));
        let ServerMessage::Populate { event, .. } = raw.hear() else { panic!() };
        raw.say(&ClientMessage::Ack { event });
        assert_eq!(guest.join().unwrap(), Response::Ack);
    });
    raw.say(&ClientMessage::Freeze { id: 4 });
    assert!(is_frozen(&raw.hear(), 2), "another freeze has another number");
}

#[test]
fn a_freeze_that_is_renewed_lasts() {
    let limits = Limits { freeze_expiry: Duration::from_secs(2), ..LIMITS };
    let rig = rig_with(NR, BLOCK, limits);
    let mut raw = Raw::attached(&rig);
    raw.say(&ClientMessage::Freeze { id: 0 });
    assert!(is_frozen(&raw.hear(), 1));
    for id in 1..=4 {
        thread::sleep(Duration::from_millis(700));
        raw.say(&ClientMessage::Renew { id, freeze: 1 });
        assert_eq!(raw.hear(), ServerMessage::Done { id });
    }
    assert_eq!(rig.plug(0, 1), Response::Busy);
    raw.say(&ClientMessage::Thaw { id: 5, freeze: 1 });
    assert_eq!(raw.hear(), ServerMessage::Done { id: 5 });
    assert!(!rig.controller.migration_active());
}
