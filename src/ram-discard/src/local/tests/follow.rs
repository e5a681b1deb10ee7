//! A listener that follows from a freeze to the next.

use std::sync::atomic::AtomicBool;

use super::*;
use crate::{FollowError, FollowedBlockState};

/// A frozen manager that has one source.
fn frozen(
    populated: &[bool],
) -> (LocalRamDiscardManager, Arc<Granules>, SourceId, FrozenBlockState) {
    let source = Granules::new(populated);
    let (manager, ids) = manager_of(std::slice::from_ref(&source));
    let frozen = manager.freeze(FreezeFor::Source);
    (manager, source, ids[0], frozen)
}

fn follow(frozen: FrozenBlockState, calls: &Calls) -> FollowedBlockState {
    frozen.follow(Recorder::boxed("migration", calls)).unwrap()
}

/// As a device does.
fn set(manager: &LocalRamDiscardManager, source: &Granules, id: SourceId, at: u64, to: bool) {
    let mut transaction = manager.begin();
    if to {
        transaction.notify_populate(id, granules(at, at + 1)).unwrap();
    }
    source.0.lock()[at as usize] = to;
    if !to {
        transaction.notify_discard(id, granules(at, at + 1));
    }
}

fn all(frozen: &FrozenBlockState) -> Vec<Section> {
    frozen.discarded(granules(0, 4)).collect()
}

#[test]
fn a_listener_that_follows_is_told_of_every_change_between_two_freezes_and_of_nothing_else() {
    let (manager, source, id, frozen) = frozen(&[T, F, F, T]);
    let calls = Calls::default();
    let followed = follow(frozen, &calls);
    assert!(!manager.is_frozen());
    assert_eq!(calls.take(), [], "it has the map");
    set(&manager, &source, id, 1, T);
    set(&manager, &source, id, 3, F);
    followed.check().unwrap();
    let told = [("migration", T, granules(1, 2)), ("migration", F, granules(3, 4))];
    assert_eq!(calls.take(), told);
    let frozen = followed.freeze().unwrap();
    assert!(manager.is_frozen());
    assert_eq!(all(&frozen), [granules(2, 4)]);
    // Again and again.
    let followed = follow(frozen, &calls);
    set(&manager, &source, id, 2, T);
    let frozen = followed.freeze().unwrap();
    assert_eq!(all(&frozen), [granules(3, 4)]);
    assert_eq!(calls.take(), [("migration", T, granules(2, 3))]);
    frozen.thaw().unwrap();
    set(&manager, &source, id, 2, F);
    assert_eq!(calls.take(), [], "it was taken out");
}

#[test]
fn a_follower_that_is_dropped_is_told_nothing_any_more_and_freezes_nothing() {
    let (manager, source, id, frozen) = frozen(&[T, F, F, T]);
    let calls = Calls::default();
    drop(follow(frozen, &calls));
    set(&manager, &source, id, 1, T);
    assert_eq!(calls.take(), []);
    assert!(!manager.is_frozen());
}

#[test]
fn a_source_that_changes_without_a_word_loses_its_follower_for_good() {
    let (manager, source, id, frozen) = frozen(&[T, F, F, T]);
    let followed = follow(frozen, &Calls::default());
    source.0.lock()[2] = true;
    let lost = followed.check().unwrap_err();
    source.0.lock()[2] = false;
    assert_eq!(followed.check(), Err(lost.clone()));
    assert_eq!(followed.freeze().unwrap_err(), lost);
    assert!(!manager.is_frozen());
    // Also one that was not asked meanwhile.
    let calls = Calls::default();
    let followed = follow(manager.freeze(FreezeFor::Source), &calls);
    source.0.lock()[2] = true;
    assert_eq!(followed.freeze().unwrap_err(), lost);
    assert!(!manager.is_frozen());
    set(&manager, &source, id, 1, T);
    assert_eq!(calls.take(), [], "it was taken out");
}

