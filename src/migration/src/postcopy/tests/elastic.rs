//! Guests that plug and unplug while their memory arrives.

use std::ops::ControlFlow;

use super::steering::states_of;
use super::*;
use crate::stream::{Command, put_command};
use crate::test_support::BLOCK;
use crate::test_utils::relay;

const PAGES: u64 = BLOCK / PAGE;

/// Migrates a guest that unplugs blocks 1, 4 and 5 before anything of them has come, plugs 4 again, and 2 for the first time.
fn migrate(from: &Side, to: &Side, urgent: bool, channels: Vec<(UnixStream, UnixStream)>) -> Run {
    // Little comes that is not asked for, so that the guest is before it.
    migrate_at(1 << 20, from, to, urgent, channels)
}

/// As [`migrate`], with so many bytes a second that are not asked for.
fn migrate_at(
    bandwidth: u64,
    from: &Side,
    to: &Side,
    urgent: bool,
    channels: Vec<(UnixStream, UnixStream)>,
) -> Run {
    let mut expected = vec![UNREAD; 1024];
    for block in [2, 4, 9] {
        expected[block * PAGES as usize..(block + 1) * PAGES as usize].fill(0);
    }
    // What it writes after that, beside which nothing comes.
    expected[4 * PAGES as usize + 5] = 0x44;
    expected[2 * PAGES as usize] = 0x22;
    // Of what stays plugged it sees all.
    expected[600..620].fill(9);
    let mapping = Arc::clone(to.blocks.get("vmem0").unwrap().mapping());
    let (device, region) = (Arc::clone(to.device()), to.region.try_clone().unwrap());
    let acts = Box::new(move || {
        for block in [1, 4, 5] {
            device.unplug(block, &region).unwrap();
        }
        device.plug(4).unwrap();
        device.plug(2).unwrap();
        mapping.write(2 * BLOCK, &[0x22; PAGE as usize]);
        mapping.write(4 * BLOCK + 5 * PAGE, &[0x44; PAGE as usize]);
    });
    let mut parameters = Parameters::new(Configuration::new("test"));
    parameters.max_postcopy_bandwidth = Some(bandwidth);
    let channels = channels.into_iter().map(|(near, far)| (near.into(), far.into())).collect();
    let when = SwitchWhen::AtOnce;
    migrate_acting(parameters, from, to, expected, when, urgent, channels, Some(acts))
}

/// As [`filled`], but for the readers' pages of blocks that are unplugged.
fn sides(from_follows: bool) -> (Side, Side) {
    let (from, _) = filled();
    from.device().elastic.store(from_follows, Ordering::SeqCst);
    (from, Side::elastic(&[1, 4, 5, 9]))
}

fn assert_as_the_guest_has_it(to: &Side, run: Run) {
    run.outgoing.unwrap();
    run.incoming.unwrap();
    assert_eq!(run.wrong, 0);
    let plugged = |block: &usize| to.device().is_plugged(*block);
    assert_eq!((0..16).filter(plugged).collect::<Vec<_>>(), [2, 4, 9]);
    assert_eq!(to.page(4 * PAGES + 5), [0x44; 4096]);
    assert_eq!(to.leaked(), Vec::<usize>::new());
    // A device is served as before.
    to.device().plug(7).unwrap();
}

#[test]
fn what_is_plugged_is_zeros_at_once_and_what_is_unplugged_never_arrives() {
    for (from_follows, urgent) in [(false, false), (true, false), (true, true)] {
        let (from, to) = sides(from_follows);
        let run = migrate(&from, &to, urgent, vec![UnixStream::pair().unwrap()]);
        assert_as_the_guest_has_it(&to, run);
    }
}

#[test]
fn what_is_unplugged_costs_no_bytes_where_the_source_knows_of_that() {
    let (from, to) = sides(true);
    // The guest has unplugged the blocks long before any page of them is due that it does not ask for.
    let run = migrate_at(4 * PAGE, &from, &to, true, vec![UnixStream::pair().unwrap()]);
    // Else it were all of them: 64 pages of block 1 and 54 of block 4.
    assert!(run.sent.normal + run.sent.duplicate < 64, "{:?}", run.sent);
    assert_eq!(run.sent.remaining, 0);
    assert_as_the_guest_has_it(&to, run);
}

