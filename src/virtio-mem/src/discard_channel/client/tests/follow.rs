//! Listeners that follow from a freeze on.

use super::*;
use ram_discard::{FollowError, FollowedBlockState, FreezeLost, FrozenBlockState};

impl Server {
    /// Answers a freeze that `manager` asks for.
    fn freezes(&mut self, manager: &RemoteRamDiscardManager) -> FrozenBlockState {
        self.serve(|| manager.freeze(FreezeFor::Source).unwrap(), 60_000)
    }

    /// Answers what `act` asks: all freezes that are asked for are held.
    fn serve<T: Send>(&mut self, act: impl FnOnce() -> T + Send, expiry_ms: u32) -> T {
        thread::scope(|scope| {
            let acting = scope.spawn(act);
            let timeout = Some(Duration::from_millis(5));
            self.stream.set_read_timeout(timeout).unwrap();
            while !acting.is_finished() {
                let answer = match self.frames.next(&self.stream) {
                    Ok(ClientMessage::Freeze { id }) => self.frozen(id, expiry_ms),
                    Ok(
                        ClientMessage::Thaw { id, freeze: 1 }
                        | ClientMessage::Renew { id, .. }
                        | ClientMessage::Serve { id },
                    ) => ServerMessage::Done { id },
                    Ok(ClientMessage::GetSizes { id }) => ServerMessage::Sizes {
                        id,
                        usable_region_size: 0,
                        plugged_size: 0,
                        requested_size: 0,
                    },
                    Ok(other) => panic!("{other:?}"),
                    // Nothing is asked now.
                    Err(_) => continue,
                };
                self.send(&answer);
            }
            self.stream.set_read_timeout(None).unwrap();
            acting.join().unwrap()
        })
    }
}

fn discarded(frozen: &FrozenBlockState) -> Vec<Section> {
    frozen.discarded(section(0, NR)).collect()
}

#[test]
fn a_listener_that_follows_is_told_of_changes_alone_until_block_state_is_frozen_again() {
    let (mut server, manager) = pair();
    server.bitmap.update(0, &[(3..5, true)]);
    let calls = Calls::default();
    let frozen = server.freezes(&manager);
    assert_eq!(discarded(&frozen), [section(0, 3), section(5, NR)]);
    let followed = server.serve(|| frozen.follow(Recorder::boxed("follows", &calls)).unwrap(), 1);
    server.acked(section(8, 10), Populated);
    server.settle(section(8, 10), Populated);
    server.acked(section(3, 4), Discarded);
    server.settle(section(3, 4), Discarded);
    let told = [("follows", true, section(8, 10)), ("follows", false, section(3, 4))];
    assert_eq!(*calls.lock(), told);
    server.serve(|| followed.check().unwrap(), 1);
    let frozen = server.serve(|| followed.freeze().unwrap(), 60_000);
    assert_eq!(discarded(&frozen), [section(0, 4), section(5, 8), section(10, NR)]);
    server.serve(|| frozen.thaw().unwrap(), 1);
    server.acked(section(20, 21), Populated);
    assert_eq!(*calls.lock(), told, "it was taken out");
    assert_eq!(manager.lost(), None);
}

#[test]
fn a_listener_that_follows_may_refuse() {
    let (mut server, manager) = pair();
    let calls = Calls::default();
    let frozen = server.freezes(&manager);
    let refuser = Recorder::refusing("follows", &calls, section(5, 6), "no room");
    let followed = server.serve(|| frozen.follow(refuser).unwrap(), 1);
    let answer = server.event(section(4, 8), Populated);
    assert!(matches!(answer, ClientMessage::Refuse { .. }), "{answer:?}");
    server.acked(section(8, 9), Populated);
    server.settle(section(8, 9), Populated);
    let frozen = server.serve(|| followed.freeze().unwrap(), 60_000);
    assert_eq!(discarded(&frozen), [section(0, 8), section(9, NR)]);
    drop(server);
}

#[test]
fn a_follower_that_is_dropped_is_told_nothing_any_more() {
    let (mut server, manager) = pair();
    let calls = Calls::default();
    let frozen = server.freezes(&manager);
    let followed = server.serve(|| frozen.follow(Recorder::boxed("follows", &calls)).unwrap(), 1);
    drop(followed);
    server.acked(section(0, 4), Populated);
    assert_eq!(*calls.lock(), []);
    // Others at the same manager are.
    manager.register(section(0, NR), Recorder::boxed("stays", &calls)).unwrap();
    server.acked(section(4, 5), Populated);
    assert_eq!(calls.take().len(), 2);
}

/// What a server answers instead of `done` to the thaw.
fn refused_to_thaw(answer: impl FnOnce(u64) -> ServerMessage + Send) -> FollowError {
    let (mut server, manager) = pair();
    let calls = Calls::default();
    let frozen = server.freezes(&manager);
    let reason = thread::scope(|scope| {
        let follow = scope.spawn(|| frozen.follow(Recorder::boxed("follows", &calls)).unwrap_err());
        // It is checked first.
        let ClientMessage::Renew { id, .. } = server.receive() else { panic!() };
        server.send(&ServerMessage::Done { id });
        let ClientMessage::Thaw { id, freeze: 1 } = server.receive() else { panic!() };
        server.send(&answer(id));
        let failed = follow.join().unwrap();
        assert!(failed.frozen.check().is_err(), "it has not been frozen all the time");
        failed.reason
    });
    if manager.lost().is_none() {
        server.acked(section(0, 4), Populated);
    }
    assert_eq!(*calls.lock(), [], "it was taken out");
    reason
}

