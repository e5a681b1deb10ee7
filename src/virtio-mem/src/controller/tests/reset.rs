//! System resets.

use super::*;

#[test]
fn system_reset_unplugs_and_discards_everything_even_strays() {
    let rig = rig();
    rig.execute(plug(0, 4));
    rig.fill(0, 8);
    assert_eq!(rig.controller.system_reset().unwrap(), Reset::Done);
    assert_eq!(rig.resident(), 0);
    let config = rig.controller.config();
    assert_eq!((config.plugged_size, config.requested_size), (0, NR * BLOCK));
}

#[test]
fn system_reset_during_migration_is_done_when_it_ends() {
    let rig = rig();
    rig.execute(plug(0, 4));
    rig.controller.freeze(FreezeHolder::Log).unwrap();
    assert_eq!(rig.controller.system_reset().unwrap(), Reset::Deferred);
    assert_eq!(rig.controller.config().plugged_size, 4 * BLOCK);
    assert!(rig.store.reset_pending.load(Ordering::Relaxed), "it outlives the process");
    rig.controller.thaw(FreezeHolder::Log).unwrap();
    assert_eq!(rig.controller.config().plugged_size, 0);
    assert!(!rig.store.reset_pending.load(Ordering::Relaxed));
    rig.controller.freeze(FreezeHolder::Log).unwrap();
    rig.store.fails.store(true, Ordering::Relaxed);
    assert!(matches!(rig.controller.system_reset(), Err(ResetError::Store(_))));
    rig.store.fails.store(false, Ordering::Relaxed);
    rig.controller.thaw(FreezeHolder::Log).unwrap();
    assert_eq!(rig.execute(plug(0, 1)), Response::Ack);
}

/// A request whose buffers were usable when it was read is not answered into memory that a reset has
/// taken away since, whether that was done at once or when migration ended.
#[test]
fn no_answer_is_written_to_memory_that_a_system_reset_has_taken() {
    for deferred in [false, true] {
        let rig = rig();
        rig.execute(plug(0, 4));
        let buffers = [GpaRange::new(ADDR + BLOCK, 10).unwrap()];
        let write = || rig.file.write_all_at(&[1; 10], BLOCK).unwrap();
        assert_eq!(rig.controller.write_answer(&buffers, write), Some(()));
        if deferred {
            rig.controller.freeze(FreezeHolder::Log).unwrap();
            assert_eq!(rig.controller.system_reset().unwrap(), Reset::Deferred);
            assert_eq!(rig.controller.write_answer(&buffers, write), Some(()));
            rig.controller.thaw(FreezeHolder::Log).unwrap();
        } else {
            assert_eq!(rig.controller.system_reset().unwrap(), Reset::Done);
        }
        assert_eq!(rig.controller.write_answer(&buffers, write), None);
        assert_eq!(rig.resident(), 0);
    }
}

/// A reset that comes while an answer is written waits for it, and takes its memory with the rest.
#[test]
fn a_system_reset_does_not_come_while_an_answer_is_written() {
    let rig = rig();
    rig.execute(plug(0, 4));
    std::thread::scope(|scope| {
        let buffers = [GpaRange::new(ADDR + BLOCK, 10).unwrap()];
        let mut reset = None;
        rig.controller.write_answer(&buffers, || {
            reset = Some(scope.spawn(|| rig.controller.system_reset().unwrap()));
            // Time for it to be done, were it not to wait.
            std::thread::sleep(std::time::Duration::from_millis(50));
            rig.file.write_all_at(&[1; 10], BLOCK).unwrap();
        });
        assert_eq!(reset.unwrap().join().unwrap(), Reset::Done);
    });
    assert_eq!((rig.resident(), rig.controller.config().plugged_size), (0, 0));
}

#[test]
fn a_system_reset_that_a_killed_process_put_off_is_done_when_nobody_holds_migration() {
    for (api_migration, plugged) in [(false, 0), (true, 4)] {
        let mut before = device(NR * BLOCK);
        before.apply(&Change::Plug(0..4));
        let start =
            InitialState { reset_pending: true, api_migration, ..InitialState::volatile(before) };
        let controller = MemController::new(start);
        assert_eq!(controller.config().plugged_size, plugged * BLOCK);
        controller.thaw(FreezeHolder::Api).unwrap();
        assert_eq!(controller.config().plugged_size, 0);
    }
}
