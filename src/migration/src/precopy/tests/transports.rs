//! Channels over a transport that the engine does not know.

use super::*;
use crate::channel::faulty::Faulty;

fn over(transport: Faulty, progress: &Arc<Progress>) -> Channel {
    Channel::over(Arc::new(transport), Arc::clone(progress))
}

/// A migration over two transports, of a guest with some pages of data and of zeros.
fn migrate_over_transports(
    near: Faulty,
    far: Faulty,
) -> (Result<(), OutgoingError>, Outcome, Side) {
    let (from, to) = (Side::new(&[1, 4, 5]), Side::new(&[1, 4, 5]));
    fill(&from.region, 64..96, 7);
    fill(&from.region, 96..99, 0);
    fill(&from.boot, 3..5, 5);
    let (here, there) = (Arc::new(Progress::new()), Arc::new(Progress::new()));
    let (source, destination) = (Witness::default(), Witness::default());
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Script>::default() };
    let options = ListOptions::default();
    let ram = RamSave::new(&from.blocks, options, Arc::clone(&here), tracker).unwrap();
    let outgoing = Outgoing {
        parameters: parameters(),
        guest: &source,
        handlers: vec![Box::new(ram)],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&here),
    };
    let (sent, taken) = thread::scope(|scope| {
        let taking = scope.spawn(|| {
            let ram = RamLoad::new(Arc::clone(&to.blocks), options, Arc::clone(&there));
            let incoming = Incoming {
                configuration: Configuration::new("test"),
                guest: &destination,
                handlers: vec![Box::new(ram)],
                devices: &mut NoDevices,
                postcopy: None,
                progress: Arc::clone(&there),
            };
            incoming.run(over(far, &there))
        });
        let sent = outgoing.run(over(near, &here));
        (sent, taking.join().unwrap())
    });
    let runs = |guest: &Witness| guest.log().last() == Some(&"run");
    // One of them has the guest, and never both: at the source it runs unless it was stopped for good.
    assert_eq!(runs(&destination), taken.is_ok());
    let left = source.log().last() == Some(&"stop");
    assert_eq!(left, sent.is_ok(), "{:?}", source.log());
    (sent, taken, to)
}

#[test]
fn a_guest_arrives_whole_over_a_transport_that_takes_and_gives_few_bytes_at_a_time() {
    for step in [17, 61, 5000] {
        let (near, far) = UnixStream::pair().unwrap();
        let (sent, taken, to) =
            migrate_over_transports(Faulty::new(near, step), Faulty::new(far, step));
        sent.unwrap();
        taken.unwrap();
        assert_eq!((to.page(64), to.page(95)), (vec![7; 4096], vec![7; 4096]));
        assert_eq!(to.resident(), (32, 2));
    }
}

#[test]
fn a_transport_that_fails_at_any_byte_gives_the_guest_back_with_its_reason() {
    let mut failures = 0;
    for after in (0..400).step_by(13).chain((400..200_000).step_by(7919)) {
        let (near, far) = UnixStream::pair().unwrap();
        let near = Faulty::new(near, 1000).fails_after(after);
        let (sent, taken, _) = migrate_over_transports(near, Faulty::new(far, 1000));
        match sent {
            Ok(()) => taken.unwrap(),
            Err(failed) => {
                assert!(taken.is_err());
                assert_eq!(failed.guest, GuestAfter::RunsHere, "{after}");
                assert!(failed.to_string().contains("the cable was cut"), "{after}: {failed}");
                failures += 1;
            }
        }
    }
    assert!(failures > 40, "{failures}");
}
