//! State that comes from elsewhere.

use super::*;
use crate::device::DeviceState;

fn loaded(requested: u64, plugged: u64) -> DeviceState {
    let (requested_size, usable_region_size) = (requested * BLOCK, NR * BLOCK);
    DeviceState { requested_size, usable_region_size, plugged: vec![plugged] }
}

/// Notes what it is told.
struct Notes(Arc<Mutex<Vec<String>>>);

impl RamDiscardListener for Notes {
    fn name(&self) -> &str {
        "notes"
    }

    fn notify_populate(&mut self, section: Section) -> Result<(), String> {
        self.0.lock().push(format!("+{}", section.start() / BLOCK));
        Ok(())
    }

    fn notify_discard(&mut self, section: Section) {
        self.0.lock().push(format!("-{}", section.start() / BLOCK));
    }
}

#[test]
fn a_loaded_state_is_told_to_listeners_and_unplugged_memory_goes() {
    let rig = rig();
    rig.execute(plug(0, 4));
    rig.fill(0, 10);
    let notes = Arc::new(Mutex::default());
    rig.controller.listen(Box::new(Notes(Arc::clone(&notes)))).unwrap();
    notes.lock().clear();
    rig.controller.load_state(loaded(5, 0b11_0000_1001)).unwrap();
    assert_eq!(*notes.lock(), ["+8", "-1"]);
    assert_eq!(rig.controller.save_state(), loaded(5, 0b11_0000_1001));
    assert_eq!(rig.resident(), 4, "plugged blocks keep what they hold, strays of others go");
    assert_eq!(rig.execute(plug(0, 1)), Response::Error);
    assert_eq!(rig.execute(plug(4, 1)), Response::Ack);
}

#[test]
fn memory_of_unplugged_blocks_goes_once_it_is_mapped() {
    let file = memfd();
    file.write_all_at(&vec![1; 8 << 20], 0).unwrap();
    let controller = MemController::new(InitialState::volatile(device(0)));
    controller.load_state(loaded(2, 0b11)).unwrap();
    controller.set_memory(ram(&file)).unwrap();
    assert_eq!(file.metadata().unwrap().blocks() * 512, 2 * BLOCK);
}

#[test]
fn a_state_that_a_listener_refuses_changes_nothing() {
    let rig = rig();
    rig.execute(plug(0, 4));
    rig.fill(0, 4);
    let notes = Arc::new(Mutex::default());
    rig.controller.listen(Box::new(Notes(Arc::clone(&notes)))).unwrap();
    rig.controller.listen(Box::new(Refuser(section(12, 13)))).unwrap();
    notes.lock().clear();
    // The memory of what is to be plugged has come before.
    [8, 10, 12].into_iter().for_each(|block| rig.fill(block, block + 1));
    let before = rig.controller.save_state();
    let refused = rig.controller.load_state(loaded(5, 0b1_0101_0000_0000));
    assert!(matches!(refused, Err(LoadStateError::Refused(_))));
    assert_eq!(*notes.lock(), ["+8", "+10", "+12", "-12", "-10", "-8"]);
    assert_eq!(rig.controller.save_state(), before);
    assert_eq!(rig.resident(), 7);
    rig.store.fails.store(true, Ordering::Relaxed);
    let failed = rig.controller.load_state(loaded(5, 0b101_0000_1111));
    assert!(matches!(failed, Err(LoadStateError::Store(_))));
    rig.store.fails.store(false, Ordering::Relaxed);
    assert_eq!(rig.resident(), 7);
    rig.controller.load_state(loaded(5, 0b101_0000_1111)).unwrap();
    assert_eq!(rig.resident(), 6, "block 12 was a stray");
    assert_eq!(rig.execute(unplug(8, 1)), Response::Ack);
    assert_eq!(rig.resident(), 5, "discarded as ever");
}

#[test]
fn while_memory_arrives_the_guest_changes_no_block_but_the_state_may_come() {
    let rig = rig();
    rig.controller.freeze(FreezeHolder::Incoming).unwrap();
    assert_eq!(rig.execute(plug(0, 4)), Response::Busy);
    assert_eq!(rig.controller.system_reset().unwrap(), Reset::Deferred);
    rig.controller.load_state(loaded(5, 0b11)).unwrap();
    assert_eq!(rig.controller.config().plugged_size, 2 * BLOCK);
    rig.controller.thaw(FreezeHolder::Incoming).unwrap();
    assert_eq!(rig.controller.config().plugged_size, 2 * BLOCK, "the reset was for what was there");
}

