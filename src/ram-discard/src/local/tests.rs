use super::transaction::BATCH;
use super::*;
use crate::test_utils::{Call, Calls, Recorder};
use proptest::prelude::*;

mod follow;

const GRANULE: u64 = 4096;

/// A source that is a plain list of granules.
struct Granules(Mutex<Vec<bool>>);

impl Granules {
    fn new(granules: &[bool]) -> Arc<Self> {
        Arc::new(Self(Mutex::new(granules.to_vec())))
    }
}

impl RamDiscardSource for Granules {
    fn region_size(&self) -> u64 {
        self.0.lock().len() as u64 * GRANULE
    }

    fn granularity(&self) -> u64 {
        GRANULE
    }

    fn next_range(&self, section: Section, state: MemoryState) -> Option<Section> {
        naive_ranges(&self.0.lock(), section, state).first().copied()
    }
}

/// Walks byte ranges granule by granule.
fn naive_ranges(granules: &[bool], section: Section, state: MemoryState) -> Vec<Section> {
    let mut ranges: Vec<Section> = Vec::new();
    for (index, _) in granules.iter().enumerate().filter(|(_, p)| **p == state.is_populated()) {
        let granule = Section::new(index as u64 * GRANULE, GRANULE).unwrap();
        let Some(part) = granule.intersection(section) else { continue };
        match ranges.last_mut() {
            Some(last) if last.end() == part.start() => {
                *last = Section::from_bounds(last.start(), part.end()).unwrap();
            }
            _ => ranges.push(part),
        }
    }
    ranges
}

fn granules(from: u64, to: u64) -> Section {
    Section::from_bounds(from * GRANULE, to * GRANULE).unwrap()
}

fn manager_of(sources: &[Arc<Granules>]) -> (LocalRamDiscardManager, Vec<SourceId>) {
    let manager = LocalRamDiscardManager::new(sources[0].region_size());
    let add = |source: &Arc<Granules>| manager.add_source(source.clone()).unwrap();
    let ids = sources.iter().map(add).collect();
    (manager, ids)
}

fn collect(manager: &LocalRamDiscardManager, section: Section, state: MemoryState) -> Vec<Section> {
    let mut ranges = Vec::new();
    let visit = |range| {
        ranges.push(range);
        ControlFlow::Continue(())
    };
    let _ = match state {
        MemoryState::Populated => manager.replay_populated(section, visit),
        MemoryState::Discarded => manager.replay_discarded(section, visit),
    };
    ranges
}

const T: bool = true;
const F: bool = false;

#[test]
fn a_late_listener_is_told_each_populated_run_once() {
    let (manager, _) = manager_of(&[Granules::new(&[T, T, F, T, F, F, T, T])]);
    let calls = Calls::default();
    let id = manager.register(granules(1, 8), Recorder::boxed("dma", &calls)).unwrap();
    let populated = [granules(1, 2), granules(3, 4), granules(6, 8)];
    assert_eq!(*calls.lock(), populated.map(|range| ("dma", true, range)));
    calls.lock().clear();
    manager.unregister(id).unwrap();
    assert_eq!(*calls.lock(), populated.map(|range| ("dma", false, range)));
    assert!(matches!(manager.unregister(id), Err(RegisterError::NotRegistered)));
}

#[test]
fn a_refused_populate_is_taken_back_in_reverse() {
    let (manager, sources) = manager_of(&[Granules::new(&[F; 8])]);
    let calls = Calls::default();
    for name in ["first", "second"] {
        manager.register(granules(0, 8), Recorder::boxed(name, &calls)).unwrap();
    }
    let refusing = Recorder::refusing("third", &calls, granules(2, 3), "no");
    manager.register(granules(0, 8), refusing).unwrap();
    let refused = manager.begin().notify_populate(sources[0], granules(1, 4)).unwrap_err();
    assert_eq!(refused.listener, "third");
    assert_eq!(
        *calls.lock(),
        [
            ("first", true, granules(1, 4)),
            ("second", true, granules(1, 4)),
            ("second", false, granules(1, 4)),
            ("first", false, granules(1, 4)),
        ]
    );
}

