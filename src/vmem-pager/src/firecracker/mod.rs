//! Firecracker: the page-fault handler of a snapshot that is loaded with the backend `Uffd`.
//!
//! Firecracker maps its guest's memory, connects to us, and sends its regions with the userfaultfd
//! ([`message`]); nothing is answered. From then on its vCPUs wait for the pages that they touch, which come from the
//! snapshot's memory file and its diffs ([`memory_files`]), until each page is with Firecracker or zeros
//! ([`guest`], [`fill`]). Then it needs no pager any more. States, deadlines and failures:
//! `spec-notes/pager-firecracker.md`.

mod background;
mod figures;
pub mod fill;
pub mod guest;
mod kept;
pub mod memory_files;
pub mod message;
pub mod order;
pub mod state_file;
mod supervisor;
#[cfg(test)]
mod tests;
mod vmm;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use migration::lazy::vmm_faults::VmmFaults;
use parking_lot::Mutex;
use program::service_manager;
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::json;

use crate::cli::args::RestoreArgs;
use crate::cli::report::Report;
use crate::error::PagerError;
use crate::metrics::Measured;
use crate::run::Run;
use crate::socket::{Address, Listener};
use crate::working_set::WorkingSet;
use background::Background;
use figures::Figures;
use fill::{Filling, TARGET_PAGE, Unplaced};
use guest::Guest;
use kept::Left;
use memory_files::MemoryFiles;
use message::Received;
use state_file::StateFile;
use vmm::Vmm;

/// Descriptors that a guest needs, and some more.
const DESCRIPTORS: usize = 16;

/// What is measured of a restore.
pub type RestoreMetrics = Measured<Figures>;

/// A Firecracker whose guest is to be filled.
#[derive(Debug)]
struct Loaded {
    vmm: Vmm,
    uffd: VmmFaults,
    guest: Guest,
}

/// Restores a guest.
///
/// # Errors
///
/// See [`PagerError`].
pub fn run(
    args: &RestoreArgs,
    run: &Arc<Run>,
    report: &Report,
    metrics: &RestoreMetrics,
) -> Result<(), PagerError> {
    if args.worker {
        let files = MemoryFiles::open(&args.memory_file)?;
        let replay = args.replay.as_deref().map(|path| replay(path, &files, report)).transpose()?;
        let left = supervisor::receive(std::io::stdin())?;
        let loaded = left.take_over(&files, run).map_err(|(error, vmm)| end(&vmm, error))?;
        return fill(args, run, report, metrics, files, loaded, replay.flatten().as_ref());
    }
    let done = match kept::take() {
        Ok(None) => begin(args, run, report, metrics),
        Ok(Some(left)) => proceed(args, run, report, metrics, left),
        Err((error, Some(vmm))) => Err(end(&vmm, error)),
        Err((error, None)) => Err(error),
    };
    kept::forget(report);
    done
}

/// Waits for a VMM, and serves its guest.
fn begin(
    args: &RestoreArgs,
    run: &Arc<Run>,
    report: &Report,
    metrics: &RestoreMetrics,
) -> Result<(), PagerError> {
    check(args)?;
    check_state_file(&args.common.image, report)?;
    let files = MemoryFiles::open(&args.memory_file)?;
    for warning in files.warnings() {
        report.warn(&warning);
    }
    let replay = args.replay.as_deref().map(|path| replay(path, &files, report)).transpose()?;
    let replay = replay.flatten();
    let spare = reserve()?;
    let listener = Listener::bind(&args.common.socket)?;
    let details = json!({ "memory_bytes": files.len(), "data_bytes": files.data_bytes() });
    report.event("listening", &details);
    ready(report);
    let loaded = accept(&listener, run, report, &files, spare)?;
    // One guest a pager: what connects next is told so.
    drop(listener);
    kept::keep(&loaded, report);
    if args.supervise {
        return supervisor::supervise(&loaded, &files, run, report);
    }
    let locked = kept::lock(loaded.guest.journal(), &loaded.vmm, run);
    locked.map_err(|error| end(&loaded.vmm, error))?;
    fill(args, run, report, metrics, files, loaded, replay.as_ref())
}

