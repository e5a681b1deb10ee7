//! Destinations that have the guest, and read nothing or next to nothing of its memory.

use std::io::Write;

use super::peers::RawDestination;
use super::*;
use crate::stream::{Command, ReturnMessage};
use crate::test_support::{Slow, SlowReader};

const MOMENT: Duration = Duration::from_millis(20);
/// Longer than any thread is kept from running.
const LONG: Duration = Duration::from_secs(60);
const PAGES: u64 = 2048;

/// Notes the state in which it is asked for new channels, and why, and has none.
struct Noting(Arc<Mutex<Vec<(Status, String)>>>, Arc<Progress>);

impl Reconnect for Noting {
    fn reconnect(&mut self, error: &MigrationError) -> Option<Channels> {
        self.0.lock().unwrap().push((self.1.status(), error.to_string()));
        None
    }
}

/// Sends the guest to what takes it and then reads what there is, or the pages it asked for, as `slow`.
fn send_slowly(slow: Slow, urgent: bool) -> (OutgoingSeen, MigrationInfo) {
    let from = Side::of_region(PAGES * PAGE);
    fill(&from.region, 0..PAGES, 7);
    let (near, far) = UnixStream::pair().unwrap();
    let (near_urgent, far_urgent) = urgent.then(|| UnixStream::pair().unwrap()).unzip();
    let (tell, taken) = mpsc::channel();
    let taking = thread::spawn(move || {
        let mut destination = RawDestination(far);
        destination.read_to_command(&Command::Ping(PING_PACKAGE_LOADED));
        destination.say(&ReturnMessage::Pong(PING_PACKAGE_LOADED));
        destination.read_to_command(&Command::PostcopyRun);
        destination.say(&ReturnMessage::SwitchoverAck);
        if let Some(urgent) = far_urgent {
            // What was not asked for is read as it comes.
            let mut main = destination.0.try_clone().unwrap();
            let reading = thread::spawn(move || io::copy(&mut main, &mut io::sink()));
            tell.send(SlowReader::start(urgent, slow)).unwrap();
            let mut requests = Vec::new();
            for page in 0..PAGES {
                let (block, start) = (Some("vmem0".to_owned()), page * PAGE);
                let request = ReturnMessage::RequestPages { block, start, len: PAGE as u32 };
                request.put(&mut requests);
            }
            let _ = destination.0.write_all(&requests);
            let _ = reading.join();
        } else {
            tell.send(SlowReader::start(destination.0, slow)).unwrap();
        }
    });
    let progress = Arc::new(Progress::new());
    let channel = |stream, patience| {
        let mut channel = Channel::new(stream, Arc::clone(&progress)).unwrap();
        channel.set_write_patience(patience);
        channel
    };
    // Of the one that is read slowly.
    let patience = if urgent { LONG } else { MOMENT };
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::new(NeverWritten) };
    let ram = RamSave::new(&from.blocks, OPTIONS, Arc::clone(&progress), tracker).unwrap();
    let source = Reader::new(&from, Vec::new());
    let seen = Arc::default();
    let outgoing = Outgoing {
        // What was not asked for would be through before that.
        parameters: Parameters {
            max_postcopy_bandwidth: urgent.then_some(1),
            ..Parameters::new(Configuration::new("test"))
        },
        guest: &source,
        handlers: vec![Box::new(ram)],
        devices: &mut NoDevices,
        postcopy: Some(PostcopyOutgoing {
            when: SwitchWhen::AtOnce,
            urgent: near_urgent.map(|urgent| channel(urgent, MOMENT)),
            reconnect: Box::new(Noting(Arc::clone(&seen), Arc::clone(&progress))),
        }),
        progress: Arc::clone(&progress),
    };
    let failed = outgoing.run(channel(near, patience)).unwrap_err();
    drop(taken.recv().unwrap());
    taking.join().unwrap();
    let reconnects = seen.lock().unwrap().clone();
    let runs = source.runs.load(Ordering::Relaxed);
    (
        OutgoingSeen { error: failed.error, guest: failed.guest, reconnects, runs },
        progress.snapshot(),
    )
}

struct OutgoingSeen {
    error: MigrationError,
    guest: GuestAfter,
    reconnects: Vec<(Status, String)>,
    /// How often the guest was let run again here.
    runs: usize,
}

#[test]
fn a_destination_that_reads_no_pages_pauses_postcopy() {
    for (slow, urgent) in [
        (Slow::Nothing, false),
        (Slow::Nothing, true),
        (Slow::Trickle, false),
        (Slow::Trickle, true),
    ] {
        let (seen, info) = send_slowly(slow, urgent);
        let OutgoingSeen { error, guest, reconnects, runs } = seen;
        assert!(
            matches!(&error, MigrationError::Io { source, .. }
                if source.kind() == io::ErrorKind::TimedOut),
            "{slow:?} {urgent}: {error}"
        );
        // The destination has the guest; another channel could have gone on.
        assert_eq!((guest, runs), (GuestAfter::Gone, 0));
        assert_eq!(reconnects, [(Status::PostcopyPaused, error.to_string())]);
        assert_eq!(info.status, Status::Failed);
    }
}
