//! Migrations that are steered while they run, and told of.

use super::*;
use crate::{Event, Events, ParameterChange};

/// What is told, up to the end.
fn collect(events: &Events) -> Vec<Event> {
    let mut all = Vec::new();
    while let Some(event) = events.next_within(Duration::from_secs(60)) {
        all.push(event);
        if let Event::Status(Status::Completed | Status::Failed | Status::Cancelled) = event {
            break;
        }
    }
    all
}

/// The states of a migration, by QEMU's names.
fn states(events: &[Event]) -> String {
    let states = events.iter().filter_map(|event| match event {
        Event::Status(status) => Some(status.name()),
        _ => None,
    });
    states.collect::<Vec<_>>().join(" ")
}

fn changed(change: ParameterChange) -> impl Fn(&Progress) + Send + Sync {
    move |progress| progress.set_parameters(change).unwrap()
}

/// Migrates a guest with some pages and `parameters`, by a channel that `from` and `to` are the ends of.
fn migrate_paused(
    progress: &Arc<Progress>,
    at_pause: impl FnOnce(&Progress, OwnedFd) + Send + 'static,
) -> (Run, Vec<Event>) {
    let (from, to) = (Side::new(&[0]), Side::new(&[0]));
    fill(&from.region, 0..8, 7);
    let (near, far) = UnixStream::pair().unwrap();
    let events = progress.subscribe(1000);
    let (steered, handle) = (Arc::clone(progress), near.try_clone().unwrap().into());
    let steering = thread::spawn(move || {
        let mut all = Vec::new();
        while all.last() != Some(&Event::Status(Status::PreSwitchover)) {
            all.push(events.next_within(Duration::from_secs(60)).expect("it pauses"));
        }
        at_pause(&steered, handle);
        all.extend(collect(&events));
        all
    });
    let parameters = Parameters { pause_before_switchover: true, ..parameters() };
    let (script, channels) = (Script::default(), (near.into(), far.into()));
    let (guest, seen) = (Witness::default(), Arc::clone(progress));
    let run = migrate_by(parameters, &from, &to, &script, guest, seen, channels);
    if run.outgoing.is_ok() {
        assert_eq!(to.page(7), [7; 4096]);
    }
    (run, steering.join().unwrap())
}

#[test]
fn a_stopped_guest_waits_before_the_switchover_until_it_is_continued() {
    let progress = Arc::new(Progress::new());
    let (run, events) = migrate_paused(&progress, |progress, _| {
        assert_eq!(progress.status(), Status::PreSwitchover);
        progress.continue_switchover();
    });
    run.outgoing.unwrap();
    run.incoming.unwrap();
    assert_eq!(run.source.log(), ["freeze", "stop", "thaw"]);
    assert_eq!(run.destination.log(), ["run"]);
    assert_eq!(states(&events), "none setup active pre-switchover device completed");
    let downtime = run.sent.downtime.unwrap();
    let of_one = |event: &&Event| !matches!(event, Event::Status(_));
    let others: Vec<_> = events.iter().filter(of_one).copied().collect();
    assert_eq!(others, [Event::Pass(1), Event::Switchover(downtime)]);
}

#[test]
fn a_guest_that_waits_before_the_switchover_runs_here_again_after_a_cancel() {
    let progress = Arc::new(Progress::new());
    let (run, events) = migrate_paused(&progress, |progress, _| progress.cancel());
    assert!(matches!(run.outgoing, Err(MigrationError::Cancelled)));
    assert_eq!((run.guest, run.sent.status), (Some(GuestAfter::RunsHere), Status::Cancelled));
    assert_eq!(run.source.log(), ["freeze", "stop", "run", "thaw"]);
    assert!(run.incoming.is_err() && run.destination.log().is_empty());
    assert_eq!(states(&events), "none setup active pre-switchover cancelling cancelled");
}

#[test]
fn a_destination_that_goes_while_the_guest_waits_before_the_switchover_leaves_it_here() {
    let progress = Arc::new(Progress::new());
    let (run, events) = migrate_paused(&progress, |_, channel| {
        UnixStream::from(channel).shutdown(std::net::Shutdown::Read).unwrap();
    });
    assert!(matches!(run.outgoing, Err(MigrationError::ChannelClosed(_))), "{:?}", run.outgoing);
    assert_eq!(run.guest, Some(GuestAfter::RunsHere));
    assert_eq!(run.source.log(), ["freeze", "stop", "run", "thaw"]);
    assert_eq!(states(&events), "none setup active pre-switchover failed");
}

#[test]
fn a_migration_that_would_take_years_ends_once_it_may_send_faster() {
    let (pages, size) = ((16 << 20) / PAGE, 32 << 20);
    let (from, to) = (Side::of_region(size), Side::of_region(size));
    fill(&from.region, 0..pages, 7);
    let progress = Arc::new(Progress::new());
    let (events, steered) = (progress.subscribe(10), Arc::clone(&progress));
    let steering = thread::spawn(move || {
        let active = Event::Status(Status::Active);
        while events.next_within(Duration::from_secs(60)).expect("it begins") != active {}
        changed(ParameterChange { max_bandwidth: Some(0), ..ParameterChange::default() })(&steered);
    });
    // A page in a tenth of a second.
    let parameters = Parameters { max_bandwidth: Some(1), ..parameters() };
    let (near, far) = UnixStream::pair().unwrap();
    let (script, channels) = (Script::default(), (near.into(), far.into()));
    let run = migrate_by(parameters, &from, &to, &script, Witness::default(), progress, channels);
    steering.join().unwrap();
    run.outgoing.unwrap();
    assert_eq!(run.sent.normal, pages);
}

