//! Runs one case: source and destination are threads of this process.

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use migration::dirty::{DirtyTracker, Merged, WriteProtect};
use migration::lazy::HandlerFailed;
use migration::postcopy::{GiveUp, PostcopyIncoming, PostcopyOutgoing, SwitchWhen};
use migration::ram::{ListOptions, MigrationBlock, RamLoad, RamSave};
use migration::snapshot::{
    FileIo, Restore, RunningGuest, StoppedGuest, restore_lazily, save, save_in_background,
};
use migration::{
    Channel, Guest, Incoming, MigrationInfo as Seen, NoDevices, Outgoing, Parameters, Progress,
};

use crate::case::{Case, Way};
use crate::guest::Writer;
use crate::host;
use crate::link::{Channels, Ends};
use crate::record::Figures;
use crate::side::Side;
use crate::units::{GIB, MIB, PAGE, millis};

/// Runs `case` on fresh memory; a file that it needs is made in `dir`, and has no name.
///
/// # Errors
///
/// Why it could not be run to its end.
pub fn run(case: &Case, dir: &Path) -> Result<Figures> {
    let from = Side::new(case)?;
    from.fill(case);
    match case.way {
        Way::Precopy => migrate(case, &from, None),
        Way::Hybrid => migrate(case, &from, Some(SwitchWhen::Rounds(1))),
        Way::Postcopy => migrate(case, &from, Some(SwitchWhen::AtOnce)),
        Way::BackgroundSnapshot => snapshot(case, &from, dir),
        Way::Restore => restore(case, from, dir),
    }
}

/// More than this would be cold again before a run comes to use it, where [`host::warm`] matters.
const WARM: u64 = 2 * GIB;

/// Memory for what a run will take: the rest of the source, the destination, a file.
fn warm(case: &Case) -> Result<()> {
    Ok(host::warm(case.memory().saturating_sub(case.touched()).min(WARM))?)
}

/// What is taken before a run.
struct Before {
    cpu: std::time::Duration,
    read: Option<u64>,
}

impl Before {
    fn now() -> Self {
        Self { cpu: host::cpu_time(), read: host::bytes_read() }
    }

    /// Processor time since, milliseconds.
    fn cpu(&self) -> f64 {
        millis(host::cpu_time().saturating_sub(self.cpu))
    }

    /// Bytes read since.
    fn read(&self) -> Option<u64> {
        Some(host::bytes_read()? - self.read?)
    }
}

fn figures(seen: &Seen) -> Figures {
    Figures {
        wire: seen.transferred,
        normal: seen.normal,
        zero: seen.duplicate,
        holes: seen.holes,
        discarded: seen.discarded,
        requests: seen.postcopy_requests,
        write_faults: seen.write_faults,
        setup: millis(seen.setup_time),
        total: millis(seen.total_time),
        downtime: seen.downtime.map(millis),
        ..Figures::default()
    }
}

/// Sees what the guest writes, as that of a VMM would.
fn tracker(block: &MigrationBlock) -> Result<Box<dyn DirtyTracker>> {
    // Where holes are read, they become data, which is not to be taken for a write.
    let file = (!block.options().send_holes).then(|| Arc::clone(block.ram()));
    let tracker = WriteProtect::new(Arc::clone(block.mapping()), file);
    Ok(Box::new(tracker.context("cannot track writes")?))
}

/// Moves the guest over Unix sockets: a main channel, with postcopy one for urgent pages, and those that the case
/// has for pages.
fn migrate(case: &Case, from: &Side, when: Option<SwitchWhen>) -> Result<Figures> {
    let to = Side::new(case)?;
    let (near, far) = Ends::pair(case.link)?;
    let mut track = Some(tracker(&from.block)?);
    warm(case)?;
    let here = Writer::new(from.block.mapping(), case);
    here.run().map_err(|reason| anyhow!(reason))?;
    let resident = from.resident()?;

    let before = Before::now();
    let progress = Arc::new(Progress::new());
    let sent = thread::scope(|scope| {
        let receiving = scope.spawn(|| receive(case, &to, when, far));
        let sent = send(case, from, &here, &mut track, when, near, &progress);
        let received = receiving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        received.context("on the destination").and(sent.context("on the source"))
    });
    sent?;
    let (cpu, read) = (before.cpu(), before.read());

    let mut figures = Figures {
        cpu,
        source: [resident, from.resident()?],
        destination: to.resident()?,
        ..figures(&progress.snapshot())
    };
    figures.check(read);
    Ok(figures)
}

fn options(when: Option<SwitchWhen>) -> ListOptions {
    ListOptions { postcopy: when.is_some(), ..ListOptions::default() }
}

fn send(
    case: &Case,
    from: &Side,
    guest: &Arc<Writer>,
    track: &mut Option<Box<dyn DirtyTracker>>,
    when: Option<SwitchWhen>,
    ends: Ends,
    progress: &Arc<Progress>,
) -> Result<()> {
    let Channels { main, urgent, pages } = ends.channels(progress)?;
    // There is one block, which takes the tracker.
    let take = |_: &MigrationBlock| track.take().unwrap_or_else(|| Box::<Merged>::default());
    let ram = RamSave::new(&from.blocks, options(when), Arc::clone(progress), take)?;
    let ram = match pages {
        Some(pages) => ram.with_channels(pages),
        None => ram,
    };
    let urgent = when.map(|_| Channel::new(urgent, Arc::clone(progress))).transpose()?;
    let postcopy = when.map(|when| PostcopyOutgoing { when, urgent, reconnect: Box::new(GiveUp) });
    let outgoing = Outgoing {
        parameters: Parameters::new(case.link.configuration()),
        guest: &**guest,
        handlers: vec![Box::new(ram)],
        devices: &mut NoDevices,
        postcopy,
        progress: Arc::clone(progress),
    };
    Ok(outgoing.run(main)?)
}