/// Source and destination of a connection on which `then` is done when the source has heard what was received, and
/// before the destination hears that it resumes.
fn before_the_resume(then: impl FnOnce() + Send + 'static) -> (UnixStream, UnixStream) {
    let mut resume = Vec::new();
    put_command(&mut resume, &Command::PostcopyResume);
    let mut then = Some(then);
    let relayed = relay(move |bytes| {
        // The source waits for an answer before and after it.
        if bytes == resume
            && let Some(then) = then.take()
        {
            then();
        }
        ControlFlow::Continue(())
    });
    relayed.unwrap()
}

#[test]
fn what_is_unplugged_while_a_source_resumes_costs_no_bytes() {
    let (from, to) = sides(true);
    let mut expected = vec![UNREAD; 1024];
    expected[600..620].fill(9);
    // Little comes that is not asked for, before the channel ends and after that.
    let parameters = Parameters {
        max_postcopy_bandwidth: Some(4 * PAGE),
        ..Parameters::new(Configuration::new("test"))
    };
    let both = [Arc::new(Progress::new()), Arc::new(Progress::new())];
    let (source, mut active) = (Arc::clone(&both[0]), 0);
    let states = states_of(both[0].subscribe(1000), move |status| {
        active += usize::from(status == Status::PostcopyActive);
        if status == Status::PostcopyActive && active == 1 {
            source.pause_postcopy().unwrap();
        }
    });
    let (device, region) = (Arc::clone(to.device()), to.region.try_clone().unwrap());
    let resumes = before_the_resume(move || {
        for block in [1, 4, 5] {
            device.unplug(block, &region).unwrap();
        }
    });
    let channels = [UnixStream::pair().unwrap(), resumes];
    let channels = channels.map(|(near, far)| (near.into(), far.into())).into();
    let how = (SwitchWhen::AtOnce, false);
    let run = migrate_told(&both, parameters, &from, &to, (expected, None), how, channels);
    run.outgoing.unwrap();
    run.incoming.unwrap();
    assert!(states.join().unwrap().contains("postcopy-paused"));
    assert_eq!((run.wrong, run.sent.postcopy_recoveries), (0, 1));
    // Else it were all of them: 64 pages of block 1 and 54 of block 4.
    assert!(run.sent.normal + run.sent.duplicate < 64, "{:?}", run.sent);
    assert_eq!((to.leaked(), run.sent.remaining), (Vec::new(), 0));
}

#[test]
fn a_channel_that_breaks_brings_nothing_back_that_was_unplugged() {
    let (mut limit, mut recovered) = (4000, 0);
    while limit < 400_000 {
        let (from, to) = sides(true);
        let channels = vec![
            breaking(limit).unwrap(),
            breaking(limit / 2 + 300).unwrap(),
            UnixStream::pair().unwrap(),
        ];
        let run = migrate(&from, &to, limit % 2 == 0, channels);
        if run.incoming.is_err() && run.runs.1 == 0 {
            // Before the guest was handed over, it stays.
            assert!(limit < 10_000, "after {limit} bytes: {:?}", run.incoming);
        } else {
            recovered += 1;
            assert_as_the_guest_has_it(&to, run);
        }
        limit += limit / 2;
    }
    assert!(recovered > 5, "{recovered}");
}

#[test]
fn a_destination_whose_device_cannot_be_followed_is_frozen_until_memory_has_arrived() {
    let (from, expected) = filled();
    let to = Side::new(&[1, 4, 5, 9]);
    let device = Arc::clone(to.device());
    let acts = Box::new(move || {
        assert_eq!(device.plug(2).unwrap_err(), "block state is frozen");
    });
    let parameters = Parameters::new(Configuration::new("test"));
    let (near, far) = UnixStream::pair().unwrap();
    let channels = vec![(near.into(), far.into())];
    let when = SwitchWhen::AtOnce;
    let run = migrate_acting(parameters, &from, &to, expected, when, false, channels, Some(acts));
    run.outgoing.unwrap();
    run.incoming.unwrap();
    assert_eq!(run.wrong, 0);
    to.device().plug(2).unwrap();
}
