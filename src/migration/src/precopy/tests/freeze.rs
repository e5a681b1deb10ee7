//! Block state that does not stay frozen: what is plugged then is masked, and must not be lost.

use super::*;
use crate::test_support::at_the_verdict;
use ram_discard::LocalRamDiscardManager;

/// Migrates, and has `happens` done while the guest is being stopped: block 5 is plugged and
/// written by then.
fn migrate_and_plug(happens: impl FnOnce(&TestManager) + Send + 'static) -> Run {
    let (from, to) = (Side::new(&[0, 1]), Side::new(&[0, 1]));
    fill(&from.region, 0..10, 1);
    let script = Script::default();
    let writing = (script.clone(), from.region.try_clone().unwrap());
    let manager = Arc::clone(from.manager.as_ref().unwrap());
    let last_words: Box<dyn FnOnce() + Send> = Box::new(move || {
        happens(&manager);
        writing.0.write(&writing.1, 5 * BLOCK / PAGE, 0x55);
    });
    let source = Witness { last_words: Mutex::new(Some(last_words)), ..Witness::default() };
    migrate(&from, &to, &script, source)
}

#[test]
fn a_freeze_that_was_lost_leaves_the_guest_here_with_what_it_plugged() {
    let run = migrate_and_plug(|manager| {
        manager.lose_freezes();
        manager.set(5, true);
    });
    let error = run.outgoing.unwrap_err();
    assert!(matches!(error, MigrationError::FreezeLost(_)), "{error}");
    assert_eq!(run.guest, Some(GuestAfter::RunsHere));
    assert!(error.to_string().contains("the device was restarted"), "{error}");
    assert!(run.incoming.is_err());
    assert_eq!(run.source.log(), ["freeze", "stop", "run", "thaw"]);
    assert!(run.destination.log().is_empty());
    assert_eq!(run.sent.status, Status::Failed);
}

#[test]
fn a_freeze_that_was_lost_is_found_though_all_is_as_it_was() {
    // Plugged, written and unplugged again: what it did meanwhile cannot be known.
    let run = migrate_and_plug(TestManager::lose_freezes);
    assert!(matches!(run.outgoing, Err(MigrationError::FreezeLost(_))));
    assert_eq!(run.source.log(), ["freeze", "stop", "run", "thaw"]);
}

#[test]
fn a_freeze_that_was_lost_while_the_destination_loads_keeps_the_guest_here() {
    let (from, to) = (Side::new(&[0, 1]), Side::new(&[0, 1]));
    fill(&from.region, 0..10, 1);
    let manager = Arc::clone(from.manager.as_ref().unwrap());
    let channels = at_the_verdict(move || manager.lose_freezes());
    let (script, progress) = (Script::default(), Arc::new(Progress::new()));
    let run = migrate_over(&from, &to, &script, Witness::default(), progress, channels);
    assert!(matches!(run.outgoing, Err(MigrationError::FreezeLost(_))), "{:?}", run.outgoing);
    assert_eq!(run.guest, Some(GuestAfter::RunsHere));
    assert!(run.incoming.is_err());
    assert_eq!(run.source.log(), ["freeze", "stop", "run", "thaw"]);
    assert!(run.destination.log().is_empty());
}

#[test]
fn a_source_of_this_process_that_plugs_all_the_same_is_found() {
    let run = migrate_and_plug(|manager| manager.set(5, true));
    let error = run.outgoing.unwrap_err();
    assert!(matches!(error, MigrationError::FreezeLost(_)), "{error}");
    assert_eq!(run.source.log(), ["freeze", "stop", "run", "thaw"]);
}

#[test]
fn a_handler_used_by_hand_does_not_complete_with_a_mask_that_may_be_wrong() {
    let from = Side::new(&[0, 1]);
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Script>::default() };
    let save = || {
        let progress = Arc::new(Progress::new());
        RamSave::new(&from.blocks, ListOptions::default(), progress, tracker).unwrap()
    };
    let mut ram = save();
    assert!(ram.check_frozen().is_err(), "nothing is frozen before it begins");
    let mut sink = CountedStream::default();
    ram.setup(&mut sink).unwrap();
    ram.complete(&mut sink).unwrap();
    let manager = from.manager.as_ref().unwrap();
    manager.lose_freezes();
    for _ in 0..2 {
        assert!(matches!(ram.complete(&mut sink), Err(MigrationError::FreezeLost(_))));
        assert!(matches!(ram.outstanding(), Err(MigrationError::FreezeLost(_))));
    }
    let mut again = save();
    again.setup(&mut sink).unwrap();
    again.complete(&mut sink).unwrap();
}

#[test]
fn a_manager_of_several_blocks_is_frozen_once_and_each_masked_with_its_part() {
    let manager = Arc::new(LocalRamDiscardManager::new(16 * BLOCK));
    let mut blocks = RamBlocks::new();
    let mut files = Vec::new();
    for (id, start) in [("a", 0), ("b", BLOCK)] {
        let file = memfd(4 * BLOCK);
        fill(&file, 0..4 * BLOCK / PAGE, 1);
        let block = migration_block(id, &file, 4 * BLOCK, BlockOptions::migratable());
        block.set_discard_manager(start, Arc::clone(&manager) as Arc<_>).unwrap();
        blocks.register(Arc::new(block)).unwrap();
        files.push(file);
    }
    let side = Side::new(&[1]);
    let test = side.manager.as_ref().unwrap();
    let log = Log::default();
    test.watch(&log);
    let mut blocks_of_one = RamBlocks::new();
    for (id, start) in [("a", 0), ("b", BLOCK)] {
        let block = migration_block(id, &files[0], 4 * BLOCK, BlockOptions::migratable());
        block.set_discard_manager(start, Arc::clone(test) as Arc<_>).unwrap();
        blocks_of_one.register(Arc::new(block)).unwrap();
    }
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Script>::default() };
    for (blocks, pages) in [(&blocks, 8), (&blocks_of_one, 1 + 2)] {
        let progress = Arc::new(Progress::new());
        let mut ram =
            RamSave::new(blocks, ListOptions::default(), Arc::clone(&progress), tracker).unwrap();
        ram.setup(&mut CountedStream::default()).unwrap();
        assert_eq!(ram.dirty_pages(), pages * BLOCK / PAGE);
    }
    assert_eq!(*log.lock().unwrap(), ["freeze", "thaw"]);
}
