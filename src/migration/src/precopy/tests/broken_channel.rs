//! Channels that break or stand still in the middle of a migration.

use std::io::{Read, Write};

use super::*;
use crate::test_support::wait_until;

/// Passes bytes on until `limit` of them went from source to destination, then breaks the channel.
fn breaking_relay(limit: usize) -> (UnixStream, UnixStream, thread::JoinHandle<bool>) {
    let (source, near) = UnixStream::pair().unwrap();
    let (far, destination) = UnixStream::pair().unwrap();
    let (mut back_from, mut back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
    let back = thread::spawn(move || {
        let _ = io::copy(&mut back_from, &mut back_to);
        let _ = back_to.shutdown(std::net::Shutdown::Both);
    });
    let relay = thread::spawn(move || {
        let (mut near, mut far) = (near, far);
        let mut buffer = vec![0; 4096];
        let mut left = limit;
        let mut broke = false;
        loop {
            let read = near.read(&mut buffer).unwrap_or(0);
            let pass = read.min(left);
            if read == 0 || far.write_all(&buffer[..pass]).is_err() {
                break;
            }
            left -= pass;
            if left == 0 {
                broke = true;
                break;
            }
        }
        let _ = far.shutdown(std::net::Shutdown::Both);
        let _ = near.shutdown(std::net::Shutdown::Both);
        back.join().unwrap();
        broke
    });
    (source, destination, relay)
}

#[test]
fn a_channel_broken_anywhere_leaves_the_guest_on_exactly_one_side() {
    let from = Side::new(&[0, 1, 2]);
    fill(&from.region, 0..100, 1);
    let mut limit = 1;
    let mut failures = 0;
    loop {
        let to = Side::new(&[0, 1, 2]);
        let (source, destination, relay) = breaking_relay(limit);
        let progress = Arc::new(Progress::new());
        let script = Script::default();
        let channels = (source, destination);
        let run = migrate_over(&from, &to, &script, Witness::default(), progress, channels);
        let broke = relay.join().unwrap();
        let here = run.source.log();
        let runs_here = here.iter().filter(|&&call| call == "stop").count()
            == here.iter().filter(|&&call| call == "run").count();
        let runs_there = run.destination.log() == ["run"];
        assert!(runs_here != runs_there, "after {limit} bytes: here {here:?}, there {runs_there}");
        assert_eq!(run.outgoing.is_ok(), runs_there, "after {limit} bytes");
        assert_eq!(here.last(), Some(&"thaw"));
        if !broke {
            assert!(runs_there);
            break;
        }
        failures += 1;
        limit += if limit < 200 { 7 } else { 9973 };
    }
    assert!(failures > 40, "{failures}");
}

#[test]
fn cancelled_while_the_destination_is_stuck_the_guest_runs_on() {
    let from = Side::new(&[0, 1, 2]);
    fill(&from.region, 0..192, 1);
    let (source, _stuck) = UnixStream::pair().unwrap();
    let progress = Arc::new(Progress::new());
    let guest = Arc::new(Witness::default());
    from.manager.as_ref().unwrap().watch(&guest.log);
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Script>::default() };
    let ram = RamSave::new(&from.blocks, ListOptions::default(), Arc::clone(&progress), tracker);
    let outgoing = Outgoing {
        parameters: parameters(),
        guest: &*guest,
        handlers: vec![Box::new(ram.unwrap())],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            wait_until(|| progress.status() == Status::Active);
            progress.cancel();
        });
        let result = outgoing.run(Channel::new(source, Arc::clone(&progress)).unwrap());
        let failed = result.unwrap_err();
        assert!(matches!(failed.error, MigrationError::Cancelled));
        assert_eq!(failed.guest, GuestAfter::RunsHere);
    });
    assert_eq!(progress.status(), Status::Cancelled);
    let log = guest.log();
    assert_eq!(log.first(), Some(&"freeze"));
    assert_eq!(log.last(), Some(&"thaw"));

    // The next attempt works.
    let to = Side::new(&[0, 1, 2]);
    let run = migrate(&from, &to, &Script::default(), Witness::default());
    run.outgoing.unwrap();
    assert_eq!(to.page(191), [1; 4096]);
}
