//! Postcopy that is paused, and sped up, on request.

use super::*;
use crate::{Event, ParameterChange, SteeringError};

const PAGES: u64 = 64;

/// What is not asked for takes minutes, and the guest asks for nothing: nothing comes to its end but by
/// what is asked of it here.
#[test]
fn postcopy_is_paused_on_request_and_then_goes_as_fast_as_it_is_told_to() {
    for urgent in [false, true] {
        let (from, to) = (Side::of_region(PAGES * PAGE), Side::of_region(PAGES * PAGE));
        fill(&from.region, 0..PAGES, 7);
        let parameters = Parameters {
            max_postcopy_bandwidth: Some(10),
            ..Parameters::new(Configuration::new("test"))
        };
        let progress = Arc::new(Progress::new());
        let not_yet = progress.pause_postcopy().unwrap_err();
        assert_eq!(not_yet, SteeringError::State { what: "be paused", status: Status::None });
        let events = progress.subscribe(1000);
        let steered = Arc::clone(&progress);
        let steering = thread::spawn(move || {
            let mut states = Vec::new();
            while let Some(event) = events.next_within(Duration::from_secs(60)) {
                let Event::Status(status) = event else { continue };
                states.push(status);
                let active = states.iter().filter(|&&state| state == Status::PostcopyActive);
                match (status, active.count()) {
                    (Status::PostcopyActive, 1) => steered.pause_postcopy().unwrap(),
                    (Status::PostcopyActive, _) => {
                        let max_postcopy_bandwidth = Some(0);
                        let change = ParameterChange {
                            max_postcopy_bandwidth,
                            ..ParameterChange::default()
                        };
                        steered.set_parameters(change).unwrap();
                    }
                    (Status::Completed | Status::Failed, _) => break,
                    _ => {}
                }
            }
            states
        });
        let pair = || {
            let (near, far) = UnixStream::pair().unwrap();
            (near.into(), far.into())
        };
        let (when, channels) = (SwitchWhen::AtOnce, vec![pair(), pair()]);
        let how = (when, urgent);
        let guest = (Vec::new(), None);
        let run = migrate_told(&progress, parameters, &from, &to, guest, how, channels);
        run.outgoing.unwrap();
        run.incoming.unwrap();
        let states = steering.join().unwrap();
        assert_eq!(
            states.iter().map(|status| status.name()).collect::<Vec<_>>().join(" "),
            "none setup active device postcopy-active postcopy-paused postcopy-recover \
             postcopy-active completed"
        );
        assert_eq!(
            (run.breaks, run.sent.postcopy_recoveries),
            (vec!["paused on request".into()], 1)
        );
        assert!((0..PAGES).all(|page| to.page(page) == [7; PAGE as usize]));
        assert!(progress.pause_postcopy().is_err());
    }
}

/// As that, asked of the destination.
#[test]
fn postcopy_that_is_paused_by_the_destination_goes_on_over_other_channels() {
    for urgent in [false, true] {
        let (from, to) = (Side::of_region(PAGES * PAGE), Side::of_region(PAGES * PAGE));
        fill(&from.region, 0..PAGES, 7);
        let parameters = Parameters {
            max_postcopy_bandwidth: Some(10),
            ..Parameters::new(Configuration::new("test"))
        };
        let both = [Arc::new(Progress::new()), Arc::new(Progress::new())];
        let [source, destination] = both.clone();
        let not_yet = destination.pause_postcopy().unwrap_err();
        assert_eq!(not_yet, SteeringError::State { what: "be paused", status: Status::None });
        let events = destination.subscribe(1000);
        let steering = thread::spawn(move || {
            let mut states = Vec::new();
            while let Some(event) = events.next_within(Duration::from_secs(60)) {
                let Event::Status(status) = event else { continue };
                if status != Status::PostcopyActive && states.is_empty() {
                    continue;
                }
                states.push(status);
                match states.len() {
                    1 => destination.pause_postcopy().unwrap(),
                    4 => {
                        let max_postcopy_bandwidth = Some(0);
                        let change = ParameterChange {
                            max_postcopy_bandwidth,
                            ..ParameterChange::default()
                        };
                        source.set_parameters(change).unwrap();
                    }
                    _ => {}
                }
                if matches!(status, Status::Completed | Status::Failed) {
                    break;
                }
            }
            assert!(destination.pause_postcopy().is_err());
            states
        });
        let pair = || {
            let (near, far) = UnixStream::pair().unwrap();
            (near.into(), far.into())
        };
        let (how, channels) = ((SwitchWhen::AtOnce, urgent), vec![pair(), pair()]);
        let guest = (Vec::new(), None);
        let run = migrate_told_on_both_sides(&both, parameters, &from, &to, guest, how, channels);
        run.outgoing.unwrap();
        run.incoming.unwrap();
        let states = steering.join().unwrap();
        assert_eq!(
            states.iter().map(|status| status.name()).collect::<Vec<_>>().join(" "),
            "postcopy-active postcopy-paused postcopy-recover postcopy-active completed"
        );
        assert_eq!(run.breaks_there, ["paused on request"]);
        assert_eq!((run.breaks.len(), run.sent.postcopy_recoveries), (1, 1));
        assert!((0..PAGES).all(|page| to.page(page) == [7; PAGE as usize]));
    }
}
