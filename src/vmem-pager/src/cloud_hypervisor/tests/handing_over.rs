use std::process::Command as Program;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::process::Pid;
use small_vmm::cloud_hypervisor::receiver::{self, Fault, Receive};
use small_vmm::cloud_hypervisor::source::{Outcome, Trap};
use small_vmm::cloud_hypervisor::{Command, Guest};

use super::ways::{COMMANDS, handed_over_with, quick};
use crate::cloud_hypervisor::handover::Process;
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
    for command in COMMANDS {
        let how = Receive::new(false).with(receiver::Trap::At(command, Fault::Error));
        let (done, sent, received) =
            handed_over_with(&Guest::new(), Trap::None, &how, None, &quick());
        assert!(done.unwrap_err().to_string().contains("with Error"), "{command:?}");
        assert_eq!((sent, received), (Outcome::Continues, receiver::Outcome::Dropped));
    }
}

#[test]
fn the_receiver_has_nothing_when_the_source_breaks_off() {
    for command in [Command::State, Command::Complete] {
        for trap in [
            Trap::CloseBefore(command),
            Trap::CloseAfter(command),
            Trap::SilentBefore(command),
            Trap::AbandonBefore(command),
        ] {
            let how = Receive::new(false);
            let (done, sent, received) =
                handed_over_with(&Guest::new(), trap, &how, None, &quick());
            let why = done.expect_err(&format!("{trap:?}")).to_string();
            assert_eq!(sent, Outcome::Continues, "{trap:?}");
            // A source that goes after its last word may do so when the receiver was asked already.
            if !why.contains("end the source at once")
                || trap != Trap::CloseAfter(Command::Complete)
            {
                assert_eq!(received, receiver::Outcome::Dropped, "{trap:?}: {why}");
            }
        }
    }
}

#[test]
fn a_receiver_that_may_run_the_guest_is_ended_before_the_source_continues() {
    let mut stand_in = Program::new("sleep").arg("600").spawn().unwrap();
    let process = Process::new(Pid::from_child(&stand_in)).unwrap();
    let how = Receive::new(false).with(receiver::Trap::At(Command::Complete, Fault::Close));
    let (done, sent, _) =
        handed_over_with(&Guest::new(), Trap::None, &how, Some(&process), &quick());
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
        let how = Receive::new(false).with(receiver::Trap::At(Command::Complete, Fault::Close));
        let (done, sent, _) = handed_over_with(&Guest::new(), Trap::None, &how, None, &run);
        // Only an operator ends the wait, and is told what is to be done.
        assert!(begun.elapsed() >= Duration::from_millis(900));
        assert!(done.unwrap_err().to_string().contains("end the receiver at once"));
        assert_eq!(sent, Outcome::Continues);
    });
}

/// A copy of a guest that is resumed runs on the memory of the source.
#[test]
fn a_receiver_that_keeps_a_copy_is_ended_before_the_source_continues() {
    for fault in [Fault::Cut, Fault::Close] {
        let mut stand_in = Program::new("sleep").arg("600").spawn().unwrap();
        let process = Process::new(Pid::from_child(&stand_in)).unwrap();
        // No answer to Abandon comes any more.
        let how = Receive::new(false).with(receiver::Trap::At(Command::State, fault));
        let (done, sent, _) =
            handed_over_with(&Guest::new(), Trap::None, &how, Some(&process), &quick());
        assert!(done.is_err());
        assert_eq!(sent, Outcome::Continues);
        let ended = stand_in.try_wait().unwrap();
        let _ = stand_in.kill();
        let signal =
            ended.and_then(|status| std::os::unix::process::ExitStatusExt::signal(&status));
        assert_eq!(signal, Some(9), "{fault:?}");
    }
}
