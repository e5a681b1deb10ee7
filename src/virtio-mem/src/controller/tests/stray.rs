//! Memory that a guest uses without having plugged it.

use super::*;

fn all() -> Section {
    section(0, NR)
}

#[test]
fn a_sweep_discards_and_counts_what_is_stray_and_leaves_what_is_plugged() {
    let rig = rig();
    rig.execute(plug(2, 4));
    rig.fill(0, 16);
    assert_eq!(rig.controller.sweep_stray(section(0, 8)).unwrap(), 4 * BLOCK);
    assert_eq!(rig.resident(), 12);
    assert_eq!(rig.controller.sweep_stray(all()).unwrap(), 8 * BLOCK);
    assert_eq!(rig.resident(), 4);
    let mut block = vec![0; 4 * usize::try_from(BLOCK).unwrap()];
    rig.file.read_exact_at(&mut block, 2 * BLOCK).unwrap();
    assert!(block.iter().all(|byte| *byte == 0x5a));
    assert_eq!(rig.controller.sweep_stray(all()).unwrap(), 0);
    // A page of a block is stray, too.
    rig.file.write_all_at(&[1], 40 * BLOCK + 5).unwrap();
    assert_eq!(rig.controller.sweep_stray(all()).unwrap(), 4096);
}

#[test]
fn nothing_is_swept_while_migration_is_active_or_a_state_may_come() {
    let rig = rig();
    rig.fill(0, 4);
    // The guest has not run: what is there may belong to blocks of a state that is to come.
    assert!(matches!(rig.controller.sweep_stray(all()), Err(SweepRefused::NotRunning)));
    assert_eq!(rig.resident(), 4);
    rig.execute(plug(0, 4));
    rig.fill(0, 8);
    rig.controller.freeze(FreezeHolder::Log).unwrap();
    assert!(matches!(rig.controller.sweep_stray(all()), Err(SweepRefused::Frozen)));
    assert_eq!(rig.resident(), 8);
    rig.controller.thaw(FreezeHolder::Log).unwrap();
    // Other memory takes the place of what was swept when the guest ran first.
    let other = memfd();
    other.write_all_at(&[1; 4096], 32 * BLOCK).unwrap();
    rig.controller.set_memory(ram(&other)).unwrap();
    assert!(matches!(rig.controller.sweep_stray(all()), Err(SweepRefused::NotRunning)));
}

/// Ends the sweeps, also of a test that fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn blocks_that_are_plugged_while_sweeps_go_on_lose_nothing() {
    const ROUNDS: u64 = 400;
    let rig = rig();
    rig.execute(plug(NR - 1, 1));
    let end = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let swept = scope.spawn(|| {
            let mut swept = 0;
            while !end.load(Ordering::Relaxed) {
                swept += rig.controller.sweep_stray(all()).unwrap();
            }
            swept
        });
        let ended = End(&end);
        for round in 1..=ROUNDS {
            let (block, stray) = (round % 8, 16 + round % 8);
            rig.file.write_all_at(&[0xff; 4096], stray * BLOCK).unwrap();
            assert_eq!(rig.execute(plug(block, 1)), Response::Ack);
            let at = |page: u64| block * BLOCK + page * 64 * 4096;
            for page in 0..4 {
                rig.file.write_all_at(&round.to_le_bytes(), at(page)).unwrap();
            }
            std::thread::yield_now();
            for page in 0..4 {
                let mut bytes = [0; 8];
                rig.file.read_exact_at(&mut bytes, at(page)).unwrap();
                assert_eq!(u64::from_le_bytes(bytes), round, "block {block}, page {page}");
            }
            assert_eq!(rig.execute(unplug(block, 1)), Response::Ack);
        }
        drop(ended);
        let swept = swept.join().unwrap() + rig.controller.sweep_stray(all()).unwrap();
        assert!(swept >= 4096, "{swept}");
    });
    assert_eq!(rig.resident(), 0);
}
