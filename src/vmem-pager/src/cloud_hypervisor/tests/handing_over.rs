use small_vmm::cloud_hypervisor::receiver::{self, Fault, Receive};
use small_vmm::cloud_hypervisor::source::{self, Outcome, Trap};
use small_vmm::cloud_hypervisor::{Command, Guest};

use super::ways::{COMMANDS, Parties, StandIn, handed_over, handed_over_with, quick};
use crate::run::Run;

#[test]
fn a_guest_goes_from_one_process_to_another_without_a_copy() {
    for paused in [false, true] {
        let mut guest = Guest::new();
        guest.paused = paused;
        let how = Receive::new(false);
        let (done, sent, received) =
            handed_over_with(&guest, Trap::None, &how, None, &Run::new(None));
        done.unwrap();
        assert_eq!(sent, Outcome::Ended);
        let receiver::Outcome::Has(found) = received else { panic!("{received:?}") };
        assert_eq!(found.paused, paused);
        assert!(found.memory == guest.memory());
        // It is the same memory: what was written after Config is there, and nothing more is allocated.
        assert_eq!(found.config, guest.config().to_string().as_bytes());
    }
}

#[test]
fn the_source_keeps_its_guest_when_the_receiver_fails() {
    for command in COMMANDS.into_iter().filter(|command| *command != Command::Complete) {
        let how = Receive::new(false).with(receiver::Trap::At(command, Fault::Error));
        let (done, sent, received) =
            handed_over_with(&Guest::new(), Trap::None, &how, None, &quick());
        assert!(done.unwrap_err().to_string().contains("with Error"), "{command:?}");
        assert_eq!((sent, received), (Outcome::Continues, receiver::Outcome::Dropped));
    }
}

/// A source that goes at its last word has not been told: it keeps its guest, and the receiver never runs it.
#[test]
fn the_receiver_has_nothing_when_the_source_breaks_off() {
    for command in [Command::State, Command::Complete] {
        for trap in [
            Trap::CloseBefore(command),
            Trap::CloseAfter(command),
            Trap::SilentBefore(command),
            Trap::AbandonBefore(command),
        ] {
            // The last is a race of the source with what it is told.
            for _ in 0..20 {
                let how = Receive::new(false);
                let (done, sent, received) =
                    handed_over_with(&Guest::new(), trap, &how, None, &quick());
                let why = done.expect_err(&format!("{trap:?}")).to_string();
                assert_eq!(sent, Outcome::Continues, "{trap:?}");
                assert_eq!(received, receiver::Outcome::Dropped, "{trap:?}: {why}");
                if trap != Trap::CloseAfter(Command::Complete) {
                    break;
                }
            }
        }
    }
}

/// Told and not reading, it could read it or go without at any time.
#[test]
fn a_source_that_does_not_read_that_its_guest_was_taken_is_ended_before_the_receiver_runs_it() {
    let mut stand_in = StandIn::new();
    let process = stand_in.process();
    let (guest, trap) = (Guest::new(), Trap::StopAfter(Command::Complete));
    let steps = source::steps(guest.mappings.len(), trap);
    let parties = Parties {
        steps: &steps,
        trap,
        source: Some(&process),
        receivers: &[Receive::new(false)],
        receiver: None,
    };
    let (done, _, received) = handed_over(&guest, parties, &quick());
    done.unwrap();
    assert!(matches!(&received[..], [receiver::Outcome::Has(_)]), "{received:?}");
    assert_eq!(stand_in.ended_by(), Some(9));
}

#[test]
fn a_guest_that_its_receiver_refuses_to_run_is_given_to_another_one() {
    for paused in [false, true] {
        let mut guest = Guest::new();
        guest.paused = paused;
        let fails = |command, fault| Receive::new(false).with(receiver::Trap::At(command, fault));
        let receivers = [
            fails(Command::Complete, Fault::Error),
            fails(Command::Config, Fault::Error),
            fails(Command::Complete, Fault::Error),
            Receive::new(false),
        ];
        let steps = source::steps(guest.mappings.len(), Trap::None);
        let parties = |count: usize| Parties {
            steps: &steps,
            trap: Trap::None,
            source: None,
            receivers: &receivers[4 - count..],
            receiver: None,
        };
        let (done, sent, mut received) = handed_over(&guest, parties(4), &Run::new(None));
        done.unwrap();
        assert_eq!(sent, Outcome::Ended);
        let Some(receiver::Outcome::Has(found)) = received.pop() else { panic!("{received:?}") };
        assert!(found.memory == guest.memory());
        assert_eq!(found.paused, paused);
        assert_eq!(received, [const { receiver::Outcome::Dropped }; 3]);
    }
    // There may be none.
    let how = Receive::new(false).with(receiver::Trap::At(Command::Complete, Fault::Error));
    let (done, sent, received) =
        handed_over_with(&Guest::new(), Trap::None, &how, None, &Run::new(None));
    assert!(done.unwrap_err().to_string().contains("the guest is lost"));
    assert_eq!((sent, received), (Outcome::Ended, receiver::Outcome::Dropped));
}

/// It may run the guest, which is not given to another one then, nor is its process ended.
#[test]
fn a_receiver_that_does_not_say_whether_it_runs_the_guest_keeps_it() {
    let mut stand_in = StandIn::new();
    for fault in [Fault::Close, Fault::Silent, Fault::Odd, Fault::Half] {
        let process = Some(stand_in.process());
        let how = Receive::new(false).with(receiver::Trap::At(Command::Complete, fault));
        let (done, sent, _) = handed_over_with(&Guest::new(), Trap::None, &how, process, &quick());
        let error = done.unwrap_err().to_string();
        assert!(error.contains("was told to run the guest and may do so"), "{fault:?}: {error}");
        assert_eq!(sent, Outcome::Ended, "{fault:?}");
        assert_eq!(stand_in.ended_by(), None, "{fault:?}");
    }
}

/// A copy of a guest that is resumed runs on the memory of the source.
#[test]
fn a_receiver_that_keeps_a_copy_is_ended_before_the_source_continues() {
    for fault in [Fault::Cut, Fault::Close] {
        let mut stand_in = StandIn::new();
        let process = stand_in.process();
        // No answer to Abandon comes any more.
        let how = Receive::new(false).with(receiver::Trap::At(Command::State, fault));
        let (done, sent, _) =
            handed_over_with(&Guest::new(), Trap::None, &how, Some(process), &quick());
        assert!(done.is_err());
        assert_eq!(sent, Outcome::Continues);
        assert_eq!(stand_in.ended_by(), Some(9), "{fault:?}");
    }
}