/// Takes the guest, which runs on here until all of its memory is there.
fn receive(case: &Case, to: &Side, when: Option<SwitchWhen>, ends: Ends) -> Result<()> {
    let guest = Writer::new(to.block.mapping(), case);
    let progress = Arc::new(Progress::new());
    let Channels { main, urgent, pages } = ends.channels(&progress)?;
    let postcopy = match when {
        Some(_) => Some(PostcopyIncoming {
            blocks: Arc::clone(&to.blocks),
            urgent: Some(Channel::new(urgent, Arc::clone(&progress))?),
            reconnect: Box::new(GiveUp),
            failed: Arc::clone(&guest) as Arc<dyn HandlerFailed>,
            listening: None,
        }),
        None => None,
    };
    let ram = RamLoad::new(Arc::clone(&to.blocks), options(when), Arc::clone(&progress));
    let ram = match pages {
        Some(pages) => ram.with_channels(pages),
        None => ram,
    };
    let incoming = Incoming {
        configuration: case.link.configuration(),
        guest: &*guest,
        handlers: vec![Box::new(ram)],
        devices: &mut NoDevices,
        postcopy,
        progress: Arc::clone(&progress),
    };
    Ok(incoming.run(main)?)
}

/// Saves the running guest to a file in `dir`.
fn snapshot(case: &Case, from: &Side, dir: &Path) -> Result<Figures> {
    let file = tempfile::tempfile_in(dir)?;
    warm(case)?;
    let guest = Writer::new(from.block.mapping(), case);
    guest.run().map_err(|reason| anyhow!(reason))?;
    let resident = from.resident()?;

    let before = Before::now();
    let progress = Arc::new(Progress::new());
    let running = RunningGuest {
        configuration: case.link.configuration(),
        blocks: &from.blocks,
        devices: &mut NoDevices,
        guest: &*guest,
        progress: Arc::clone(&progress),
    };
    save_in_background(running, &file)?;
    let cpu = before.cpu();

    let mut figures =
        Figures { cpu, source: [resident, from.resident()?], ..figures(&progress.snapshot()) };
    figures.check(Some(host::resident(&file)?));
    Ok(figures)
}

/// Lets a guest go on from a file that was saved before, while its memory is read.
fn restore(case: &Case, from: Side, dir: &Path) -> Result<Figures> {
    let file = Arc::new(tempfile::tempfile_in(dir)?);
    let stopped = StoppedGuest {
        configuration: case.link.configuration(),
        blocks: &from.blocks,
        devices: &mut NoDevices,
        io: FileIo { threads: 1, direct: false },
        progress: Arc::new(Progress::new()),
    };
    let resident = from.resident()?;
    save(stopped, &file)?;
    let after = from.resident()?;
    drop(from);
    let to = Side::new(case)?;
    warm(case)?;
    let guest = Writer::new(to.block.mapping(), case);

    let before = Before::now();
    let begin = Instant::now();
    let progress = Arc::new(Progress::new());
    let what = Restore {
        configuration: case.link.configuration(),
        blocks: Arc::clone(&to.blocks),
        devices: &mut NoDevices,
        io: FileIo { threads: 1, direct: false },
        progress: Arc::clone(&progress),
    };
    let failed = Arc::clone(&guest) as Arc<dyn HandlerFailed>;
    let restored = restore_lazily(what, Arc::clone(&file), failed)?;
    guest.run().map_err(|reason| anyhow!(reason))?;
    let downtime = Some(millis(begin.elapsed()));
    restored.wait()?;
    let (cpu, read) = (before.cpu(), before.read());

    let seen = progress.snapshot();
    let mut figures = Figures {
        cpu,
        downtime,
        source: [resident, after],
        destination: to.resident()?,
        ..figures(&seen)
    };
    // The engine counts pages, but the bitmap of the file is read, too: a bit a page.
    figures.wire += case.region / PAGE / 8;
    // The stream around the pages is read through a buffer of 1 MiB.
    figures.check_beside(read, MIB);
    Ok(figures)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::Mode;
    use crate::content::Content;
    use crate::link::Link;

    #[test]
    fn a_guest_arrives_whole_over_every_link() {
        for link in Link::ALL {
            let (case, figures) = over(link, Content::Noise);
            assert_eq!(figures.normal * PAGE, case.touched(), "{link:?}");
            assert_eq!(figures.destination, case.touched(), "{link:?}");
            assert!(figures.wire > case.touched(), "{link:?}: {} bytes", figures.wire);
        }
    }

    /// A small guest.
    fn over(link: Link, content: Content) -> (Case, Figures) {
        let case = Case {
            region: 64 * MIB,
            plugged: 32 * MIB,
            touched_percent: 50,
            dirty_rate: 0,
            way: Way::Precopy,
            mode: Mode::HoleAware,
            link,
            content,
        };
        (case, run(&case, &std::env::temp_dir()).unwrap())
    }

    #[test]
    fn what_shrinks_is_two_to_three_times_smaller_and_noise_goes_plain() {
        for content in Content::ALL {
            for link in Link::COMPRESSED {
                let (case, figures) = over(link, content);
                assert_eq!(figures.normal * PAGE, case.touched(), "{case}");
                assert_eq!(figures.destination, case.touched(), "{case}");
                let share = figures.wire as f64 / case.touched() as f64;
                let expected = match (content, link.zstd) {
                    (Content::Mixed, true) => 0.33..0.5,
                    _ => 1.0..1.01,
                };
                assert!(expected.contains(&share), "{case}: {share}");
            }
        }
    }
}