/// Serves the guest of a pager that has died. Its vCPUs wait: what fails here ends the VMM.
fn proceed(
    args: &RestoreArgs,
    run: &Arc<Run>,
    report: &Report,
    metrics: &RestoreMetrics,
    left: Left,
) -> Result<(), PagerError> {
    let opened = check(args).and_then(|()| MemoryFiles::open(&args.memory_file));
    let opened = opened.and_then(|files| {
        let set = args.replay.as_deref().map(|path| replay(path, &files, report)).transpose()?;
        Ok((files, set.flatten()))
    });
    let (files, replay) = opened.map_err(|error| end(&left.vmm, error))?;
    let loaded = if args.supervise { left.look(&files) } else { left.take_over(&files, run) };
    let loaded = loaded.map_err(|(error, vmm)| end(&vmm, error))?;
    let outstanding = loaded.guest.outstanding_bytes();
    report
        .event("continued", &json!({ "pid": loaded.vmm.pid(), "outstanding_bytes": outstanding }));
    ready(report);
    if args.supervise {
        return supervisor::supervise(&loaded, &files, run, report);
    }
    fill(args, run, report, metrics, files, loaded, replay.as_ref())
}

fn ready(report: &Report) {
    if let Err(error) = service_manager::ready() {
        report
            .warn(&format!("the service manager does not hear that this pager is ready: {error}"));
    }
}

/// Whether another process serves the guest.
pub fn is_supervisor(args: &RestoreArgs) -> bool {
    args.supervise && !args.worker
}

fn check(args: &RestoreArgs) -> Result<(), PagerError> {
    let wrong = |what: &str| Err(PagerError::Usage(what.to_owned()));
    if args.common.qmp.is_some() {
        return wrong("--qmp is QEMU's; leave the option out");
    }
    if args.recover {
        return wrong("--recover is QEMU's; leave the option out");
    }
    match args.common.socket {
        Address::Unix(_) => Ok(()),
        Address::Tcp(_) => {
            wrong("--socket: Firecracker connects to a Unix socket; expected a path")
        }
    }
}

/// Firecracker reads its state file itself, and refuses it. Here it is only looked at, so that a wrong one is told
/// before.
fn check_state_file(path: &Path, report: &Report) -> Result<(), PagerError> {
    if let Some(warning) = StateFile::read(path)?.warning(path) {
        report.warn(&warning);
    }
    Ok(())
}

/// Ids and pages by which working sets know a guest.
fn blocks(files: &MemoryFiles) -> [(String, u64); 1] {
    [("firecracker".to_owned(), files.len() / TARGET_PAGE)]
}

fn replay(
    path: &Path,
    files: &MemoryFiles,
    report: &Report,
) -> Result<Option<WorkingSet>, PagerError> {
    let set = WorkingSet::load_of(path, &blocks(files))?;
    if set.is_none() {
        let name = path.display();
        report.warn(&format!("{name}: the working set of another guest is not used"));
    }
    Ok(set)
}

/// Descriptors that no other part of this process can use up, as connections of scrapers do. When they cannot be had,
/// a VMM could connect and have no memory.
fn reserve() -> Result<Vec<File>, PagerError> {
    // Of nothing that has a name: this process opens only what the command line names.
    let spare = (0..DESCRIPTORS).map(|_| memfd_create("spare", MemfdFlags::CLOEXEC));
    let spare: Result<_, _> = spare.map(|file| Ok(File::from(file?))).collect();
    spare.map_err(PagerError::system("open as many files as a guest needs (see ulimit -n)"))
}

/// Waits for Firecracker and takes its message.
fn accept(
    listener: &Listener,
    run: &Run,
    report: &Report,
    files: &MemoryFiles,
    spare: Vec<File>,
) -> Result<Loaded, PagerError> {
    let mut spare = Some(spare);
    loop {
        listener.wait(run)?;
        // What follows needs them.
        drop(spare.take());
        let socket = listener.accept(run, None)?;
        let vmm = Vmm::of(socket);
        // A client that only probes the socket leaves without a word.
        let Some(received) = message::receive(vmm.socket(), run, files.len())? else {
            spare = reserve().ok();
            continue;
        };
        let (pid, kilobytes) = (vmm.pid(), received.text.len() >> 10);
        let loaded = load(&vmm, received, files);
        return match loaded {
            Ok((uffd, guest)) => {
                let regions = guest.regions().count();
                report.event(
                    "connected",
                    &json!({ "pid": pid, "regions": regions, "message_kib": kilobytes }),
                );
                Ok(Loaded { vmm, uffd, guest })
            }
            Err((error, true)) => Err(end(&vmm, error)),
            Err((error, false)) => Err(error),
        };
    }
}

