use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command as Program;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use rustix::process::Pid;

use super::guest::Guest;
use super::receiver::{self, receive};
use super::source::{self, Outcome};
use crate::cli::report::Report;
use crate::cloud_hypervisor::channel::Peer;
use crate::cloud_hypervisor::handover::{Process, hand_over};
use crate::cloud_hypervisor::protocol::Command;
use crate::error::PagerError;
use crate::run::Run;

fn handed_over(
    guest: &Guest,
    source_trap: source::Trap,
    receiver_trap: receiver::Trap,
    receiver: Option<&Process>,
    run: &Arc<Run>,
) -> (Result<(), PagerError>, Outcome, receiver::Outcome) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let to = Peer::new(UnixStream::connect(&path).unwrap().into()).unwrap();
        let receiving = scope.spawn(move || receive(&listener, false, receiver_trap));
        let sending = scope.spawn(move || source::send(far, guest, source_trap));
        let from = Peer::new(near.into()).unwrap();
        let done = hand_over(&from, &to, receiver, &[], run, &Report::silent());
        drop((from, to));
        (done, sending.join().unwrap(), receiving.join().unwrap())
    })
}

fn quick() -> Arc<Run> {
    Run::with_silence(None, Duration::from_millis(200))
}

#[test]
fn a_guest_goes_from_one_process_to_another_without_a_copy() {
    for paused in [false, true] {
        let mut guest = Guest::new();
        guest.paused = paused;
        let none = (source::Trap::None, receiver::Trap::None);
        let (done, sent, received) = handed_over(&guest, none.0, none.1, None, &Run::new(None));
        done.unwrap();
        assert_eq!(sent, Outcome::Ended);
        let receiver::Outcome::Has(found) = received else { panic!("{received:?}") };
        assert_eq!(found.paused, paused);
        assert!(found.memory == guest.memory());
        // It is the same memory: what is written to the one is in the other.
        assert_eq!(found.config, guest.config().to_string().as_bytes());
    }
}

#[test]
fn the_source_keeps_its_guest_when_the_receiver_fails() {
    for command in
        [Command::Start, Command::MemoryFd, Command::Config, Command::State, Command::Complete]
    {
        let trap = receiver::Trap::ErrorAt(command);
        let (done, sent, received) =
            handed_over(&Guest::new(), source::Trap::None, trap, None, &quick());
        assert!(done.unwrap_err().to_string().contains("with Error"), "{command:?}");
        assert_eq!((sent, received), (Outcome::Continues, receiver::Outcome::Dropped));
    }
}

#[test]
fn the_receiver_has_nothing_when_the_source_breaks_off() {
    for command in [Command::State, Command::Complete] {
        for trap in [
            source::Trap::CloseBefore(command),
            source::Trap::SilentBefore(command),
            source::Trap::AbandonBefore(command),
        ] {
            let (done, sent, received) =
                handed_over(&Guest::new(), trap, receiver::Trap::None, None, &quick());
            assert!(done.is_err(), "{trap:?}");
            assert_eq!(
                (sent, received),
                (Outcome::Continues, receiver::Outcome::Dropped),
                "{trap:?}"
            );
        }
    }
}

#[test]
fn a_receiver_that_may_run_the_guest_is_ended_before_the_source_continues() {
    let mut stand_in = Program::new("sleep").arg("600").spawn().unwrap();
    let process = Process::new(Pid::from_child(&stand_in)).unwrap();
    let trap = receiver::Trap::CloseAt(Command::Complete);
    let (done, sent, _) =
        handed_over(&Guest::new(), source::Trap::None, trap, Some(&process), &quick());
    assert!(done.unwrap_err().to_string().contains("its process was ended"));
    assert_eq!(sent, Outcome::Continues);
    let status = stand_in.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
}

#[test]
fn a_receiver_that_cannot_be_ended_keeps_the_source_paused() {
    let run = quick();
    let interrupt = Arc::clone(&run);
    let begun = std::time::Instant::now();
    thread::scope(|scope| {
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(900));
            interrupt.interrupt();
        });
        let trap = receiver::Trap::CloseAt(Command::Complete);
        let (done, sent, _) = handed_over(&Guest::new(), source::Trap::None, trap, None, &run);
        // Only an operator ends the wait, and is told what is to be done.
        assert!(begun.elapsed() >= Duration::from_millis(900));
        assert!(done.unwrap_err().to_string().contains("end the receiver at once"));
        assert_eq!(sent, Outcome::Continues);
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// However either end fails: one of the two has the guest, and never both.
    #[test]
    fn one_of_the_two_has_the_guest(source_at in 0..12usize, receiver_at in 0..12usize, closes: bool) {
        const COMMANDS: [Command; 5] =
            [Command::Start, Command::MemoryFd, Command::Config, Command::State, Command::Complete];
        let source_trap = COMMANDS.get(source_at).map_or(source::Trap::None, |at| match closes {
            true => source::Trap::CloseBefore(*at),
            false => source::Trap::UnknownBefore(*at),
        });
        let receiver_trap =
            COMMANDS.get(receiver_at).map_or(receiver::Trap::None, |at| receiver::Trap::ErrorAt(*at));
        let (done, sent, received) =
            handed_over(&Guest::new(), source_trap, receiver_trap, None, &quick());
        let has = matches!(received, receiver::Outcome::Has(_));
        prop_assert_eq!(done.is_ok(), has);
        prop_assert_eq!(sent == Outcome::Ended, has);
        prop_assert!(received != receiver::Outcome::PausedCopy && received != receiver::Outcome::Created);
    }
}
