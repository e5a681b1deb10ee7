//! Clients that have the device follow another one.

use super::*;
use ram_discard::MemoryState::{self, Discarded, Populated};
use ram_discard::Section;
use ram_discard::test_utils::{Calls, Recorder};

fn section(first: u64, end: u64) -> Section {
    Section::from_bounds(first * BLOCK, end * BLOCK).unwrap()
}

fn error(followed: Result<(), ram_discard::SourceNotFollowed>) -> String {
    followed.unwrap_err().to_string()
}

#[test]
fn blocks_follow_what_a_client_says_and_all_clients_are_told_of_it() {
    let rig = rig();
    let (client, other) = (rig.attach(), rig.attach());
    assert!(client.follows_source());
    let (own, others) = (Calls::default(), Calls::default());
    client.register(section(0, NR), Recorder::boxed("own", &own)).unwrap();
    other.register(section(0, NR), Recorder::boxed("other", &others)).unwrap();
    let two = [section(0, 3), section(8, 9)];
    client.follow_source_all(&two, Populated).unwrap();
    assert_eq!(rig.controller.plugged_ranges(), two);
    client.follow_source(section(1, 2), Discarded).unwrap();
    let left = [section(0, 1), section(2, 3), section(8, 9)];
    assert_eq!(rig.controller.plugged_ranges(), left);
    for (name, calls) in [("own", &own), ("other", &others)] {
        let told = [(name, true, two[0]), (name, true, two[1]), (name, false, section(1, 2))];
        assert_eq!(*calls.lock(), told);
    }
    for manager in [&client, &other] {
        assert_eq!(manager.words().unwrap(), rig.controller.blocks().words());
    }
}

#[test]
fn what_contradicts_changes_nothing_of_what_is_told_with_it() {
    let rig = rig();
    let client = rig.attach();
    client.follow_source(section(2, 4), Populated).unwrap();
    let before = rig.controller.config();
    for (sections, state, reason) in [
        ([section(8, 9), section(3, 5)], Populated, "is plugged already"),
        ([section(8, 9), section(8, 9)], Populated, "is plugged already"),
        ([section(2, 3), section(4, 5)], Discarded, "is unplugged already"),
        (
            [section(8, 9), Section::new(0, BLOCK / 2).unwrap()],
            Populated,
            "not made of whole blocks",
        ),
        ([section(8, 9), section(NR, NR + 1)], Populated, "not made of whole blocks"),
    ] {
        let error = error(client.follow_source_all(&sections, state));
        assert!(error.contains(reason), "{error}");
    }
    assert_eq!(rig.controller.config(), before);
    assert_eq!(client.lost(), None);
}

#[test]
fn a_client_that_refuses_keeps_the_device_from_following() {
    let rig = rig();
    let (client, other) = (rig.attach(), rig.attach());
    let refuser =
        Recorder::refusing("refuser", &Calls::default(), section(0, 8), "pinned elsewhere");
    other.register(section(0, 8), refuser).unwrap();
    let error = error(client.follow_source_all(&[section(8, 9), section(7, 8)], Populated));
    assert!(error.contains("pinned elsewhere"), "{error}");
    assert_eq!(rig.controller.plugged_ranges(), []);
    client.follow_source(section(8, 9), Populated).unwrap();
}

#[test]
fn nothing_follows_while_the_guest_runs_or_leaves() {
    let rig = rig();
    let client = rig.attach();
    rig.controller.set_guest_runs(true);
    assert_eq!(rig.plug(0, 4), Response::Ack);
    for state in MemoryState::BOTH {
        let error = error(client.follow_source(section(0, 4), state));
        assert!(error.contains("the guest runs here"), "{error}");
    }
    rig.controller.set_guest_runs(false);
    let frozen = client.freeze(FreezeFor::Source).unwrap();
    let error = error(client.follow_source(section(0, 4), Discarded));
    assert!(error.contains("a migration from here is active"), "{error}");
    frozen.thaw().unwrap();
    assert_eq!(rig.controller.plugged_ranges(), [section(0, 4)]);
    client.follow_source(section(0, 4), Discarded).unwrap();
}

#[test]
fn a_client_of_the_version_before_cannot_ask_for_it() {
    let rig = rig();
    let mut raw = Raw::new(&rig);
    raw.say(&ClientMessage::Hello { min_version: 2, max_version: 2 });
    assert!(matches!(raw.hear_with_fd().0, ServerMessage::Welcome(_)));
    let sections = std::iter::once(section(0, 1)).collect();
    raw.say(&ClientMessage::Follow { id: 1, state: Populated, sections });
    raw.assert_left(Farewell::Protocol);
    assert_eq!(rig.controller.plugged_ranges(), []);
}
