//! Whole migrations whose guest reads its memory on the destination while that arrives.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ram_discard::memory::HostMapping;

use super::*;
use crate::devices::NoDevices;
use crate::dirty::{DirtyTracker, NeverWritten};
use crate::lazy::HandlerFailed;
use crate::precopy::{Guest, GuestAfter, Incoming, Outgoing, Parameters};
use crate::progress::{MigrationInfo, Progress, Status};
use crate::ram::{ListOptions, MigrationBlock, PageChannels, RamBlocks, RamLoad, RamSave};
use crate::stream::{CAPABILITY_MULTIFD, Configuration};
use crate::test_support::{Late, PAGE, PATIENCE, Side, at_the_verdict, fill, late, tcp_pair};
use crate::test_utils::breaking;

mod bandwidth;
mod elastic;
mod encryption;
mod incoming;
mod patience;
mod peers;
mod steering;

const OPTIONS: ListOptions = ListOptions { ignore_shared: false, postcopy: true };

/// A guest that does not run on the source, and reads its memory in odd order on the destination.
struct Reader {
    region: Arc<HostMapping>,
    /// What each page is to hold.
    expected: Vec<u8>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    wrong: Arc<AtomicUsize>,
    runs: AtomicUsize,
    /// Done by the guest before it reads.
    acts: Mutex<Option<Act>>,
}

/// What is expected of a page that the guest does not read, since it may not use it.
const UNREAD: u8 = 0xfe;

/// What a guest does.
type Act = Box<dyn FnOnce() + Send>;

impl Reader {
    fn new(side: &Side, expected: Vec<u8>) -> Self {
        let region = Arc::clone(side.blocks.get("vmem0").unwrap().mapping());
        let (threads, wrong, runs, acts) = Default::default();
        Self { region, expected, threads, wrong, runs, acts }
    }

    fn wait(&self) -> usize {
        for thread in self.threads.lock().unwrap().drain(..) {
            thread.join().unwrap();
        }
        self.wrong.load(Ordering::Relaxed)
    }
}

