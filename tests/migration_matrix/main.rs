//! Every way of moving a guest, on every kind of memory, with every pattern of discarded blocks,
//! while its vCPUs keep writing and look at every page they had written.
//!
//! Small sizes run with the tests. The same at large sizes, for as long as wanted:
//!
//! `MATRIX_BLOCKS=512 MATRIX_TIMES=20 cargo test --release --test migration_matrix -- --ignored`

mod device;
mod faults;
mod guest;
#[path = "../common/huge_page_pool.rs"]
mod huge_page_pool;
mod memory;

use std::borrow::Borrow;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use migration::dirty::{DirtyTracker, WriteProtect};
use migration::lazy::HandlerFailed;
use migration::postcopy::{Channels, PostcopyIncoming, PostcopyOutgoing, Reconnect, SwitchWhen};
use migration::ram::{ListOptions, MigrationBlock, PageChannels, RamLoad, RamSave};
use migration::snapshot::{
    FileIo, LazyRestore, Restore, RunningGuest, StoppedGuest, restore, restore_lazily, save,
    save_in_background,
};
use migration::stream::Configuration;
use migration::{
    Channel, Guest, Incoming, MigrationError, NoDevices, Outgoing, Parameters, Progress,
};

use device::{Reserving, Sending};
use guest::{Vm, no_work};
use huge_page_pool::Pool;
use memory::{BLOCK, Kind, Pattern, Side, say};

/// One at a time: the machine's pool of huge pages is shared, and so are its cores.
static ALONE: Mutex<()> = Mutex::new(());

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Precopy,
    Hybrid,
    Postcopy,
    Recovered,
    /// The guest plugs and unplugs all the while.
    PrecopyWithResizes,
    /// As that, with pages over channels of their own.
    ChannelsWithResizes,
    PostcopyWithResizes,
    BackgroundSnapshot,
    BackgroundSnapshotWithResizes,
    LazyRestore,
}

/// Runs `way` on all kinds of memory and patterns that this machine has.
fn all(way: Way, nr_blocks: usize) {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for kind in Kind::ALL {
        // A page of 1 GiB on each side is what most machines can be had to give.
        let (nr_blocks, patterns, nr_pages) = match kind {
            Kind::Gigantic => (2, &[Pattern::Alternating][..], 2),
            _ => (nr_blocks, &Pattern::ALL[..], 2 * nr_blocks as u64 + 4),
        };
        let pool = kind.has_pool().then(|| Pool::with_free(kind.block_size(), nr_pages));
        let pool = match pool.transpose() {
            Ok(pool) => pool,
            Err(error) => {
                say(&format!("skipped: {way:?} on {kind:?}: {error}"));
                continue;
            }
        };
        for &pattern in patterns {
            let plugged = pattern.plugged(nr_blocks);
            let sides = Side::new(kind, &plugged).and_then(|a| Ok((a, Side::new(kind, &plugged)?)));
            let (from, to) = match sides {
                Ok(sides) => sides,
                Err(error) => {
                    say(&format!("skipped: {way:?} on {kind:?}: {error}"));
                    break;
                }
            };
            let what = format!("{way:?} on {kind:?}, {pattern:?} discarded");
            match way {
                Way::BackgroundSnapshotWithResizes => background_with_resizes(kind, &from, &what),
                Way::PrecopyWithResizes => with_resizes(kind, &from, &to, (None, 0), &what),
                Way::ChannelsWithResizes => with_resizes(kind, &from, &to, (None, 2), &what),
                Way::PostcopyWithResizes => {
                    with_resizes(kind, &from, &to, (Some(SwitchWhen::AtOnce), 0), &what);
                }
                _ => one(way, &from, &to, &what),
            }
        }
        drop(pool);
    }
}

fn one(way: Way, from: &Side, to: &Side, what: &str) {
    let work = no_work(from.block.used_length());
    let (here, there) = (Vm::new(from, &work), Vm::new(to, &work));
    here.start();
    here.run().unwrap();
    here.wait_rounds(3);
    match way {
        Way::Precopy => migrate(from, to, &here, &there, (None, 0), 1),
        Way::Hybrid => migrate(from, to, &here, &there, (Some(SwitchWhen::Rounds(1)), 0), 1),
        Way::Postcopy => migrate(from, to, &here, &there, (Some(SwitchWhen::AtOnce), 0), 1),
        Way::Recovered => migrate(from, to, &here, &there, (Some(SwitchWhen::AtOnce), 0), 3),
        Way::PrecopyWithResizes | Way::ChannelsWithResizes | Way::PostcopyWithResizes => {
            unreachable!("its guest is another")
        }
        Way::BackgroundSnapshotWithResizes => unreachable!("its destination is another"),
        Way::BackgroundSnapshot => {
            background(from, &here, || to);
            assert_eq!(here.differ_at_stop(to), 0, "{what}");
        }
        Way::LazyRestore => lazily(from, to, &here, &there),
    }
    assert_eq!(here.end(), 0, "{what}: pages wrong on the source");
    assert_eq!(there.end(), 0, "{what}: pages wrong on the destination");
    assert_eq!((from.leaked(), to.leaked()), (0, 0), "{what}: discarded memory is held");
}