/// Checks a message; with an error, whether it came with a userfaultfd, so that vCPUs will wait.
fn load(
    vmm: &Vmm,
    received: Received,
    files: &MemoryFiles,
) -> Result<(VmmFaults, Guest), (PagerError, bool)> {
    let Received { text, regions, fds, is_truncated } = received;
    let count = fds.len();
    // Of the two, in whatever order; a memfd that comes along is not needed, since pages are copied.
    let uffd = fds.into_iter().find_map(|fd| VmmFaults::new(fd).ok());
    // What did not arrive may have been one.
    let waits = uffd.is_some() || is_truncated;
    let refused = |what: String| {
        let pid = vmm.pid().map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
        (PagerError::Protocol(format!("the message of process {pid} is refused: {what}")), waits)
    };
    let regions = regions.map_err(refused)?;
    let uffd = uffd
        .ok_or_else(|| refused(format!("{count} descriptors came, and none is a userfaultfd")))?;
    let guest = Guest::new(&text, &regions, files).map_err(|error| (error, waits))?;
    Ok((uffd, guest))
}

/// Ends a VMM whose vCPUs would wait for ever.
fn end(vmm: &Vmm, error: PagerError) -> PagerError {
    if vmm.has_ended() {
        return error;
    }
    let outcome = match (vmm.kill(), vmm.pid()) {
        (true, Some(pid)) => {
            format!("Firecracker (process {pid}) was ended, since it cannot have its memory")
        }
        _ => "Firecracker waits for its memory for ever: end it".to_owned(),
    };
    PagerError::Unserved { outcome, source: Box::new(error) }
}

fn fill(
    args: &RestoreArgs,
    run: &Arc<Run>,
    report: &Report,
    metrics: &RestoreMetrics,
    files: MemoryFiles,
    loaded: Loaded,
    replay: Option<&WorkingSet>,
) -> Result<(), PagerError> {
    let Loaded { vmm, uffd, guest } = loaded;
    let figures = metrics.figures();
    figures.begin(guest.outstanding_bytes());
    let shown = Arc::clone(figures);
    let following = report.follow(move || shown.progress());
    let touched = args.record.is_some().then(|| replay.cloned().unwrap_or_default());
    let order = Mutex::new(order::Order::new(&guest, replay));
    let filling = Filling::new(uffd, files, guest, Arc::clone(figures), touched);
    let background = Background {
        filling: &filling,
        order: &order,
        figures,
        rate: args.bandwidth,
        eager: args.eager,
        recording: args.record.is_some(),
    };
    let filled = background.fill(&vmm, run);
    drop(following);
    // Also of a restore that broke off: the guest may have run for long.
    let set = filling.touched().filter(|set| set.runs().next().is_some());
    if let Some((path, set)) = args.record.as_deref().zip(set)
        && let Err(error) = set.save_of(path, &blocks(filling.files()))
    {
        report.warn(&error.to_string());
    }
    for path in filling.files().changed() {
        report.warn(&format!(
            "{}: was written to while it was served; the guest may have a mixture of old and new memory",
            path.display()
        ));
    }
    match filled {
        Err(Unplaced::Failed(error)) => Err(end(&vmm, error)),
        // One that ends when it has all of it has needed no more.
        Err(Unplaced::Ended) if filling.guest().outstanding_bytes() != 0 => {
            let left = filling.guest().outstanding_bytes();
            Err(PagerError::Peer(format!(
                "Firecracker ended before it had all of its memory: {left} bytes were outstanding"
            )))
        }
        Ok(()) | Err(Unplaced::Ended) => {
            report.outcome("completed", &figures.summary());
            Ok(())
        }
    }
}