#[test]
fn memory_that_is_mapped_before_its_state_is_left_alone() {
    let file = memfd();
    file.write_all_at(&vec![1; 8 << 20], 0).unwrap();
    let start = InitialState { sweep: true, ..InitialState::volatile(device(0)) };
    let controller = MemController::new(start);
    controller.set_memory(ram(&file)).unwrap();
    controller.load_state(loaded(2, 0b11)).unwrap();
    assert_eq!(file.metadata().unwrap().blocks() * 512, 2 * BLOCK);
}

#[test]
fn a_state_that_cannot_be_saved_or_comes_during_migration_changes_nothing() {
    let rig = rig();
    rig.execute(plug(0, 4));
    rig.fill(0, 4);
    let before = rig.controller.save_state();
    rig.store.fails.store(true, Ordering::Relaxed);
    let failed = rig.controller.load_state(loaded(5, 0b1000));
    assert!(matches!(failed, Err(LoadStateError::Store(_))));
    rig.store.fails.store(false, Ordering::Relaxed);
    rig.controller.freeze(FreezeHolder::Log).unwrap();
    let frozen = rig.controller.load_state(loaded(5, 0b1000));
    assert!(matches!(frozen, Err(LoadStateError::Frozen)));
    rig.controller.thaw(FreezeHolder::Log).unwrap();
    rustix::fs::fcntl_add_seals(&rig.file, rustix::fs::SealFlags::FUTURE_WRITE).unwrap();
    let sealed = rig.controller.load_state(loaded(5, 0b1000));
    assert!(matches!(sealed, Err(LoadStateError::Memory(_))));
    assert_eq!(rig.controller.save_state(), before);
    assert_eq!(rig.resident(), 4);
}

#[test]
fn a_guest_is_served_while_its_memory_arrives_once_that_is_followed() {
    let rig = rig();
    let changes = Arc::new(Changes::default());
    rig.controller.observe(Arc::clone(&changes) as Arc<dyn DeviceObserver>);
    rig.controller.freeze(FreezeHolder::Incoming).unwrap();
    assert_eq!(rig.execute(plug(0, 1)), Response::Busy);
    rig.controller.serve_while_incoming().unwrap();
    assert_eq!(*changes.0.lock(), ["active", "over", "config"]);
    assert_eq!(rig.execute(plug(0, 1)), Response::Ack);
    assert!(rig.controller.memory.is_incoming(), "nothing is taken for what is outstanding");
    rig.controller.thaw(FreezeHolder::Incoming).unwrap();
    assert!(!rig.controller.memory.is_incoming());
    assert_eq!(*changes.0.lock(), ["active", "over", "config", "arrived"], "it had ended");
}

#[test]
fn a_guest_that_was_served_waits_again_and_what_arrived_in_unplugged_blocks_is_discarded_in_the_end()
 {
    let rig = rig();
    rig.controller.freeze_while_incoming().unwrap();
    assert!(!rig.controller.migration_active(), "no memory arrives");
    let changes = Arc::new(Changes::default());
    rig.controller.observe(Arc::clone(&changes) as Arc<dyn DeviceObserver>);
    rig.controller.freeze(FreezeHolder::Incoming).unwrap();
    rig.controller.load_state(loaded(5, 0b1111)).unwrap();
    rig.controller.serve_while_incoming().unwrap();
    assert_eq!(rig.execute(unplug(0, 2)), Response::Ack);
    for _ in 0..2 {
        rig.controller.freeze_while_incoming().unwrap();
        assert_eq!(rig.execute(plug(0, 1)), Response::Busy);
    }
    rig.fill(0, 4);
    changes.0.lock().clear();
    rig.controller.thaw(FreezeHolder::Incoming).unwrap();
    assert_eq!(rig.resident(), 2);
    assert_eq!(*changes.0.lock(), ["arrived", "over", "config"]);
    rig.controller.thaw(FreezeHolder::Incoming).unwrap();
    assert_eq!(changes.0.lock().len(), 3, "once");
    assert_eq!(rig.execute(plug(0, 1)), Response::Ack);
}
