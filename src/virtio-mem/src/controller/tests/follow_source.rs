//! Block state that follows the device from which the guest comes.

use super::*;
use crate::device::DeviceState;
use ram_discard::MemoryState::{self, Discarded, Populated};
use ram_discard::RamDiscardManager;

fn follow(rig: &Rig, section: Section, state: MemoryState) -> Result<(), String> {
    let manager: &dyn RamDiscardManager = &**rig.controller.manager();
    assert!(manager.follows_source());
    manager.follow_source(section, state).map_err(|error| error.to_string())
}

#[test]
fn blocks_follow_while_memory_arrives_whatever_a_guest_would_be_held_to() {
    let rig = rig();
    rig.controller.resize(0).unwrap();
    let frozen = rig.controller.manager().freeze(FreezeFor::Destination);
    follow(&rig, section(3, 6), Populated).unwrap();
    rig.fill(3, 6);
    follow(&rig, section(4, 5), Discarded).unwrap();
    assert_eq!(rig.controller.plugged_ranges(), [section(3, 4), section(5, 6)]);
    assert_eq!(rig.resident(), 2, "what is discarded holds nothing");
    frozen.thaw().unwrap();
    // The state is one that may be saved and loaded.
    let state = rig.controller.save_state();
    assert!(state.usable_region_size >= 6 * BLOCK);
    rig.controller.load_state(DeviceState { plugged: state.plugged.clone(), ..state }).unwrap();
}

#[test]
fn what_contradicts_or_is_not_made_of_blocks_is_refused_and_changes_nothing() {
    let rig = rig();
    rig.execute(plug(0, 4));
    let before = rig.controller.config();
    let part = Section::new(0, BLOCK / 2).unwrap();
    for (section, state, reason) in [
        (section(3, 5), Populated, "is plugged already"),
        (section(3, 5), Discarded, "is unplugged already"),
        (part, Populated, "is not made of whole blocks"),
        (section(NR, NR + 1), Populated, "is not made of whole blocks"),
    ] {
        let error = follow(&rig, section, state).unwrap_err();
        assert!(error.contains(reason), "{error}");
    }
    assert_eq!(rig.controller.config(), before);
}

#[test]
fn a_listener_or_a_store_that_refuses_leaves_blocks_as_they_were() {
    let rig = rig();
    rig.execute(plug(0, 4));
    rig.controller.listen(Box::new(Refuser(section(8, 9)))).unwrap();
    let before = rig.controller.config();
    assert!(follow(&rig, section(7, 9), Populated).unwrap_err().contains("pinned elsewhere"));
    // The first of three can be saved.
    let first = rig.store.commits.load(Ordering::Relaxed) + 1;
    rig.store.fails_after.store(first, Ordering::Relaxed);
    let sections = [section(5, 6), section(7, 8), section(10, 11)];
    let error = rig.controller.follow_source_all(&sections, Populated).unwrap_err().to_string();
    assert!(error.contains("cannot save"), "{error}");
    assert_eq!(rig.controller.config(), before);
    rig.store.fails_after.store(usize::MAX, Ordering::Relaxed);
    rig.store.fails.store(true, Ordering::Relaxed);
    for (section, state) in [(section(5, 6), Populated), (section(0, 1), Discarded)] {
        assert!(follow(&rig, section, state).unwrap_err().contains("cannot save"));
    }
    rig.store.fails.store(false, Ordering::Relaxed);
    let frozen = rig.controller.manager().freeze(FreezeFor::Source);
    assert!(follow(&rig, section(5, 6), Populated).unwrap_err().contains("frozen"));
    frozen.check().unwrap();
    assert_eq!(rig.controller.config(), before);
}