#[test]
fn a_freeze_that_had_ended_before_is_not_followed() {
    let reason = refused_to_thaw(|id| ServerMessage::Failed { id, reason: "expired".to_owned() });
    assert!(matches!(reason, FollowError::Lost(FreezeLost(why)) if why == "expired"));
    let reason =
        refused_to_thaw(|id| ServerMessage::Frozen { id, freeze: 9, event: 0, expiry_ms: 1 });
    assert!(matches!(reason, FollowError::Lost(_)), "{reason:?}");
}

fn following() -> (Server, RemoteRamDiscardManager, FollowedBlockState, Calls) {
    let (mut server, manager) = pair_with(Duration::from_millis(200));
    let calls = Calls::default();
    let frozen = server.freezes(&manager);
    let followed = server.serve(|| frozen.follow(Recorder::boxed("follows", &calls)).unwrap(), 1);
    (server, manager, followed, calls)
}

#[test]
fn what_follows_is_lost_with_the_connection_for_good() {
    let (server, manager, followed, _) = following();
    drop(server);
    wait_lost(&manager);
    for _ in 0..2 {
        followed.check().unwrap_err();
    }
    followed.freeze().unwrap_err();
    // Also when this side ends it.
    let (_server, manager, followed, _) = following();
    drop(manager);
    followed.check().unwrap_err();
    let (_server, manager, followed, _) = following();
    drop(manager);
    followed.freeze().unwrap_err();
}

#[test]
fn a_server_that_does_not_say_that_it_still_has_this_client_may_have_dropped_it() {
    let (_server, manager, followed, _) = following();
    let lost = followed.check().unwrap_err();
    assert!(lost.to_string().contains("does not answer"), "{lost}");
    assert!(manager.lost().is_some());
}

#[test]
fn a_bitmap_that_is_not_what_was_told_is_no_map() {
    let (mut server, manager, followed, _) = following();
    server.event += 1;
    server.bitmap.update(0, &[(7..8, true)]);
    let lost = server.serve(|| followed.freeze().unwrap_err(), 60_000);
    assert!(lost.to_string().contains("not what it told of"), "{lost}");
    assert!(manager.lost().is_some());
}

#[test]
fn for_a_destination_it_follows_what_has_become_of_block_state() {
    let (mut server, manager) = pair();
    let calls = Calls::default();
    let frozen = manager.freeze(FreezeFor::Destination).unwrap();
    server.acked(section(0, 4), Populated);
    let followed = server.serve(|| frozen.follow(Recorder::boxed("follows", &calls)).unwrap(), 1);
    server.acked(section(1, 2), Discarded);
    assert_eq!(*calls.lock(), [("follows", false, section(1, 2))]);
    let frozen = followed.freeze().unwrap();
    assert_eq!(discarded(&frozen), [section(1, 2), section(4, NR)]);
    frozen.thaw().unwrap();
}

#[test]
fn a_freeze_that_another_still_holds_is_followed() {
    let (mut server, manager) = pair();
    let calls = Calls::default();
    let first = server.freezes(&manager);
    let second = server.serve(|| manager.freeze(FreezeFor::Source).unwrap(), 1);
    let followed = server.serve(|| first.follow(Recorder::boxed("follows", &calls)).unwrap(), 1);
    server.serve(|| second.thaw().unwrap(), 1);
    server.acked(section(0, 4), Populated);
    assert_eq!(*calls.lock(), [("follows", true, section(0, 4))]);
    server.serve(|| followed.check().unwrap(), 1);
}

#[test]
fn a_freeze_that_is_being_renewed_ends_after_that() {
    let (mut server, manager) = pair();
    let frozen = server.serve(|| manager.freeze(FreezeFor::Source).unwrap(), 300);
    // By the thread that does so.
    let ClientMessage::Renew { id, .. } = server.receive() else { panic!() };
    thread::scope(|scope| {
        let thawing = scope.spawn(|| frozen.thaw());
        server.stream.set_read_timeout(Some(Duration::from_millis(30))).unwrap();
        assert!(server.frames.next::<ClientMessage>(&server.stream).is_err(), "it waits");
        server.stream.set_read_timeout(None).unwrap();
        server.send(&ServerMessage::Done { id });
        let ClientMessage::Thaw { id, .. } = server.receive() else { panic!() };
        server.send(&ServerMessage::Done { id });
        thawing.join().unwrap().unwrap();
    });
}

#[test]
fn a_server_that_does_not_serve_the_guest_is_not_followed_for_a_destination() {
    let (mut server, manager) = pair();
    let calls = Calls::default();
    let frozen = manager.freeze(FreezeFor::Destination).unwrap();
    let not = thread::scope(|scope| {
        let follow = scope.spawn(|| frozen.follow(Recorder::boxed("follows", &calls)).unwrap_err());
        let ClientMessage::Serve { id } = server.receive() else { panic!() };
        server.send(&ServerMessage::Failed { id, reason: "no memory arrives".to_owned() });
        follow.join().unwrap()
    });
    assert!(matches!(&not.reason, FollowError::Refused(reason) if reason == "no memory arrives"));
    server.acked(section(0, 4), Populated);
    assert_eq!(*calls.lock(), [], "it was taken out");
    not.frozen.thaw().unwrap();
    let (_server, before) = pair_in(MIN_VERSION, PATIENCE);
    let frozen = before.freeze(FreezeFor::Destination).unwrap();
    assert!(!frozen.can_follow());
    let not = frozen.follow(Recorder::boxed("follows", &calls)).unwrap_err();
    assert!(matches!(not.reason, FollowError::NotPossible), "{not}");
}