#[test]
fn a_listener_that_refuses_at_registration_is_not_registered() {
    let (manager, sources) = manager_of(&[Granules::new(&[T, F, T])]);
    let calls = Calls::default();
    let refusing = Recorder::refusing("dma", &calls, granules(2, 3), "no");
    assert!(matches!(manager.register(granules(0, 3), refusing), Err(RegisterError::Refused(_))));
    let told = [("dma", true, granules(0, 1)), ("dma", false, granules(0, 1))];
    assert_eq!(*calls.lock(), told);
    manager.begin().notify_discard(sources[0], granules(0, 1));
    assert_eq!(calls.lock().len(), 2, "it hears nothing more");
}

#[test]
fn listeners_hear_of_their_section_only() {
    let (manager, sources) = manager_of(&[Granules::new(&[F; 8])]);
    let calls = Calls::default();
    manager.register(granules(2, 4), Recorder::boxed("dma", &calls)).unwrap();
    let mut transaction = manager.begin();
    transaction.notify_populate(sources[0], granules(0, 8)).unwrap();
    transaction.notify_discard(sources[0], granules(4, 8));
    drop(transaction);
    assert_eq!(*calls.lock(), [("dma", true, granules(2, 4))]);
    let outside = manager.register(granules(4, 9), Recorder::boxed("dma", &calls));
    assert!(matches!(outside, Err(RegisterError::OutsideRegion { .. })));
}

#[test]
fn with_several_sources_only_what_all_others_populate_is_announced() {
    let sources = [Granules::new(&[F, F, F, F]), Granules::new(&[T, F, T, T])];
    let (manager, ids) = manager_of(&sources);
    let calls = Calls::default();
    manager.register(granules(0, 4), Recorder::boxed("dma", &calls)).unwrap();
    manager.begin().notify_populate(ids[0], granules(0, 4)).unwrap();
    let announced = [granules(0, 1), granules(2, 4)].map(|range| ("dma", true, range));
    assert_eq!(*calls.lock(), announced);
}

#[test]
fn adding_and_removing_a_source_tells_the_difference() {
    let (manager, _) = manager_of(&[Granules::new(&[T, T, F, T])]);
    let calls = Calls::default();
    manager.register(granules(0, 4), Recorder::boxed("dma", &calls)).unwrap();
    calls.lock().clear();
    let second = manager.add_source(Granules::new(&[T, F, F, F])).unwrap();
    let difference = [granules(1, 2), granules(3, 4)];
    assert_eq!(*calls.lock(), difference.map(|range| ("dma", false, range)));
    calls.lock().clear();
    manager.remove_source(second).unwrap();
    assert_eq!(*calls.lock(), difference.map(|range| ("dma", true, range)));
}

#[test]
fn a_source_stays_when_a_listener_refuses_its_removal() {
    let sources = [Granules::new(&[T, T, T, T]), Granules::new(&[F, T, T, F])];
    let (manager, ids) = manager_of(&sources);
    let calls = Calls::default();
    let refusing = Recorder::refusing("dma", &calls, granules(3, 4), "no");
    manager.register(granules(0, 4), refusing).unwrap();
    calls.lock().clear();
    assert!(manager.remove_source(ids[1]).is_err());
    let told = [("dma", true, granules(0, 1)), ("dma", false, granules(0, 1))];
    assert_eq!(*calls.lock(), told);
    assert_eq!(collect(&manager, granules(0, 4), MemoryState::Populated), [granules(1, 3)]);
}

#[test]
fn a_source_is_one_of_a_manager_once() {
    let source = Granules::new(&[T, F]);
    let (manager, _) = manager_of(std::slice::from_ref(&source));
    assert!(matches!(manager.add_source(source), Err(RegisterError::SourceTwice)));
    manager.add_source(Granules::new(&[T, F])).unwrap();
}

