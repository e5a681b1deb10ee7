//! Restoring a guest of Cloud Hypervisor's: the sender to `receive-migration`.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use migration::Status;
use serde_json::json;

use super::channel::Peer;
use super::filling::Filling;
use super::giving::{Giving, NotTaken};
use super::huge_pages;
use super::image::SavedGuest;
use super::lazy::{self, Faults};
use super::memory::{self, Memory};
use super::metrics::{RestoreMetrics, Source};
use super::pace::Pace;
use super::{edit, unix};
use crate::cli::args::RestoreArgs;
use crate::cli::report::Report;
use crate::error::PagerError;
use crate::run::Run;
use crate::socket::{self, Address};
use crate::working_set::WorkingSet;

/// What is restored, and how.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan<'a> {
    pub guest: &'a SavedGuest,
    /// Config with the edits that were asked for.
    pub config: &'a [u8],
    /// All memory is there before the guest runs.
    pub eager: bool,
    /// Bytes a second of what was not asked for.
    pub bandwidth: Option<u64>,
    /// What was touched first last time.
    pub replay: &'a WorkingSet,
    /// Where the order goes in which the guest touches its memory.
    pub record: Option<&'a Path>,
    /// Where Cloud Hypervisor listens.
    pub address: &'a Address,
}

/// Restores a guest.
///
/// # Errors
///
/// See [`PagerError`]. Cloud Hypervisor has dropped what it had got then, unless the error says otherwise.
pub fn run(
    args: &RestoreArgs,
    run: &Arc<Run>,
    report: &Report,
    metrics: &RestoreMetrics,
) -> Result<(), PagerError> {
    check(args)?;
    let common = &args.common;
    // A bad image is refused before Cloud Hypervisor is contacted, which can then be given a good one.
    let guest = SavedGuest::open(&common.image)?;
    for warning in guest.image().warnings() {
        report.warn(&format!("{}: {warning}", guest.image().path().display()));
    }
    let config = edit::apply(guest.config(), &args.set).map_err(PagerError::Usage)?;
    if guest.layout().prefault && !args.eager {
        return Err(PagerError::Usage(
            "the guest has prefault=on, with which Cloud Hypervisor takes no memory on demand; add --eager"
                .to_owned(),
        ));
    }
    let image = guest.image();
    let details = json!({
        "present_bytes": image.present_bytes(),
        "memory_bytes": guest.layout().size(),
        "virtio_mem": image.virtio_mem(),
        "runstate": image.runstate(),
    });
    report.event("image", &details);
    run.progress.set_status(Status::Setup);
    let shown = metrics.clone();
    let total = image.present_bytes();
    let following = report.follow(move || shown.figures(total));
    let replay = replay(args, &guest, report)?;
    let plan = Plan {
        guest: &guest,
        config: &config,
        eager: args.eager,
        bandwidth: args.bandwidth,
        replay: &replay,
        record: args.record.as_deref(),
        address: &common.socket,
    };
    let restored = restore(plan, run, report, metrics);
    drop(following);
    match &restored {
        Ok(()) => run.progress.set_status(Status::Completed),
        Err(error) => run.progress.fail(error),
    }
    restored?;
    report.outcome("completed", &metrics.summary());
    Ok(())
}

fn check(args: &RestoreArgs) -> Result<(), PagerError> {
    let usage = |what: &str| Err(PagerError::Usage(what.to_owned()));
    if args.common.qmp.is_some() {
        return usage(
            "--qmp is a control socket of QEMU's; leave it out with --vmm cloud-hypervisor",
        );
    }
    if args.supervise || args.worker {
        return usage(
            "--supervise is for Firecracker; Cloud Hypervisor's protocol cannot be continued; leave it out",
        );
    }
    if !args.memory_file.is_empty() {
        return usage(
            "--memory-file: an image of Cloud Hypervisor's has the memory in it; leave it out",
        );
    }
    if args.recover {
        return usage("--recover: Cloud Hypervisor cannot continue with another pager");
    }
    if args.eager && (args.record.is_some() || args.replay.is_some()) {
        return usage(
            "--record and --replay: with --eager all memory is there before the guest runs, and its order is \
             not seen and of no use; leave them out, or leave out --eager",
        );
    }
    unix(&args.common.socket)
}

/// What was touched first last time, of this guest.
fn replay(
    args: &RestoreArgs,
    guest: &SavedGuest,
    report: &Report,
) -> Result<WorkingSet, PagerError> {
    let Some(path) = &args.replay else { return Ok(WorkingSet::default()) };
    let set = WorkingSet::load(path, guest.image())?;
    if set.is_none() {
        let name = path.display();
        report.warn(&format!("{name}: the working set of another guest is not used"));
    }
    Ok(set.unwrap_or_default())
}

/// Gives a guest to the Cloud Hypervisor that listens.
pub(super) fn restore(
    plan: Plan<'_>,
    run: &Arc<Run>,
    report: &Report,
    metrics: &RestoreMetrics,
) -> Result<(), PagerError> {
    let Plan { guest, config, eager, address, .. } = plan;
    let pace = Pace::new(plan.bandwidth);
    // What cannot be had is known before Cloud Hypervisor is told anything.
    let mappings = &guest.layout().mappings;
    let memories: Vec<Memory> = mappings.iter().map(Memory::new).collect::<Result<_, _>>()?;
    huge_pages::reserve(guest, &memories, eager)?;
    let peer = Peer::new(socket::connect(address, run, report, None)?)?;
    report.event("connected", &json!({}));
    run.progress.set_status(Status::Active);
    let left_behind = || {
        report.warn(
            "Cloud Hypervisor has not said that it drops the guest: it may keep a paused copy of it; look at its \
             state (vm.info), and end it before the image is restored again",
        );
    };
    let mut giving = Giving::start(&peer, run, &left_behind)?;
    // Before the descriptors are handed over nothing else can touch this memory. Cloud Hypervisor asks for no page
    // of a virtio-mem region: what is plugged has to be there first, on demand, too.
    memory::fill(
        guest,
        &memories,
        &|mapping| eager || mapping.virtio_mem,
        &pace,
        &|pages| metrics.filled(Source::Before, pages),
        &|| {
            run.check("memory was being filled")?;
            match peer.is_closed() {
                true => Err(PagerError::Peer(format!(
                    "{} closed the connection while memory was being filled",
                    super::giving::WHO
                ))),
                false => Ok(()),
            }
        },
    )?;
    let files: Vec<File> = memories
        .iter()
        .map(|memory| memory.file().try_clone())
        .collect::<Result<_, _>>()
        .map_err(PagerError::system("duplicate a descriptor"))?;
    giving.memory(guest.layout(), &files)?;
    giving.config(config)?;
    if eager {
        giving.state(guest.state())?;
        giving.complete(guest.is_paused()).map_err(explain)?;
        report.event("running", &json!({ "paused": guest.is_paused() }));
        return Ok(());
    }
    let filling = Filling::new(guest, &memories, metrics);
    let faults = Faults::new(&filling, plan.replay.clone());
    let restored = lazy::restore(giving, &faults, &pace, plan, run, report);
    // Also of a restore that broke off: the guest may have run for long.
    faults.record(plan.record, report);
    restored
}

/// Says where the guest is when it was not taken.
pub(super) fn explain(error: NotTaken) -> PagerError {
    match error {
        NotTaken::Dropped(error) => error,
        NotTaken::Unknown(error) => PagerError::Peer(format!(
            "{error}; whether the guest runs there is not known: look at its state (vm.info), and end that \
             Cloud Hypervisor before the image is restored again"
        )),
    }
}
