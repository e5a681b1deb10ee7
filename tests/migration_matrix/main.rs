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
mod moving;

use std::borrow::Borrow;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use migration::lazy::HandlerFailed;
use migration::postcopy::SwitchWhen;
use migration::snapshot::{
    FileIo, LazyRestore, Restore, RunningGuest, StoppedGuest, restore, restore_lazily, save,
    save_in_background,
};
use migration::stream::Configuration;
use migration::test_utils::breaking;
use migration::{Guest, MigrationInfo, NoDevices, Progress};

use device::Reserving;
use guest::{Vm, no_work};
use huge_page_pool::Pool;
use memory::{BLOCK, Kind, Pattern, Side, say};
use moving::{PageWay, run_by};

/// One at a time: the machine's pool of huge pages is shared, and so are its cores.
static ALONE: Mutex<()> = Mutex::new(());

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Precopy,
    /// Pages go over channels of their own, compressed.
    Compressed,
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
                Way::PrecopyWithResizes => {
                    with_resizes(kind, &from, &to, (None, PageWay::Main), &what)
                }
                Way::ChannelsWithResizes => {
                    with_resizes(kind, &from, &to, (None, PageWay::Channels(2)), &what)
                }
                Way::PostcopyWithResizes => {
                    let how = (Some(SwitchWhen::AtOnce), PageWay::Main);
                    with_resizes(kind, &from, &to, how, &what);
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
    let _ends = (here.ends_with_this(), there.ends_with_this());
    here.start();
    here.run().unwrap();
    here.wait_rounds(3);
    let postcopy = |when, attempts| {
        migrate(from, to, &here, &there, (Some(when), PageWay::Main), attempts);
    };
    match way {
        Way::Precopy => drop(migrate(from, to, &here, &there, (None, PageWay::Main), 1)),
        Way::Compressed => {
            let sent = migrate(from, to, &here, &there, (None, PageWay::Compressed(3)), 1);
            // Between its two stamps a page has zeros.
            assert!(sent.normal < 64 || sent.transferred < sent.normal * 1024, "{what}: {sent:?}");
        }
        Way::Hybrid => postcopy(SwitchWhen::Rounds(1), 1),
        Way::Postcopy => postcopy(SwitchWhen::AtOnce, 1),
        Way::Recovered => postcopy(SwitchWhen::AtOnce, 3),
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

/// Migrates over `attempts` pairs of channels, all but the last of which break; what was sent.
fn migrate(
    from: &Side,
    to: &Side,
    here: &Arc<Vm>,
    there: &Arc<Vm>,
    how: (Option<SwitchWhen>, PageWay),
    attempts: usize,
) -> MigrationInfo {
    // Enough for the guest to be handed over, and for some of its memory.
    let breaks =
        |attempt| breaking(from.block.used_length() as usize / 8 * attempt + 20_000).unwrap();
    let mut links: Vec<_> = (1..attempts).map(breaks).collect();
    links.push(UnixStream::pair().unwrap());
    let (sent, received) = run_by(from, to, (here, there), how, links, || {});
    let sent = sent.unwrap();
    received.unwrap();
    there.wait_rounds(3);
    sent
}

/// Migrates a guest whose driver plugs and unplugs blocks all the time: before, while it is moved, and afterwards; in
/// postcopy also over two channels that break.
fn with_resizes(
    kind: Kind,
    from: &Side,
    to: &Side,
    how: (Option<SwitchWhen>, PageWay),
    what: &str,
) {
    let here = Vm::new(from, &no_work(from.block.used_length()));
    let there = here.moved(to);
    let _ends = (here.ends_with_this(), there.ends_with_this());
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
    let attempts = if how.0.is_some() { 3 } else { 1 };
    migrate(from, to, &here, &there, how, attempts);
    there.wait_resizes(2);
    assert_eq!(here.end(), 0, "{what}: pages wrong on the source");
    assert_eq!(there.end(), 0, "{what}: pages wrong on the destination");
    assert_eq!((from.leaked(), to.leaked()), (0, 0), "{what}: discarded memory is held");
}

/// Saves a guest whose driver plugs and unplugs blocks all the time, and restores it into memory of which is plugged
/// what was at the instant of the image.
fn background_with_resizes(kind: Kind, from: &Side, what: &str) {
    let here = Vm::new(from, &no_work(from.block.used_length()));
    let _ends = here.ends_with_this();
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
fn precopy_over_channels_compressed() {
    all(Way::Compressed, SMALL);
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
            Way::Compressed,
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
