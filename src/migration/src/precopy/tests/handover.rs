//! Between EOF and SHUT 0, over TCP: a peer that went still takes what is written to it.

use super::*;
use crate::test_support::{Late, late};

/// Migrates with hardly any patience.
fn migrate_late(what: Late) -> Run {
    let (from, to) = (Side::new(&[0, 1]), Side::new(&[0, 1]));
    fill(&from.region, 0..10, 1);
    let (script, progress) = (Script::default(), Arc::new(Progress::new()));
    let parameters = Parameters { switchover_timeout: Duration::from_secs(2), ..parameters() };
    let source = Witness::default();
    migrate_by(parameters, &from, &to, &script, source, progress, late(what))
}

#[test]
fn patience_may_be_as_long_as_can_be_said() {
    let (from, to) = (Side::new(&[0, 1]), Side::new(&[0, 1]));
    fill(&from.region, 0..10, 1);
    let parameters = Parameters {
        switchover_timeout: Duration::MAX,
        block_state_timeout: Some(Duration::MAX),
        ..parameters()
    };
    let (script, progress) = (Script::default(), Arc::new(Progress::new()));
    let (near, far) = UnixStream::pair().unwrap();
    let channels = (near.into(), far.into());
    let source = Witness::default();
    let run = migrate_by(parameters, &from, &to, &script, source, progress, channels);
    run.outgoing.unwrap();
    run.incoming.unwrap();
    assert_eq!(run.destination.log(), ["run"]);
}

#[test]
fn a_destination_that_takes_too_long_to_take_the_guest_leaves_it() {
    let run = migrate_late(Late::There);
    assert_eq!(run.source.log(), ["freeze", "stop", "run", "thaw"]);
    assert!(run.destination.log().is_empty());
    assert!(run.outgoing.is_err());
    assert!(matches!(run.incoming, Err(MigrationError::ChannelClosed(_))), "{:?}", run.incoming);
}

#[test]
fn a_destination_that_took_the_guest_is_heard_however_late() {
    let run = migrate_late(Late::Back);
    assert_eq!(run.source.log(), ["freeze", "stop", "thaw"]);
    assert_eq!(run.destination.log(), ["run"]);
    run.outgoing.unwrap();
    run.incoming.unwrap();
}