#[test]
fn a_follower_that_refuses_is_not_taken_to_have_populated() {
    let (manager, _source, id, frozen) = frozen(&[T, F, F, T]);
    let first = Calls::default();
    manager.register(granules(0, 4), Recorder::boxed("dma", &first)).unwrap();
    first.take();
    let follower =
        Recorder::refusing("migration", &Calls::default(), granules(1, 2), "no room there");
    let followed = frozen.follow(follower).unwrap();
    let refused = manager.begin().notify_populate(id, granules(1, 2)).unwrap_err();
    assert_eq!((&*refused.listener, &*refused.reason), ("migration", "no room there"));
    assert_eq!(first.take(), [("dma", T, granules(1, 2)), ("dma", F, granules(1, 2))]);
    assert_eq!(all(&followed.freeze().unwrap()), [granules(1, 3)]);
}

#[test]
fn a_freeze_that_was_lost_is_not_followed_and_another_manager_can_only_freeze() {
    let (manager, source, _, frozen) = frozen(&[T, F, F, T]);
    source.0.lock()[0] = false;
    let not = frozen.follow(Recorder::boxed("migration", &Calls::default())).unwrap_err();
    assert!(matches!(not.reason, FollowError::Lost(_)), "{not}");
    assert!(manager.is_frozen());
    assert!(not.frozen.thaw().is_err());
    assert!(!manager.is_frozen());

    struct OnlyFreezes(Arc<AtomicBool>);
    impl Freeze for OnlyFreezes {
        fn check(&self) -> Result<(), FreezeLost> {
            Ok(())
        }
        fn thaw(&mut self) -> Result<(), FreezeLost> {
            self.0.store(true, Ordering::Relaxed);
            Ok(())
        }
    }
    let thawed = Arc::new(AtomicBool::new(false));
    let frozen = FrozenBlockState::new(Vec::new(), Box::new(OnlyFreezes(Arc::clone(&thawed))));
    let not = frozen.follow(Recorder::boxed("migration", &Calls::default())).unwrap_err();
    assert!(matches!(not.reason, FollowError::NotPossible), "{not}");
    assert!(!thawed.load(Ordering::Relaxed), "it is frozen as before");
    not.frozen.thaw().unwrap();
    assert!(thawed.load(Ordering::Relaxed));
}

#[test]
fn what_another_party_has_frozen_stays_frozen_while_a_listener_follows() {
    let (manager, source, id, frozen) = frozen(&[T, F, F, T]);
    let other = manager.freeze(FreezeFor::Source);
    let followed = follow(frozen, &Calls::default());
    assert!(manager.is_frozen());
    other.thaw().unwrap();
    assert!(!manager.is_frozen());
    set(&manager, &source, id, 0, F);
    assert_eq!(all(&followed.freeze().unwrap()), [granules(0, 3)]);
}

#[derive(Default)]
struct Told(Arc<Mutex<Vec<&'static str>>>);

impl FreezeObserver for Told {
    fn frozen(&self) {
        self.0.lock().push("frozen");
    }

    fn thawed(&self, _transaction: &mut Transaction<'_>) {
        self.0.lock().push("thawed");
    }
}

#[test]
fn the_observer_sees_the_end_of_the_first_freeze_and_the_second() {
    let (manager, _) = manager_of(&[Granules::new(&[T, F, F, T])]);
    let told = Told::default();
    let log = Arc::clone(&told.0);
    manager.observe_freezes(Box::new(told));
    let followed = follow(manager.freeze(FreezeFor::Destination), &Calls::default());
    assert_eq!(*log.lock(), ["frozen", "thawed"]);
    followed.freeze().unwrap().thaw().unwrap();
    assert_eq!(*log.lock(), ["frozen", "thawed", "frozen", "thawed"]);
}

#[test]
fn a_region_without_bytes_is_followed() {
    let manager = LocalRamDiscardManager::new(0);
    let followed = follow(manager.freeze(FreezeFor::Source), &Calls::default());
    followed.check().unwrap();
    followed.freeze().unwrap().thaw().unwrap();
}