/// Migrates over `attempts` pairs of channels, all but the last of which break.
fn migrate(
    from: &Side,
    to: &Side,
    here: &Arc<Vm>,
    there: &Arc<Vm>,
    (when, channels): (Option<SwitchWhen>, usize),
    attempts: usize,
) {
    // Enough for the guest to be handed over, and for some of its memory.
    let breaks = |attempt| breaking(from.block.used_length() as usize / 8 * attempt + 20_000);
    let mut links: Vec<_> = (1..attempts).map(breaks).collect();
    links.push(UnixStream::pair().unwrap());
    let (sent, received) = run_by(from, to, (here, there), (when, channels), links, || {});
    sent.unwrap();
    received.unwrap();
    there.wait_rounds(3);
}

type Outcome = Result<(), MigrationError>;

/// Migrates over the first of `links`, and after each break over the next, before which the
/// destination calls `between`; how it ended on both sides.
fn run(
    from: &Side,
    to: &Side,
    here: &Arc<Vm>,
    there: &Arc<Vm>,
    when: Option<SwitchWhen>,
    links: Vec<(UnixStream, UnixStream)>,
    between: impl FnMut() + Send + 'static,
) -> (Outcome, Outcome) {
    run_by(from, to, (here, there), (when, 0), links, between)
}

/// As [`run`], with so many channels for the pages of precopy.
fn run_by(
    from: &Side,
    to: &Side,
    (here, there): (&Arc<Vm>, &Arc<Vm>),
    (when, channels): (Option<SwitchWhen>, usize),
    links: Vec<(UnixStream, UnixStream)>,
    between: impl FnMut() + Send + 'static,
) -> (Outcome, Outcome) {
    let mut configuration = Configuration::new("matrix");
    if channels != 0 {
        configuration.capabilities.push("multifd".to_owned());
        configuration.uuid = Some([9; 16]);
    }
    let (near, far): (Vec<_>, Vec<_>) = (0..channels).map(|_| UnixStream::pair().unwrap()).unzip();
    let theirs = configuration.clone();
    let options = ListOptions { postcopy: when.is_some(), ..ListOptions::default() };
    let ((tell_here, here_hears), (tell_there, there_hears)) = (channel(), channel());
    let mut first = None;
    for main in links {
        let urgent = UnixStream::pair().unwrap();
        if first.is_none() {
            first = Some((main, urgent));
        } else {
            tell_here.send((main.0, urgent.0)).unwrap();
            tell_there.send((main.1, urgent.1)).unwrap();
        }
    }
    drop((tell_here, tell_there));
    let (main, urgent) = first.expect("a link to begin with");
    let (vm, blocks, block) = (Arc::clone(there), Arc::clone(&to.blocks), Arc::clone(&to.block));
    let device = Arc::clone(&to.device);
    let receiving = thread::spawn(move || {
        vm.start();
        let progress = Arc::new(Progress::new());
        let mut ram = RamLoad::new(Arc::clone(&blocks), options, Arc::clone(&progress));
        if !far.is_empty() {
            ram = ram.with_channels(page_channels(far, &progress));
        }
        let postcopy = when.map(|_| PostcopyIncoming {
            blocks,
            urgent: Some(Channel::new(urgent.1, Arc::clone(&progress)).unwrap()),
            reconnect: Box::new(Next(there_hears, Arc::clone(&progress), Box::new(between))),
            failed: Arc::clone(&vm) as Arc<dyn HandlerFailed>,
            listening: None,
        });
        Incoming {
            configuration: theirs,
            guest: &*vm,
            handlers: vec![Box::new(ram)],
            devices: &mut Reserving(block, device),
            postcopy,
            progress: Arc::clone(&progress),
        }
        .run(Channel::new(main.1, progress).unwrap())
    });
    let progress = Arc::new(Progress::new());
    let tracker = |block: &MigrationBlock| -> Box<dyn DirtyTracker> {
        let (mapping, ram) = (Arc::clone(block.mapping()), Arc::clone(block.ram()));
        Box::new(WriteProtect::new(mapping, Some(ram)).unwrap())
    };
    let mut ram = RamSave::new(&from.blocks, options, Arc::clone(&progress), tracker).unwrap();
    if !near.is_empty() {
        ram = ram.with_channels(page_channels(near, &progress));
    }
    let postcopy = when.map(|when| PostcopyOutgoing {
        when,
        urgent: Some(Channel::new(urgent.0, Arc::clone(&progress)).unwrap()),
        reconnect: Box::new(Next(here_hears, Arc::clone(&progress), Box::new(|| {}))),
    });
    let mut parameters = Parameters::new(configuration);
    // The vCPUs never rest, so that precopy has to stop them with something left.
    // A page of 1 GiB is dirty as a whole with every byte, and mostly zeros, which makes the channel look slow.
    let gigantic = from.block.page_size() >= 1 << 30;
    parameters.downtime_limit = Duration::from_secs(if gigantic { 3600 } else { 2 });
    let outgoing = Outgoing {
        parameters,
        guest: &**here,
        handlers: vec![Box::new(ram)],
        devices: &mut Sending(Arc::clone(&from.device)),
        postcopy,
        progress: Arc::clone(&progress),
    };
    let sent = outgoing.run(Channel::new(main.0, progress).unwrap());
    let sent = sent.map_err(|failed| failed.error);
    (sent, receiving.join().unwrap())
}

