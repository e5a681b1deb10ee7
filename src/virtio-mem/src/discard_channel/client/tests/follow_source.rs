//! A device in another process that follows one elsewhere.

use super::*;
use crate::discard_channel::wire::SECTIONS_MAX;

/// The request that comes, as its id, what the sections become, and how many sections it has.
fn asked(server: &mut Server) -> (u64, MemoryState, usize) {
    match server.receive() {
        ClientMessage::Follow { id, state, sections } => (id, state, sections.len()),
        other => panic!("{other:?}"),
    }
}

/// A section for each second block, more than a frame carries.
fn many() -> Vec<Section> {
    let block = |n: u64| Section::new(n * 8192, 4096).unwrap();
    (0..SECTIONS_MAX as u64 + 10).map(block).collect()
}

#[test]
fn what_is_refused_in_part_is_taken_back() {
    let (mut server, manager) = pair();
    assert!(manager.follows_source());
    thread::scope(|scope| {
        let follows = scope.spawn(|| manager.follow_source_all(&many(), Populated));
        let (id, state, len) = asked(&mut server);
        assert_eq!((state, len), (Populated, SECTIONS_MAX));
        server.send(&ServerMessage::Done { id });
        let (id, state, len) = asked(&mut server);
        assert_eq!((state, len), (Populated, 10));
        server.send(&ServerMessage::Failed { id, reason: "no \x1b[m".to_owned() });
        let (id, state, len) = asked(&mut server);
        assert_eq!((state, len), (Discarded, SECTIONS_MAX));
        server.send(&ServerMessage::Done { id });
        let refused = follows.join().unwrap().unwrap_err().to_string();
        assert!(refused.starts_with("no ") && !refused.contains('\x1b'), "{refused}");
    });
    assert_eq!(manager.lost(), None);
}

#[test]
fn a_device_of_the_version_before_is_not_asked() {
    let (server, manager) = pair_in(2, PATIENCE);
    assert!(!manager.follows_source());
    let refused = manager.follow_source(section(0, 1), Populated).unwrap_err().to_string();
    assert!(refused.contains("of a release"), "{refused}");
    assert_eq!(manager.lost(), None);
    drop(server);
}

#[test]
fn a_device_that_is_lost_or_answers_something_else_follows_nothing() {
    let (server, manager) = pair();
    drop(server);
    assert!(manager.follow_source(section(0, 1), Populated).is_err());
    let (mut server, manager) = pair();
    thread::scope(|scope| {
        let follows = scope.spawn(|| manager.follow_source(section(0, 1), Populated));
        let (id, _, _) = asked(&mut server);
        server.send(&server.frozen(id, 1));
        let refused = follows.join().unwrap().unwrap_err().to_string();
        assert!(refused.contains("broke the protocol"), "{refused}");
    });
}