impl Guest for Reader {
    fn stop(&self) -> Result<(), String> {
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        self.runs.fetch_add(1, Ordering::Relaxed);
        if let Some(act) = self.acts.lock().unwrap().take() {
            act();
        }
        for first in 0..3 {
            let (region, expected) = (Arc::clone(&self.region), self.expected.clone());
            let wrong = Arc::clone(&self.wrong);
            let thread = thread::spawn(move || {
                let mut bytes = vec![0; PAGE as usize];
                for step in 0..expected.len() {
                    // Each page once, far from the one before.
                    let page = (first * 331 + step * 397) % expected.len();
                    if expected[page] == UNREAD {
                        continue;
                    }
                    region.read(page as u64 * PAGE, &mut bytes);
                    if bytes.iter().any(|&byte| byte != expected[page]) {
                        wrong.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
            self.threads.lock().unwrap().push(thread);
        }
        Ok(())
    }
}

impl HandlerFailed for Reader {
    fn handler_failed(&self, error: &MigrationError) {
        panic!("{error}");
    }
}

/// Hands out channels that were made before, and notes why they are needed.
struct Prepared {
    channels: mpsc::Receiver<(OwnedFd, Option<UnixStream>)>,
    progress: Arc<Progress>,
    breaks: Arc<Mutex<Vec<String>>>,
}

impl Reconnect for Prepared {
    fn reconnect(&mut self, error: &MigrationError) -> Option<Channels> {
        self.breaks.lock().unwrap().push(error.to_string());
        let (main, urgent) = self.channels.recv_timeout(Duration::from_secs(20)).ok()?;
        let channel = |stream: OwnedFd| Channel::new(stream, Arc::clone(&self.progress)).unwrap();
        let urgent = urgent.map(|urgent| channel(urgent.into()));
        Some(Channels { main: channel(main), urgent })
    }
}

struct Run {
    outgoing: Result<(), MigrationError>,
    /// Where the guest is after a failure.
    guest: Option<GuestAfter>,
    incoming: Result<(), MigrationError>,
    wrong: usize,
    /// How often the guest was let run on the source and on the destination.
    runs: (usize, usize),
    /// Why the source needed other channels.
    breaks: Vec<String>,
    /// Why the destination did.
    breaks_there: Vec<String>,
    sent: MigrationInfo,
}

/// Migrates over the first pair of channels, and after each break over the next.
fn migrate(
    from: &Side,
    to: &Side,
    expected: Vec<u8>,
    when: SwitchWhen,
    urgent: bool,
    channels: Vec<(UnixStream, UnixStream)>,
) -> Run {
    let parameters = Parameters::new(Configuration::new("test"));
    let channels = channels.into_iter().map(|(near, far)| (near.into(), far.into())).collect();
    migrate_by(parameters, from, to, expected, when, urgent, channels)
}

fn migrate_by(
    parameters: Parameters,
    from: &Side,
    to: &Side,
    expected: Vec<u8>,
    when: SwitchWhen,
    urgent: bool,
    channels: Vec<(OwnedFd, OwnedFd)>,
) -> Run {
    migrate_acting(parameters, from, to, expected, when, urgent, channels, None)
}

/// With something that the guest does when it runs at the destination.
#[expect(clippy::too_many_arguments, reason = "a migration has as many parts")]
fn migrate_acting(
    parameters: Parameters,
    from: &Side,
    to: &Side,
    expected: Vec<u8>,
    when: SwitchWhen,
    urgent: bool,
    channels: Vec<(OwnedFd, OwnedFd)>,
    acts: Option<Act>,
) -> Run {
    let both = [Arc::new(Progress::new()), Arc::new(Progress::new())];
    migrate_told(&both, parameters, from, to, (expected, acts), (when, urgent), channels)
}

/// Seen and steered at the source and at the destination.
fn migrate_told(
    [progress, progress_there]: &[Arc<Progress>; 2],
    parameters: Parameters,
    from: &Side,
    to: &Side,
    (expected, acts): (Vec<u8>, Option<Act>),
    (when, urgent): (SwitchWhen, bool),
    mut channels: Vec<(OwnedFd, OwnedFd)>,
) -> Run {
    let reader = Arc::new(Reader::new(to, expected));
    *reader.acts.lock().unwrap() = acts;
    let (tell_source, source_hears) = mpsc::channel();
    let (tell_destination, destination_hears) = mpsc::channel();
    let first = channels.remove(0);
    let pair = || urgent.then(|| UnixStream::pair().unwrap()).unzip();
    for (near, far) in channels {
        let (near_urgent, far_urgent) = pair();
        tell_source.send((near, near_urgent)).unwrap();
        tell_destination.send((far, far_urgent)).unwrap();
    }
    drop((tell_source, tell_destination));
    let (near_urgent, far_urgent) = pair();
    let channel = |progress: &Arc<Progress>, stream: OwnedFd| {
        Channel::new(stream, Arc::clone(progress)).unwrap()
    };

    let configuration = parameters.configuration.clone();
    // As many as there are for pages, of both sides.
    let of_pages = if configuration.has(CAPABILITY_MULTIFD) { 2 } else { 0 };
    let pages = (0..of_pages).map(|_| UnixStream::pair().unwrap());
    let (near_pages, far_pages): (Vec<_>, Vec<_>) = pages.unzip();
    let page_channels = move |progress: &Arc<Progress>, streams: Vec<UnixStream>| {
        let channels = streams.into_iter().map(|stream| channel(progress, stream.into()));
        PageChannels::new(channels.collect()).unwrap()
    };

    let (guest, blocks) = (Arc::clone(&reader), Arc::clone(&to.blocks));
    let breaks_there = Arc::<Mutex<Vec<_>>>::default();
    let (progress_there, breaks) = (Arc::clone(progress_there), Arc::clone(&breaks_there));
    let there = thread::spawn(move || {
        let progress = progress_there;
        let mut ram = RamLoad::new(Arc::clone(&blocks), OPTIONS, Arc::clone(&progress));
        if of_pages != 0 {
            ram = ram.with_channels(page_channels(&progress, far_pages));
        }
        let postcopy = PostcopyIncoming {
            blocks,
            urgent: far_urgent.map(|urgent| channel(&progress, urgent.into())),
            reconnect: Box::new(Prepared {
                channels: destination_hears,
                progress: Arc::clone(&progress),
                breaks,
            }),
            failed: Arc::clone(&guest) as Arc<dyn HandlerFailed>,
            listening: None,
        };
        let incoming = Incoming {
            configuration,
            guest: &*guest,
            handlers: vec![Box::new(ram)],
            devices: &mut NoDevices,
            postcopy: Some(postcopy),
            progress: Arc::clone(&progress),
        };
        incoming.run(channel(&progress, first.1))
    });
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::new(NeverWritten) };
    let mut ram = RamSave::new(&from.blocks, OPTIONS, Arc::clone(progress), tracker).unwrap();
    if of_pages != 0 {
        ram = ram.with_channels(page_channels(progress, near_pages));
    }
    let breaks = Arc::<Mutex<Vec<_>>>::default();
    let source = Reader::new(from, Vec::new());
    let postcopy = PostcopyOutgoing {
        when,
        urgent: near_urgent.map(|urgent| channel(progress, urgent.into())),
        reconnect: Box::new(Prepared {
            channels: source_hears,
            progress: Arc::clone(progress),
            breaks: Arc::clone(&breaks),
        }),
    };
    let outgoing = Outgoing {
        parameters,
        guest: &source,
        handlers: vec![Box::new(ram)],
        devices: &mut NoDevices,
        postcopy: Some(postcopy),
        progress: Arc::clone(progress),
    };
    let mut guest = None;
    let outgoing = outgoing.run(channel(progress, first.0)).map_err(|failed| {
        guest = Some(failed.guest);
        failed.error
    });
    let incoming = there.join().unwrap();
    let runs = [&source, &*reader].map(|guest| guest.runs.load(Ordering::Relaxed));
    let (wrong, sent) = (reader.wait(), progress.snapshot());
    let [breaks, breaks_there] =
        [breaks, breaks_there].map(|breaks| breaks.lock().unwrap().clone());
    Run { outgoing, guest, incoming, wrong, runs: runs.into(), breaks, breaks_there, sent }
}

/// A source with pages of all kinds, and what the guest is to see of each.
fn filled() -> (Side, Vec<u8>) {
    let from = Side::new(&[1, 4, 5, 9]);
    fill(&from.region, 64..128, 7);
    fill(&from.region, 260..310, 8);
    fill(&from.region, 310..314, 0);
    fill(&from.region, 600..620, 9);
    // Written although discarded: the guest sees zeros.
    fill(&from.region, 700..703, 0xdd);
    fill(&from.boot, 3..5, 5);
    let mut expected = vec![0; 1024];
    expected[64..128].fill(7);
    expected[260..310].fill(8);
    expected[600..620].fill(9);
    (from, expected)
}

#[test]
fn a_freeze_that_was_lost_before_the_guest_went_keeps_it_here() {
    let (from, expected) = filled();
    let to = Side::new(&[1, 4, 5, 9]);
    let manager = Arc::clone(from.manager.as_ref().unwrap());
    // The destination has the device state, and the verdict is on its way.
    let channels = at_the_verdict(move || manager.lose_freezes());
    let run = migrate(&from, &to, expected, SwitchWhen::AtOnce, false, vec![channels]);
    assert!(matches!(run.outgoing, Err(MigrationError::FreezeLost(_))), "{:?}", run.outgoing);
    assert!(run.incoming.is_err());
    assert_eq!(run.guest, Some(GuestAfter::RunsHere));
    assert_eq!(run.runs, (1, 0));
}

fn blocks_of(side: &Side) -> &RamBlocks {
    &side.blocks
}

#[test]
fn the_guest_sees_its_memory_while_it_arrives_and_holes_stay_cheap() {
    for urgent in [false, true] {
        let (from, expected) = filled();
        let to = Side::new(&[1, 4, 5, 9]);
        // What was there before must not be seen.
        fill(&to.region, 64..70, 0xee);
        let channels = vec![UnixStream::pair().unwrap()];
        let before = from.resident();
        let run = migrate(&from, &to, expected, SwitchWhen::AtOnce, urgent, channels);
        run.outgoing.unwrap();
        run.incoming.unwrap();
        assert_eq!(run.wrong, 0);
        assert_eq!(run.sent.status, Status::Completed);
        assert_eq!(from.resident(), before);
        assert!(run.sent.normal >= 64 + 50 + 20 + 2);
        // The guest has read every page once: those of discarded memory are discarded again at the end
        // unless it reads them later still.
        let vmem = blocks_of(&to).get("vmem0").unwrap();
        assert!(vmem.discarded().unwrap().len() > 2);
    }
}

#[test]
fn precopy_then_postcopy_drops_what_is_stale() {
    let (from, expected) = filled();
    let to = Side::new(&[1, 4, 5, 9]);
    let channels = vec![UnixStream::pair().unwrap()];
    let run = migrate(&from, &to, expected, SwitchWhen::Rounds(0), true, channels);
    run.outgoing.unwrap();
    run.incoming.unwrap();
    assert_eq!(run.wrong, 0);
}

#[test]
fn channels_for_pages_end_before_the_guest_leaves_and_a_recovery_is_without_them() {
    for when in [SwitchWhen::AtOnce, SwitchWhen::Rounds(0)] {
        let (from, expected) = filled();
        let to = Side::new(&[1, 4, 5, 9]);
        let mut parameters = Parameters::new(Configuration::new("test"));
        parameters.configuration.capabilities.push(CAPABILITY_MULTIFD.to_owned());
        parameters.configuration.uuid = Some([3; 16]);
        let channels = [breaking(150_000).unwrap(), UnixStream::pair().unwrap()];
        let channels = channels.map(|(near, far)| (near.into(), far.into())).into();
        let run = migrate_by(parameters, &from, &to, expected, when, true, channels);
        run.outgoing.unwrap();
        run.incoming.unwrap();
        assert_eq!((run.wrong, run.runs), (0, (0, 1)));
        assert!(run.sent.normal >= 64 + 50 + 20 + 2);
    }
}

#[test]
fn a_channel_broken_anywhere_is_recovered_any_number_of_times() {
    let mut limit = 1500;
    let mut recovered = 0;
    while limit < 700_000 {
        let (from, expected) = filled();
        let to = Side::new(&[1, 4, 5, 9]);
        // Broken three times, the last time in the handshake of a recovery.
        let channels =
            [limit, limit / 3 + 100, 9, usize::MAX].map(|limit| breaking(limit).unwrap()).into();
        let run = migrate(&from, &to, expected, SwitchWhen::AtOnce, limit % 2 == 0, channels);
        match (&run.outgoing, &run.incoming) {
            (Ok(()), Ok(())) => recovered += 1,
            // Before the guest was handed over, it stays where it is.
            (Err(_), Err(_)) if limit < 10_000 => {}
            other => panic!("after {limit} bytes: {other:?}"),
        }
        assert_eq!(run.wrong, 0, "after {limit} bytes");
        limit += limit / 3;
    }
    assert!(recovered > 10, "{recovered}");
}

/// Over TCP, with hardly any patience, and with one more connection for what is left.
fn migrate_late(what: Late) -> Run {
    let (from, expected) = filled();
    let to = Side::new(&[1, 4, 5, 9]);
    let mut parameters = Parameters::new(Configuration::new("test"));
    parameters.switchover_timeout = Duration::from_secs(2);
    let (near, far) = tcp_pair();
    let channels = vec![late(what), (near.into(), far.into())];
    migrate_by(parameters, &from, &to, expected, SwitchWhen::AtOnce, false, channels)
}

#[test]
fn a_destination_that_takes_too_long_to_run_leaves_the_guest_over_tcp() {
    let run = migrate_late(Late::There);
    assert_eq!(run.runs, (1, 0));
    assert!(run.outgoing.is_err());
    assert!(matches!(run.incoming, Err(MigrationError::ChannelClosed(_))), "{:?}", run.incoming);
}

#[test]
fn a_destination_that_runs_is_heard_however_late_and_the_rest_takes_another_channel() {
    let run = migrate_late(Late::Back);
    assert_eq!(run.runs, (0, 1));
    run.outgoing.unwrap();
    run.incoming.unwrap();
    assert_eq!((run.wrong, run.sent.postcopy_recoveries), (0, 1));
}