fn page_channels(streams: Vec<UnixStream>, progress: &Arc<Progress>) -> PageChannels {
    let channel = |stream| Channel::new(stream, Arc::clone(progress)).unwrap();
    PageChannels::new(streams.into_iter().map(channel).collect()).unwrap()
}

/// Channels that were made before.
struct Next(
    Receiver<(UnixStream, UnixStream)>,
    Arc<Progress>,
    /// Called before each is used.
    Box<dyn FnMut() + Send>,
);

impl Reconnect for Next {
    fn reconnect(&mut self, _error: &MigrationError) -> Option<Channels> {
        let (main, urgent) = self.0.recv().ok()?;
        (self.2)();
        let channel = |stream| Channel::new(stream, Arc::clone(&self.1)).unwrap();
        Some(Channels { main: channel(main), urgent: Some(channel(urgent)) })
    }
}

/// A channel that breaks after `limit` bytes went to the destination.
fn breaking(limit: usize) -> (UnixStream, UnixStream) {
    use std::io::{Read, Write};
    use std::net::Shutdown;
    let (source, mut near) = UnixStream::pair().unwrap();
    let (mut far, destination) = UnixStream::pair().unwrap();
    let (mut back_from, mut back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
    thread::spawn(move || {
        let _ = io::copy(&mut back_from, &mut back_to);
        let _ = back_to.shutdown(Shutdown::Both);
    });
    thread::spawn(move || {
        let (mut buffer, mut left) = (vec![0; 64 << 10], limit);
        while left != 0 {
            let read = near.read(&mut buffer).unwrap_or(0);
            let pass = read.min(left);
            if read == 0 || far.write_all(&buffer[..pass]).is_err() {
                break;
            }
            left -= pass;
        }
        let _ = far.shutdown(Shutdown::Both);
        let _ = near.shutdown(Shutdown::Both);
    });
    (source, destination)
}

/// Migrates a guest whose driver plugs and unplugs blocks all the time: before, while it is moved, and afterwards; in
/// postcopy also over two channels that break.
fn with_resizes(
    kind: Kind,
    from: &Side,
    to: &Side,
    (when, channels): (Option<SwitchWhen>, usize),
    what: &str,
) {
    let here = Vm::new(from, &no_work(from.block.used_length()));
    let there = here.moved(to);
    // There are pages of 1 GiB for what is plugged at first.
    let nr_blocks = match kind {
        Kind::Gigantic => 1,
        _ => from.device.plugged().nr_blocks() as u64,
    };
    here.start();
    here.start_driver(nr_blocks, 2);
    here.run().unwrap();
    here.wait_rounds(3);
    there.start_driver(nr_blocks, 0);
    let attempts = if when.is_some() { 3 } else { 1 };
    migrate(from, to, &here, &there, (when, channels), attempts);
    while there.resizes() < 2 {
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(here.end(), 0, "{what}: pages wrong on the source");
    assert_eq!(there.end(), 0, "{what}: pages wrong on the destination");
    assert_eq!((from.leaked(), to.leaked()), (0, 0), "{what}: discarded memory is held");
}

/// Saves a guest whose driver plugs and unplugs blocks all the time, and restores it into memory of which is plugged
/// what was at the instant of the image.
fn background_with_resizes(kind: Kind, from: &Side, what: &str) {
    let here = Vm::new(from, &no_work(from.block.used_length()));
    here.start();
    here.run().unwrap();
    here.wait_rounds(3);
    // Some before the background begins to write. There are pages of 1 GiB for what is plugged at first.
    match kind {
        Kind::Gigantic => here.start_driver(1, 1),
        _ => here.start_driver(from.device.plugged().nr_blocks() as u64, 5),
    }
    let to = background(from, &here, || Side::new(kind, &here.plugged_at_stop()).unwrap());
    assert_eq!(here.differ_at_stop(&to), 0, "{what}");
    assert_eq!(here.end(), 0, "{what}: pages wrong on the source");
    assert_eq!((from.leaked(), to.leaked()), (0, 0), "{what}: discarded memory is held");
}

/// Saves a running guest, and restores the file into other memory.
fn background<S: Borrow<Side>>(from: &Side, here: &Arc<Vm>, to: impl FnOnce() -> S) -> S {
    let file = tempfile::tempfile().unwrap();
    let running = RunningGuest {
        configuration: Configuration::new("matrix"),
        blocks: &from.blocks,
        devices: &mut NoDevices,
        guest: &**here,
        progress: Arc::new(Progress::new()),
    };
    save_in_background(running, &file).unwrap();
    here.wait_rounds(2);
    let other = to();
    let to = other.borrow();
    let what = Restore {
        configuration: Configuration::new("matrix"),
        blocks: Arc::clone(&to.blocks),
        devices: &mut Reserving(Arc::clone(&to.block), Arc::clone(&to.device)),
        io: FileIo::default(),
        progress: Arc::new(Progress::new()),
    };
    restore(what, &file).unwrap();
    other
}

/// Saves a stopped guest, and lets it go on from the file at once.
fn lazily(from: &Side, to: &Side, here: &Arc<Vm>, there: &Arc<Vm>) {
    here.stop().unwrap();
    let file = Arc::new(tempfile::tempfile().unwrap());
    save_stopped(from, &file);
    let restored = restore_at_once(to, &file, Arc::clone(there) as Arc<dyn HandlerFailed>);
    there.start();
    there.run().unwrap();
    there.wait_rounds(2);
    restored.wait().unwrap();
    there.wait_rounds(2);
}

fn save_stopped(from: &Side, file: &File) {
    let stopped = StoppedGuest {
        configuration: Configuration::new("matrix"),
        blocks: &from.blocks,
        devices: &mut NoDevices,
        io: FileIo::default(),
        progress: Arc::new(Progress::new()),
    };
    save(stopped, file).unwrap();
}

fn restore_at_once(to: &Side, file: &Arc<File>, failed: Arc<dyn HandlerFailed>) -> LazyRestore {
    let what = Restore {
        configuration: Configuration::new("matrix"),
        blocks: Arc::clone(&to.blocks),
        devices: &mut Reserving(Arc::clone(&to.block), Arc::clone(&to.device)),
        io: FileIo::default(),
        progress: Arc::new(Progress::new()),
    };
    restore_lazily(what, Arc::clone(file), failed).unwrap()
}

const SMALL: usize = 6;

#[test]
fn precopy() {
    all(Way::Precopy, SMALL);
}

#[test]
fn hybrid() {
    all(Way::Hybrid, SMALL);
}

#[test]
fn postcopy() {
    all(Way::Postcopy, SMALL);
}

#[test]
fn recovered_postcopy() {
    all(Way::Recovered, SMALL);
}

#[test]
fn precopy_with_resizes() {
    all(Way::PrecopyWithResizes, SMALL);
}

#[test]
fn precopy_over_channels_with_resizes() {
    all(Way::ChannelsWithResizes, SMALL);
}

#[test]
fn postcopy_with_resizes() {
    all(Way::PostcopyWithResizes, SMALL);
}

#[test]
fn background_snapshot() {
    all(Way::BackgroundSnapshot, SMALL);
}

#[test]
fn background_snapshot_with_resizes() {
    all(Way::BackgroundSnapshotWithResizes, SMALL);
}

#[test]
fn lazy_restore() {
    all(Way::LazyRestore, SMALL);
}

/// Everything again, large and often.
#[test]
#[ignore = "a soak: takes as long as it is told to"]
fn soak() {
    let number = |name, default| {
        std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
    };
    let (nr_blocks, times) = (number("MATRIX_BLOCKS", 128), number("MATRIX_TIMES", 3));
    for time in 1..=times {
        say(&format!("soak: {time} of {times}, {} MiB", (nr_blocks as u64 * BLOCK) >> 20));
        for way in [
            Way::Precopy,
            Way::Hybrid,
            Way::Postcopy,
            Way::Recovered,
            Way::PrecopyWithResizes,
            Way::ChannelsWithResizes,
            Way::PostcopyWithResizes,
            Way::BackgroundSnapshot,
            Way::BackgroundSnapshotWithResizes,
            Way::LazyRestore,
        ] {
            all(way, nr_blocks);
        }
    }
}
