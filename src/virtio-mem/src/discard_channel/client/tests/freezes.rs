//! Freezes are held as long as they are renewed, and the client knows when they were not.

use super::*;

/// Answers freezes, numbered from 1, and their renewals, which it counts, as long as `holds` says so.
fn hold_freezes(
    mut server: Server,
    expiry_ms: u32,
    holds: impl Fn(u64) -> bool + Send + 'static,
) -> (Arc<AtomicU64>, JoinHandle<()>) {
    let renewals = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&renewals);
    let thread = thread::spawn(move || {
        let mut freeze = 0;
        while let Ok(message) = server.frames.next(&server.stream) {
            let event = server.bitmap.event();
            let answer = match message {
                ClientMessage::Freeze { id } => {
                    freeze += 1;
                    ServerMessage::Frozen { id, freeze, event, expiry_ms }
                }
                ClientMessage::Renew { id, .. } if holds(freeze) => {
                    counted.fetch_add(1, Ordering::Relaxed);
                    ServerMessage::Done { id }
                }
                ClientMessage::Thaw { id, .. } if holds(freeze) => ServerMessage::Done { id },
                ClientMessage::Renew { id, .. } | ClientMessage::Thaw { id, .. } => {
                    ServerMessage::Failed { id, reason: "it has ended".to_owned() }
                }
                other => panic!("{other:?}"),
            };
            if send(&server.stream, &answer).is_err() {
                break;
            }
        }
    });
    (renewals, thread)
}

#[test]
fn a_freeze_is_renewed_by_itself() {
    let (mut server, manager) = pair();
    server.acked(section(3, 5), Populated);
    server.settle(section(3, 5), Populated);
    let (renewals, thread) = hold_freezes(server, 3000, |_| true);
    let frozen = manager.freeze(FreezeFor::Source).unwrap();
    let discarded: Vec<_> = frozen.discarded(section(0, NR)).collect();
    assert_eq!(discarded, [section(0, 3), section(5, NR)]);
    let start = Instant::now();
    while renewals.load(Ordering::Relaxed) < 2 {
        assert!(start.elapsed() < PATIENCE, "not renewed");
        thread::sleep(Duration::from_millis(5));
    }
    frozen.check().unwrap();
    // A second one is the same for the server, and ends with the last.
    let again = manager.freeze(FreezeFor::Source).unwrap();
    frozen.thaw().unwrap();
    again.check().unwrap();
    again.thaw().unwrap();
    assert_eq!(manager.lost(), None);
    drop(manager);
    thread.join().unwrap();
}

/// A freeze that the server has ended is lost for good, but the next one is not.
#[test]
fn a_freeze_that_was_not_renewed_in_time_is_lost_for_good() {
    let (server, manager) = pair();
    let (_, thread) = hold_freezes(server, 60_000, |freeze| freeze != 1);
    let frozen = manager.freeze(FreezeFor::Source).unwrap();
    for _ in 0..2 {
        assert_eq!(frozen.check(), Err(FreezeLost("it has ended".to_owned())));
    }
    let next = manager.freeze(FreezeFor::Source).unwrap();
    next.check().unwrap();
    assert!(frozen.check().is_err());
    assert!(frozen.thaw().is_err(), "which does not end the next one");
    next.check().unwrap();
    next.thaw().unwrap();
    drop(manager);
    thread.join().unwrap();
}

#[test]
fn a_renewal_that_is_not_answered_in_time_loses_the_freeze_and_the_connection() {
    let (mut server, manager) = pair();
    thread::scope(|scope| {
        let freeze = scope.spawn(|| manager.freeze(FreezeFor::Source));
        let ClientMessage::Freeze { id } = server.receive() else { panic!() };
        server.send(&server.frozen(id, 500));
        let frozen = freeze.join().unwrap().unwrap();
        assert!(matches!(server.receive(), ClientMessage::Renew { freeze: 1, .. }));
        wait_lost(&manager);
        assert!(frozen.check().is_err());
        assert!(frozen.thaw().is_err());
    });
    assert_unavailable(&manager);
}

#[test]
fn a_freeze_of_which_the_server_says_that_it_has_ended_is_lost() {
    let (mut server, manager) = pair();
    thread::scope(|scope| {
        let freeze = scope.spawn(|| manager.freeze(FreezeFor::Source));
        let ClientMessage::Freeze { id } = server.receive() else { panic!() };
        server.send(&server.frozen(id, 60_000));
        let frozen = freeze.join().unwrap().unwrap();
        server.send(&ServerMessage::Thawed { freeze: 2 });
        server.send(&ServerMessage::Thawed { freeze: 1 });
        // An event after it, which is acknowledged after it was read.
        server.acked(section(0, 1), Populated);
        assert!(frozen.check().unwrap_err().0.contains("the server ended it"));
        // The server is told all the same.
        let thaw = scope.spawn(|| frozen.thaw().unwrap_err().0);
        let ClientMessage::Thaw { id, freeze: 1 } = server.receive() else { panic!() };
        server.send(&ServerMessage::Failed { id, reason: "it has ended".to_owned() });
        assert!(thaw.join().unwrap().contains("the server ended it"));
    });
    assert_eq!(manager.lost(), None);
}

#[test]
fn blocks_that_change_while_they_are_frozen_are_a_lost_freeze() {
    let (mut server, manager) = pair();
    thread::scope(|scope| {
        let freeze = scope.spawn(|| manager.freeze(FreezeFor::Source));
        let ClientMessage::Freeze { id } = server.receive() else { panic!() };
        server.send(&server.frozen(id, 60_000));
        let frozen = freeze.join().unwrap().unwrap();
        server.bitmap.update(0, &[(1..2, true)]);
        let check = scope.spawn(move || frozen.check().unwrap_err().0);
        let ClientMessage::Renew { id, freeze: 1 } = server.receive() else { panic!() };
        server.send(&ServerMessage::Done { id });
        let ClientMessage::Thaw { id, freeze: 1 } = server.receive() else { panic!() };
        server.send(&ServerMessage::Done { id });
        assert_eq!(check.join().unwrap(), "blocks changed while it was held");
        // A map that does not belong to the freeze is not taken.
        let freeze = scope.spawn(|| manager.freeze(FreezeFor::Source).map(drop));
        let ClientMessage::Freeze { id } = server.receive() else { panic!() };
        server.send(&ServerMessage::Frozen { id, freeze: 2, event: 5, expiry_ms: 60_000 });
        assert!(freeze.join().unwrap().unwrap_err().to_string().contains("frozen blocks changed"));
    });
}
