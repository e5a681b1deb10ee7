//! The source of a postcopy migration: a guest runs at once, and its memory follows.

mod batch;
mod destination;
mod eager;
mod figures;
mod lazy;
mod lost;
mod page_writer;
pub mod preamble;
mod serve;
mod supply;
#[cfg(test)]
mod tests;
mod urgent;

use std::path::Path;
use std::sync::Arc;

use serde_json::json;

use crate::cli::args::RestoreArgs;
use crate::cli::report::Report;
use crate::error::PagerError;
use crate::image::GuestImage;
use crate::metrics::Measured;
use crate::run::Run;
use crate::socket::Address;
use crate::working_set::WorkingSet;
use destination::Destination;
use eager::Eager;
use figures::Figures;
use lazy::{Guest, Lazy};
use supply::Supply;

/// What is measured of a restore.
pub type RestoreMetrics = Measured<Figures>;

/// What is sent, where to, and who is told.
#[derive(Clone, Copy)]
struct Transfer<'a> {
    run: &'a Run,
    report: &'a Report,
    /// Where QEMU listens.
    address: &'a Address,
    supply: &'a Supply<'a>,
    figures: &'a Figures,
    /// Bytes a second of what was not asked for.
    bandwidth: Option<u64>,
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
    if !args.memory_file.is_empty() {
        let what = "--memory-file: an image of QEMU's has the memory in it; leave the option out";
        return Err(PagerError::Usage(what.to_owned()));
    }
    if args.supervise || args.worker {
        let what = "--supervise: QEMU waits by itself when a pager dies, for one with --recover; leave the option out";
        return Err(PagerError::Usage(what.to_owned()));
    }
    let image = GuestImage::open(&args.common.image)?;
    if crate::cloud_hypervisor::image::is_ours(&image) {
        let path = image.path().to_owned();
        let what = "an image of Cloud Hypervisor's; restore it with --vmm cloud-hypervisor";
        return Err(PagerError::Image { path, what: what.to_owned() });
    }
    if !args.set.is_empty() {
        let what = "--set: QEMU is given its paths on its own command line; leave the option out";
        return Err(PagerError::Usage(what.to_owned()));
    }
    for warning in image.warnings() {
        report.warn(&format!("{}: {warning}", image.path().display()));
    }
    let details = json!({
        "present_bytes": image.present_bytes(),
        "mapped_ram": image.is_mapped(),
        "virtio_mem": image.virtio_mem(),
        "runstate": image.runstate(),
    });
    report.event("image", &details);
    let supply = Supply::new(&image);
    if let Some(path) = &args.replay {
        replay(path, &image, &supply, report)?;
    }
    let destination = args.common.qmp.as_deref();
    let destination =
        destination.map(|path| Destination::connect(path, run, report)).transpose()?;
    if image.is_paused() && !args.eager && !args.recover && destination.is_none() {
        report.warn(
            "the guest was saved while it was paused, and QEMU starts it at the end of this all the same unless \
             it was started with -S; with --qmp it stays paused",
        );
    }
    let figures = metrics.figures();
    let shown = Arc::clone(figures);
    let following = report.follow(move || shown.progress());
    let (address, bandwidth) = (&args.common.socket, args.bandwidth);
    let transfer = Transfer { run, report, address, supply: &supply, figures, bandwidth };
    let guest = destination.as_ref().map(|destination| destination as &dyn Guest);
    let mut lazy = Lazy { transfer, guest, preempt: None };
    if let Some(destination) = &destination {
        match args.recover {
            true => destination.recover(address)?,
            false => {
                let preempt = destination.prepare(address, !args.eager, image.is_paused())?;
                lazy.preempt = Some(preempt);
            }
        }
    }
    let restored = match (args.eager, args.recover) {
        (true, _) => Eager(transfer).start(),
        (_, true) => lazy.recover(),
        (_, false) => lazy.start(),
    };
    drop(following);
    let touched = supply.touched();
    // Also of a restore that broke off: a guest may have run for long.
    let record = args.record.as_deref().filter(|_| touched.runs().next().is_some());
    if let Some(Err(error)) = record.map(|path| touched.save(path, &image)) {
        report.warn(&error.to_string());
    }
    restored.map_err(|error| match &destination {
        Some(destination) => destination.explain(error),
        None => error,
    })?;
    if let Some(destination) = &destination {
        destination.wait_completed()?;
        destination.resize_again(report)?;
    }
    report.outcome("completed", &figures.summary());
    Ok(())
}

/// Has what was touched first last time sent first.
fn replay(
    path: &Path,
    image: &GuestImage,
    supply: &Supply<'_>,
    report: &Report,
) -> Result<(), PagerError> {
    let name = path.display();
    match WorkingSet::load(path, image)? {
        None => report.warn(&format!("{name}: the working set of another guest is not used")),
        Some(set) => {
            let absent = supply.replay(&set);
            if absent != 0 {
                report.warn(&format!(
                    "{name}: {absent} pages are not in the image, and are left out"
                ));
            }
        }
    }
    Ok(())
}