#[test]
fn a_visit_that_breaks_ends_the_replay() {
    let sources = [Granules::new(&[T, F, T, F, T]), Granules::new(&[T, F, T, T, T])];
    for nr_sources in [1, 2] {
        let (manager, _) = manager_of(&sources[..nr_sources]);
        let manager: &dyn RamDiscardManager = &manager;
        for (state, expected) in
            [(MemoryState::Populated, [0, 2]), (MemoryState::Discarded, [1, 3])]
        {
            let mut seen = Vec::new();
            let visit = &mut |range: Section| {
                seen.push(range.start() / GRANULE);
                if seen.len() == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            let all = granules(0, 5);
            let ended = match state {
                MemoryState::Populated => manager.replay_populated(all, visit),
                MemoryState::Discarded => manager.replay_discarded(all, visit),
            };
            assert_eq!(ended.unwrap(), ControlFlow::Break(()));
            assert_eq!(seen, expected);
        }
    }
}

#[test]
fn while_block_state_is_frozen_nothing_is_populated_and_no_source_comes_or_goes() {
    let (manager, ids) = manager_of(&[Granules::new(&[T, F, F, T])]);
    let frozen = manager.freeze(FreezeFor::Source);
    let again = manager.freeze(FreezeFor::Source);
    assert_eq!(frozen.discarded(granules(0, 4)).collect::<Vec<_>>(), [granules(1, 3)]);
    for _ in 0..2 {
        assert!(manager.is_frozen() && manager.begin().is_frozen());
        let refused = manager.begin().notify_populate(ids[0], granules(1, 2)).unwrap_err();
        assert_eq!(refused.reason, "block state is frozen");
        let late = manager.add_source(Granules::new(&[F; 4]));
        assert!(matches!(late, Err(RegisterError::Frozen)));
        assert!(matches!(manager.remove_source(ids[0]), Err(RegisterError::Frozen)));
        frozen.check().unwrap();
    }
    frozen.thaw().unwrap();
    assert!(manager.is_frozen(), "as long as another holds it");
    drop(again);
    assert!(!manager.is_frozen());
    manager.begin().notify_populate(ids[0], granules(1, 2)).unwrap();
    manager.remove_source(ids[0]).unwrap();
}

#[test]
fn a_block_that_changes_all_the_same_is_held_against_the_freeze_for_good() {
    let source = Granules::new(&[T, F, F, T]);
    let (manager, ids) = manager_of(std::slice::from_ref(&source));
    let told = manager.freeze(FreezeFor::Source);
    manager.begin().notify_discard(ids[0], granules(0, 1));
    told.check().unwrap_err();
    let told_of_all = manager.freeze(FreezeFor::Source);
    manager.begin().notify_discard_all(ids[0], &[granules(0, 1), granules(3, 4)]);
    told_of_all.check().unwrap_err();
    // A new one knows nothing of that.
    let silent = manager.freeze(FreezeFor::Source);
    silent.check().unwrap();
    source.0.lock()[1] = T;
    silent.check().unwrap_err();
    source.0.lock()[1] = F;
    silent.check().unwrap_err();
    assert!(told.thaw().is_err() && told_of_all.thaw().is_err() && silent.thaw().is_err());
    assert!(!manager.is_frozen());
}

#[test]
fn for_a_destination_the_state_that_comes_with_memory_may_be_loaded() {
    let source = Granules::new(&[T, F, F, T]);
    let (manager, ids) = manager_of(std::slice::from_ref(&source));
    let frozen = manager.freeze(FreezeFor::Destination);
    let mut transaction = manager.begin();
    assert!(transaction.is_frozen() && !transaction.is_frozen_for_source());
    transaction.notify_populate(ids[0], granules(1, 2)).unwrap();
    source.0.lock()[1] = T;
    transaction.notify_discard(ids[0], granules(0, 1));
    drop(transaction);
    frozen.thaw().unwrap();
}

#[test]
fn a_freeze_outlives_its_manager() {
    let manager = LocalRamDiscardManager::new(GRANULE);
    let frozen = manager.freeze(FreezeFor::Source);
    drop(manager);
    frozen.check().unwrap();
    frozen.thaw().unwrap();
}

#[test]
fn without_sources_all_is_populated() {
    let manager = LocalRamDiscardManager::new(8 * GRANULE);
    assert_eq!(collect(&manager, granules(1, 3), MemoryState::Populated), [granules(1, 3)]);
    assert_eq!(collect(&manager, granules(1, 3), MemoryState::Discarded), []);
}

#[test]
fn a_listener_that_registers_against_requests_sees_each_block_once() {
    const NR: usize = 256;
    let source = Granules::new(&[false; NR]);
    let (manager, ids) = manager_of(std::slice::from_ref(&source));
    let (manager, source) = (&manager, &source);
    for _ in 0..20 {
        source.0.lock().fill(false);
        let calls = Calls::default();
        std::thread::scope(|scope| {
            let requests = scope.spawn(|| {
                for index in 0..NR {
                    let mut transaction = manager.begin();
                    let range = granules(index as u64, index as u64 + 1);
                    transaction.notify_populate(ids[0], range).unwrap();
                    source.0.lock()[index] = true;
                }
            });
            let whole = granules(0, NR as u64);
            let id = manager.register(whole, Recorder::boxed("dma", &calls)).unwrap();
            while !manager.is_populated(whole) {
                let all_done = requests.is_finished() && !manager.is_populated(whole);
                assert!(!all_done, "a request has failed");
                std::thread::yield_now();
            }
            let mut seen = [0; NR];
            for call in calls.lock().iter() {
                let (_, true, range) = call else { panic!("{call:?}") };
                for granule in range.start() / GRANULE..range.end() / GRANULE {
                    seen[usize::try_from(granule).unwrap()] += 1;
                }
            }
            assert_eq!(seen, [1; NR]);
            manager.unregister(id).unwrap();
        });
    }
}

proptest! {
    #[test]
    fn merged_replays_agree_with_the_walk_over_granules(
        sources in prop::collection::vec(prop::collection::vec(any::<bool>(), 48), 1..4),
        window in (0u64..48 * GRANULE, 1u64..48 * GRANULE),
    ) {
        let all: Vec<_> = sources.iter().map(|granules| Granules::new(granules)).collect();
        let (manager, _) = manager_of(&all);
        let both: Vec<bool> = (0..48).map(|i| sources.iter().all(|s| s[i])).collect();
        let end = (window.0 + window.1).min(48 * GRANULE);
        let section = Section::from_bounds(window.0, end).unwrap();
        for state in MemoryState::BOTH {
            prop_assert_eq!(
                collect(&manager, section, state),
                naive_ranges(&both, section, state)
            );
        }
        let whole = naive_ranges(&both, section, MemoryState::Populated) == [section];
        prop_assert_eq!(manager.is_populated(section), whole);
    }
}

/// More sections than listeners are told of at once, of which the last is refused.
#[test]
fn several_sections_are_populated_all_or_in_the_end_none() {
    const SECTIONS: u64 = BATCH as u64 + 2;
    let source = Granules::new(&[false; 2 * SECTIONS as usize]);
    let (manager, ids) = manager_of(&[source]);
    let all = granules(0, 2 * SECTIONS);
    let calls = Calls::default();
    manager.register(all, Recorder::boxed("memory", &calls)).unwrap();
    let last = granules(2 * SECTIONS - 2, 2 * SECTIONS - 1);
    let refuser = manager.register(all, Recorder::refusing("dma", &calls, last, "no")).unwrap();
    let sections: Vec<_> = (0..SECTIONS).map(|n| granules(2 * n, 2 * n + 1)).collect();
    let refused = manager.begin().notify_populate_all(ids[0], &sections).unwrap_err();
    assert_eq!((refused.listener.as_str(), refused.section), ("dma", last));
    let of = |calls: &[Call], name| {
        let mut told = Vec::new();
        for call in calls {
            match *call {
                (to, true, section) if to == name => told.push(section),
                (to, false, section) if to == name => {
                    assert_eq!(told.pop(), Some(section), "in reverse");
                }
                _ => {}
            }
        }
        told
    };
    for name in ["memory", "dma"] {
        assert_eq!(of(&calls.lock(), name), [], "{name} has let go of all");
    }
    manager.unregister(refuser).unwrap();
    calls.lock().clear();
    manager.begin().notify_populate_all(ids[0], &sections).unwrap();
    assert_eq!(of(&calls.lock(), "memory"), sections);
    manager.begin().notify_discard_all(ids[0], &sections);
    assert_eq!(of(&calls.lock(), "memory"), []);
}

#[test]
fn listeners_learn_of_the_end_of_a_change_they_were_told_of() {
    struct Ends(Arc<Mutex<u32>>);
    impl RamDiscardListener for Ends {
        fn name(&self) -> &str {
            "ends"
        }
        fn notify_populate(&mut self, _section: Section) -> Result<(), String> {
            Ok(())
        }
        fn notify_discard(&mut self, _section: Section) {}
        fn notify_change_ended(&mut self) {
            *self.0.lock() += 1;
        }
    }
    let (manager, ids) = manager_of(&[Granules::new(&[false; 8])]);
    let ends = Arc::default();
    manager.register(granules(0, 8), Box::new(Ends(Arc::clone(&ends)))).unwrap();
    drop(manager.begin());
    assert_eq!(*ends.lock(), 0, "nothing was told");
    let mut transaction = manager.begin();
    transaction.notify_populate(ids[0], granules(0, 2)).unwrap();
    transaction.notify_discard(ids[0], granules(0, 2));
    assert_eq!(*ends.lock(), 0);
    drop(transaction);
    assert_eq!(*ends.lock(), 1);
}
