//! The state machines of all three commands: whatever comes in whatever order, is cut, comes twice, or does not come.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use small_vmm::cloud_hypervisor::faults::{self, Asking};
use small_vmm::cloud_hypervisor::guest::{MIB, PAGE};
use small_vmm::cloud_hypervisor::receiver::{self, Fault, Receive};
use small_vmm::cloud_hypervisor::source::{self, Outcome, Step};
use small_vmm::cloud_hypervisor::{Command, Guest, content};

use super::ways::{COMMANDS, Options, Parties, Saved, StandIn, handed_over, quick};
use crate::cli::report::Report;
use crate::cloud_hypervisor::channel::Peer;
use crate::cloud_hypervisor::save::save;
use crate::image::writer::NewFile;
use crate::run::Run;

/// Mappings of the guest.
const MAPPINGS: usize = 3;

/// What a source does: all that it should, with some of it left out, moved, repeated or replaced.
fn steps() -> impl Strategy<Value = Vec<Step>> {
    let command = prop_oneof![
        prop::sample::select(&COMMANDS[..]),
        Just(Command::Abandon),
        Just(Command::PageFault),
    ];
    let step = prop_oneof![
        (command.clone(), 0..=MAPPINGS).prop_map(|(command, index)| Step::Send(command, index)),
        (command.clone(), 0..60usize).prop_map(|(command, len)| Step::Cut(command, len)),
        command.prop_map(Step::SendAndClose),
        Just(Step::Unknown),
        Just(Step::Close),
        Just(Step::Wait),
    ];
    let edit = (0..5usize, any::<prop::sample::Index>(), any::<prop::sample::Index>(), step);
    prop::collection::vec(edit, 0..4).prop_map(|edits| {
        let mut steps = source::right_steps(MAPPINGS);
        for (kind, one, other, step) in edits {
            if steps.is_empty() {
                break;
            }
            let (one, other) = (one.index(steps.len()), other.index(steps.len()));
            match kind {
                0 => drop(steps.remove(one)),
                1 => steps.swap(one, other),
                2 => steps.insert(one, steps[other]),
                3 => steps.insert(one, step),
                _ => steps[one] = step,
            }
        }
        steps
    })
}

/// Whether a source does all that it should up to the end, which may hand over mappings in any order.
fn is_right(steps: &[Step]) -> bool {
    let mut steps = steps.to_vec();
    for step in &mut steps {
        if let Step::Send(command, index) = step
            && *command != Command::MemoryFd
        {
            *index = 0;
        }
    }
    if let Some(memory) = steps.get_mut(1..=MAPPINGS) {
        memory
            .sort_by_key(|step| if let Step::Send(_, index) = step { *index } else { usize::MAX });
    }
    let right = source::right_steps(MAPPINGS);
    // From Complete on it has ended.
    steps.truncate(right.len());
    steps == right
}

/// Only one that says nothing is waited for: others are not to be taken for silent on a busy machine.
fn run_for(steps: &[Step]) -> Arc<Run> {
    match steps.contains(&Step::Wait) {
        true => Run::with_silence(None, Duration::from_millis(30)),
        false => Run::new(None),
    }
}

fn faults() -> impl Strategy<Value = Option<(Command, Fault)>> {
    let fault = [
        Fault::Error,
        Fault::Close,
        Fault::Silent,
        Fault::Odd,
        Fault::Status,
        Fault::Cut,
        Fault::Half,
        Fault::Twice,
    ];
    prop::option::of((prop::sample::select(&COMMANDS[..]), prop::sample::select(fault.to_vec())))
}

fn receive(postcopy: bool, fault: Option<(Command, Fault)>) -> Receive {
    let trap =
        fault.map_or(receiver::Trap::None, |(command, fault)| receiver::Trap::At(command, fault));
    Receive::new(postcopy).with(trap)
}

fn run_of(fault: Option<(Command, Fault)>) -> Arc<Run> {
    match fault {
        Some((_, Fault::Silent | Fault::Half)) => quick(),
        _ => Run::new(None),
    }
}

