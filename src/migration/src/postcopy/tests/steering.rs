//! Postcopy that is begun, paused, and sped up, on request.

use super::*;
use crate::{Event, Events, ParameterChange, SteeringError};

const PAGES: u64 = 64;

/// The states of a migration to its end, by QEMU's names, each of which is told to `react`.
pub(super) fn states_of(
    events: Events,
    mut react: impl FnMut(Status) + Send + 'static,
) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut states = Vec::new();
        while let Some(event) = events.next_within(PATIENCE) {
            let Event::Status(status) = event else { continue };
            states.push(status.name());
            react(status);
            if matches!(status, Status::Completed | Status::Failed) {
                break;
            }
        }
        states.join(" ")
    })
}

type Pair = (OwnedFd, OwnedFd);

fn pair() -> Pair {
    let (near, far) = UnixStream::pair().unwrap();
    (near.into(), far.into())
}

/// What is not asked for takes minutes, and the guest asks for nothing: nothing comes to its end but by what is asked
/// of it here.
fn slow() -> Parameters {
    let configuration = Configuration::new("test");
    Parameters { max_postcopy_bandwidth: Some(10), ..Parameters::new(configuration) }
}

fn at_full_speed() -> ParameterChange {
    ParameterChange { max_postcopy_bandwidth: Some(0), ..ParameterChange::default() }
}

/// Migrates a guest that asks for nothing; all of it arrives.
fn migrate_steered(
    both: &[Arc<Progress>; 2],
    parameters: Parameters,
    how: (SwitchWhen, bool),
    channels: Vec<Pair>,
) -> Run {
    let (from, to) = (Side::of_region(PAGES * PAGE), Side::of_region(PAGES * PAGE));
    fill(&from.region, 0..PAGES, 7);
    let guest = (Vec::new(), None);
    let run = migrate_told(both, parameters, &from, &to, guest, how, channels);
    assert!(run.outgoing.is_ok() && run.incoming.is_ok(), "{:?} {:?}", run.outgoing, run.incoming);
    assert!((0..PAGES).all(|page| to.page(page) == [7; PAGE as usize]));
    run
}

/// One end of a migration.
#[derive(Clone, Copy, Debug)]
enum End {
    Source,
    Destination,
}

/// Pauses postcopy at `end`, and then has it go as fast as it can; the states there.
fn pause_at(end: End, urgent: bool) -> (Run, String) {
    let both = [Arc::new(Progress::new()), Arc::new(Progress::new())];
    let [source, destination] = both.clone();
    let asked = match end {
        End::Source => Arc::clone(&source),
        End::Destination => destination,
    };
    let not_yet = asked.pause_postcopy().unwrap_err();
    assert_eq!(not_yet, SteeringError::State { what: "be paused", status: Status::None });
    let (steered, mut active) = (Arc::clone(&asked), 0);
    let states = states_of(asked.subscribe(1000), move |status| {
        if status != Status::PostcopyActive {
            return;
        }
        active += 1;
        if active == 1 {
            steered.pause_postcopy().unwrap();
        } else {
            source.set_parameters(at_full_speed()).unwrap();
        }
    });
    let run = migrate_steered(&both, slow(), (SwitchWhen::AtOnce, urgent), vec![pair(), pair()]);
    assert_eq!(run.sent.postcopy_recoveries, 1);
    assert!(asked.pause_postcopy().is_err());
    (run, states.join().unwrap())
}

#[test]
fn postcopy_is_paused_on_request_and_then_goes_as_fast_as_it_is_told_to() {
    for urgent in [false, true] {
        let (run, states) = pause_at(End::Source, urgent);
        assert_eq!(
            states,
            "none setup active device postcopy-active postcopy-paused postcopy-recover \
             postcopy-active completed"
        );
        assert_eq!(run.breaks, ["paused on request"]);
    }
}

#[test]
fn postcopy_that_is_paused_by_the_destination_goes_on_over_other_channels() {
    for urgent in [false, true] {
        let (run, states) = pause_at(End::Destination, urgent);
        assert_eq!(
            states.find("postcopy-active").map(|from| &states[from..]),
            Some("postcopy-active postcopy-paused postcopy-recover postcopy-active completed")
        );
        assert_eq!(run.breaks_there, ["paused on request"]);
        assert_eq!(run.breaks.len(), 1);
    }
}

/// Precopy would take years, and the guest is not let go by itself.
#[test]
fn precopy_is_switched_to_postcopy_on_request_and_the_stopped_guest_waits_until_it_is_continued() {
    let parameters = Parameters {
        max_bandwidth: Some(1),
        pause_before_switchover: true,
        ..Parameters::new(Configuration::new("test"))
    };
    let both = [Arc::new(Progress::new()), Arc::new(Progress::new())];
    let steered = Arc::clone(&both[0]);
    let states = states_of(both[0].subscribe(1000), move |status| match status {
        Status::Active => steered.start_postcopy(),
        Status::PreSwitchover => steered.continue_switchover(),
        _ => {}
    });
    let run = migrate_steered(&both, parameters, (SwitchWhen::Told, false), vec![pair()]);
    assert_eq!(
        states.join().unwrap(),
        "none setup active pre-switchover device postcopy-active completed"
    );
    assert_eq!((run.breaks.len(), run.breaks_there.len()), (0, 0));
}

/// The second channels of both sides lead to nothing that says a word.
#[test]
fn a_recovery_whose_other_side_says_nothing_is_paused_on_request_on_either_side() {
    let both = [Arc::new(Progress::new()), Arc::new(Progress::new())];
    let ((near, silent), (far, silent_too)) = (pair(), pair());
    let mut silent = [silent, silent_too].into_iter();
    let states = both.each_ref().map(|progress| {
        let (steered, source) = (Arc::clone(progress), Arc::clone(&both[0]));
        let (mut active, mut recovers, mut silent) = (0, 0, silent.next());
        states_of(progress.subscribe(1000), move |status| match status {
            Status::PostcopyActive => {
                active += 1;
                match active {
                    // One side is told by the other.
                    1 if Arc::ptr_eq(&steered, &source) => steered.pause_postcopy().unwrap(),
                    1 => {}
                    _ => source.set_parameters(at_full_speed()).unwrap(),
                }
            }
            Status::PostcopyRecover => {
                recovers += 1;
                if recovers == 1 {
                    // One that cannot be paused breaks, which is told otherwise.
                    let _ = steered.pause_postcopy();
                    drop(silent.take());
                }
            }
            _ => {}
        })
    });
    let channels = vec![pair(), (near, far), pair()];
    let run = migrate_steered(&both, slow(), (SwitchWhen::AtOnce, false), channels);
    let paused = "paused on request";
    assert_eq!(run.breaks, [paused, paused]);
    assert_eq!((run.breaks_there.len(), &*run.breaks_there[1]), (2, paused));
    for states in states {
        let states = states.join().unwrap();
        assert_eq!(
            states.find("postcopy-active").map(|from| &states[from..]),
            Some(
                "postcopy-active postcopy-paused postcopy-recover postcopy-paused postcopy-recover \
                 postcopy-active completed"
            )
        );
    }
}