/// A guest that switches its throttling off when it is told so many percent.
#[derive(Default)]
struct Throttled {
    log: Mutex<Vec<u8>>,
    off_at: Option<(u8, Arc<Progress>)>,
}

impl Guest for Throttled {
    fn stop(&self) -> Result<(), String> {
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        Ok(())
    }

    fn throttle(&self, percent: u8) {
        self.log.lock().unwrap().push(percent);
        if let Some((at, progress)) = &self.off_at
            && percent == *at
        {
            let throttle = Some(ThrottleParameters::default());
            changed(ParameterChange { throttle, ..ParameterChange::default() })(progress);
        }
    }
}

/// Sends a guest that writes all the time, and may be stopped for no time at all, in 12 rounds at most. The
/// third look at what it wrote steers the migration.
fn send_restless(
    guest: &Throttled,
    progress: &Arc<Progress>,
    steer: impl Fn(&Progress) + Send + Sync + 'static,
) -> Result<(), OutgoingError> {
    let (from, to) = (Side::new(&[0]), Side::new(&[0]));
    let (near, far) = UnixStream::pair().unwrap();
    let there = receive(&to, &Arc::default(), far);
    let steer = Arc::new(steer);
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> {
        let (progress, steer) = (Arc::clone(progress), Arc::clone(&steer));
        Box::new(Restless::new(&from, move |sync| {
            if sync == 3 {
                steer(&progress);
            }
        }))
    };
    let ram = RamSave::new(&from.blocks, ListOptions::default(), Arc::clone(progress), tracker);
    let outgoing = Outgoing {
        parameters: Parameters { downtime_limit: Duration::ZERO, max_rounds: 12, ..parameters() },
        guest,
        handlers: vec![Box::new(ram.unwrap())],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(progress),
    };
    let sent = outgoing.run(Channel::new(near, Arc::clone(progress)).unwrap());
    let _ = there.join().unwrap();
    sent
}

#[test]
fn a_guest_that_does_not_fit_the_downtime_goes_once_more_is_allowed() {
    let progress = Arc::new(Progress::new());
    let failed = send_restless(&Throttled::default(), &progress, |_| ()).unwrap_err();
    assert!(matches!(failed.error, MigrationError::NotConverging { rounds: 12, .. }));
    let progress = Arc::new(Progress::new());
    let downtime_limit = Some(Duration::from_secs(1000));
    let change = ParameterChange { downtime_limit, ..ParameterChange::default() };
    send_restless(&Throttled::default(), &progress, changed(change)).unwrap();
}

#[test]
fn vcpus_are_slowed_down_once_that_is_asked_for_and_not_any_more_when_it_is_switched_off() {
    let progress = Arc::new(Progress::new());
    let events = progress.subscribe(1000);
    let off_at = Some((40, Arc::clone(&progress)));
    let guest = Throttled { off_at, ..Throttled::default() };
    let throttle = ThrottleParameters {
        auto_converge: true,
        period: Duration::ZERO,
        ..ThrottleParameters::default()
    };
    let change = ParameterChange { throttle: Some(throttle), ..ParameterChange::default() };
    send_restless(&guest, &progress, changed(change)).unwrap_err();
    // At the end it is told in any case.
    assert_eq!(*guest.log.lock().unwrap(), [20, 30, 40, 0, 0]);
    let told = collect(&events);
    let throttled = told.iter().filter_map(|event| match event {
        Event::Throttle(percent) => Some(*percent),
        _ => None,
    });
    assert_eq!(throttled.collect::<Vec<_>>(), [20, 30, 40, 0]);
    let passes = told.iter().filter(|event| matches!(event, Event::Pass(_)));
    assert_eq!(passes.count(), 12);
}

#[test]
fn parameters_that_exclude_each_other_are_refused_before_anything_is_sent() {
    let mut off = parameters();
    off.throttle.max = 100;
    let mut mapped = parameters();
    mapped.configuration.capabilities.push("mapped-ram".to_owned());
    for (parameters, why) in
        [(off, "max-cpu-throttle"), (mapped, "mapped-ram is the layout of a file")]
    {
        let (from, to) = (Side::new(&[0]), Side::new(&[0]));
        let (near, far) = UnixStream::pair().unwrap();
        let watched = far.try_clone().unwrap();
        let (script, channels) = (Script::default(), (near.into(), far.into()));
        let progress = Arc::new(Progress::new());
        watched.set_nonblocking(true).unwrap();
        let guest = Witness::default();
        let run = migrate_by(parameters, &from, &to, &script, guest, progress, channels);
        let error = run.outgoing.unwrap_err();
        assert!(matches!(error, MigrationError::NotPossible(_)), "{error}");
        assert!(error.to_string().contains(why), "{error}");
        assert_eq!((run.guest, run.sent.transferred), (Some(GuestAfter::RunsHere), 0));
        assert!(run.incoming.unwrap_err().to_string().contains("ends"), "nothing came");
    }
}