fn memory_of_boot() -> impl Strategy<Value = Vec<(usize, u64, u64)>> {
    prop::collection::vec((0..MAPPINGS, 0..512u64, 1..1000u64), 0..20)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// The guest is in the image or at its source, never in neither.
    #[test]
    fn a_save_takes_a_guest_whole_or_not_at_all(steps in steps(), paused: bool, early: bool) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let mut guest = Guest::new();
        guest.paused = paused;
        let (near, far) = UnixStream::pair().unwrap();
        let run = run_for(&steps);
        let (done, outcome) = thread::scope(|scope| {
            let sending = scope.spawn(|| source::perform(far, &guest, &steps, source::Trap::None));
            let peer = Peer::new(near.into()).unwrap();
            let done = save(&peer, NewFile::create(&path).unwrap(), early, &run, &Report::silent());
            drop(peer);
            (done, sending.join().unwrap())
        });
        prop_assert_eq!(done.is_ok(), is_right(&steps), "{:?}", done);
        prop_assert_eq!(outcome == Outcome::Ended, done.is_ok());
        let whole = done.as_ref().is_err_and(|error| error.to_string().contains("the image is whole"));
        prop_assert_eq!(path.exists(), done.is_ok() || whole);
        if done.is_ok() {
            let saved = Saved { image: crate::cloud_hypervisor::image::SavedGuest::open(&path).unwrap(), dir };
            let restored = saved.restored(&Options::new(true), &Receive::new(false), &Run::new(None));
            let taken = restored.taken();
            prop_assert!(taken.memory == guest.memory());
            prop_assert_eq!(taken.paused, paused);
        }
    }

    /// Whatever bytes come: the answer is an error, at the latest when the sender is silent.
    #[test]
    fn any_bytes_leave_no_image(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        commands in prop::collection::vec((1u8..12, 0u8..24), 0..8),
    ) {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let (near, mut far) = UnixStream::pair().unwrap();
        for (command, length) in commands {
            let mut frame = [0; 16];
            (frame[0], frame[8]) = (command, length);
            far.write_all(&frame).unwrap();
        }
        far.write_all(&bytes).unwrap();
        let peer = Peer::new(near.into()).unwrap();
        let run = Run::with_silence(None, Duration::from_millis(1));
        let file = NewFile::create(&path).unwrap();
        prop_assert!(save(&peer, file, false, &run, &Report::silent()).is_err());
        prop_assert!(!path.exists());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever is in memory, in whatever order it is asked for, and wherever a receiver fails: the guest is there
    /// whole, or it is dropped, or an error says what is left.
    #[test]
    fn a_restored_guest_is_whole_or_dropped(
        pages in memory_of_boot(),
        blocks in prop::collection::vec(any::<bool>(), 8),
        eager: bool,
        paused: bool,
        fault in faults(),
        touches in prop::collection::vec(0..6 * MIB / PAGE, 0..30),
        first_range in 0..2usize,
        trap in prop::option::of(prop::sample::select(&[faults::Trap::Again, faults::Trap::Stop, faults::Trap::Cut][..])),
    ) {
        let mut guest = Guest::new();
        for (mapping, page, seed) in pages {
            guest.write(mapping, page, &content(seed));
        }
        (guest.plugged, guest.paused) = (blocks, paused);
        let address = |page: u64| match page * PAGE {
            low if low < 4 * MIB => low,
            high => (3 << 30) + high - 4 * MIB,
        };
        let mut touches: Vec<u64> = touches.into_iter().map(address).collect();
        let before = touches.split_off(touches.len() / 2);
        let asking = Asking { before, touches, first_range, trap, no_sweep: false };
        let how = receive(!eager, fault).asking(asking);
        let restored = Saved::of(&guest).restored(&Options::new(eager), &how, &run_of(fault));
        let trapped = !eager && matches!(trap, Some(faults::Trap::Stop | faults::Trap::Cut));
        prop_assert_eq!(restored.done.is_ok(), fault.is_none() && !trapped, "{:?}", restored.done);
        match (&restored.outcome, fault) {
            // What comes twice may be seen at the last only.
            (receiver::Outcome::Has(_) | receiver::Outcome::Broken, Some((_, Fault::Twice))) => {
                prop_assert!(restored.error().contains("is not known"), "{}", restored.error());
            }
            (receiver::Outcome::Has(found), _) => {
                prop_assert!(found.memory == guest.memory());
                prop_assert_eq!(found.paused, paused);
            }
            (receiver::Outcome::Broken, None) => {
                prop_assert!(trapped && restored.error().contains("has not got all of its memory"));
            }
            (receiver::Outcome::Dropped, Some(_)) => {}
            // It has closed of its own, or what it waits for cannot come after half of an answer.
            (_, Some((Command::Complete, _))) => {
                prop_assert!(restored.error().contains("is not known"), "{}", restored.error());
            }
            (_, Some((_, Fault::Close | Fault::Cut))) => {}
            (other, fault) => prop_assert!(false, "{other:?} {fault:?} {:?}", restored.done),
        }
    }

    /// One of the two has the guest, and never both: a receiver runs it only when the source has let go of it, and one
    /// that may have a copy of it has ended before the source continues. One that does not run it is followed by another.
    #[test]
    fn one_of_the_two_has_the_guest(steps in steps(), fault in faults(), paused: bool) {
        let mut guest = Guest::new();
        guest.paused = paused;
        let mut stand_in = StandIn::new();
        let run = match steps.contains(&Step::Wait) {
            true => quick(),
            false => run_of(fault),
        };
        let parties = Parties {
            steps: &steps,
            trap: source::Trap::None,
            source: None,
            receivers: &[receive(false, fault), Receive::new(false)],
            receiver: Some(stand_in.process()),
        };
        let (done, sent, received) = handed_over(&guest, parties, &run);
        let takers = || received.iter().filter_map(|outcome| match outcome {
            receiver::Outcome::Has(found) => Some(found),
            _ => None,
        });
        prop_assert!(takers().all(|found| found.memory == guest.memory()));
        prop_assert!(takers().count() <= 1, "{received:?}");
        match &done {
            Ok(()) => {
                prop_assert!(takers().count() == 1 && sent == Outcome::Ended && is_right(&steps));
            }
            // It was told to run the guest, and has not said that it does.
            Err(error) if sent == Outcome::Ended => {
                prop_assert!(is_right(&steps));
                prop_assert!(matches!(fault, Some((Command::Complete, _)) | Some((_, Fault::Twice))), "{fault:?}");
                prop_assert!(error.to_string().contains("was told to run the guest"), "{}", error);
                prop_assert!(stand_in.ended_by().is_none());
            }
            Err(error) => {
                prop_assert_eq!(takers().count(), 0, "{}", error);
                let left = matches!(received[0], receiver::Outcome::PausedCopy);
                prop_assert!(!left || stand_in.ended_by() == Some(9), "{}", error);
            }
        }
        let gives_on = matches!(fault, None | Some((Command::Complete, Fault::Error)));
        if gives_on || !is_right(&steps) {
            prop_assert_eq!(done.is_ok(), is_right(&steps), "{:?}", done);
        }
    }
}
