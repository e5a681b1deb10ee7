//! The source of a postcopy migration: a guest runs at once, and its memory follows.

mod figures;
mod lazy;
mod lost;
mod page_writer;
mod preamble;
mod serve;
mod supply;

use std::sync::Arc;

use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use serde_json::json;

use crate::cli::args::RestoreArgs;
use crate::cli::report::Report;
use crate::error::PagerError;
use crate::image::GuestImage;
use crate::metrics::SharedRegistry;
use crate::run::Run;
use figures::Figures;
use lazy::Lazy;
use supply::Supply;

/// What is measured of a restore.
pub struct RestoreMetrics {
    registry: SharedRegistry,
    figures: Arc<Figures>,
}

impl Default for RestoreMetrics {
    fn default() -> Self {
        Self::new()
    }
}

impl RestoreMetrics {
    /// All zero.
    pub fn new() -> Self {
        let registry = Arc::new(Mutex::new(Registry::with_prefix("vmem_pager_restore")));
        let figures = Figures::new(&registry);
        Self { registry, figures }
    }

    /// What scrapers are told.
    pub fn registry(&self) -> SharedRegistry {
        Arc::clone(&self.registry)
    }
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
    if args.memory_file.is_some() {
        let what = "--memory-file: an image of QEMU's has the memory in it; leave the option out";
        return Err(PagerError::Usage(what.to_owned()));
    }
    let image = GuestImage::open(&args.common.image)?;
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
    let figures = &metrics.figures;
    let shown = Arc::clone(figures);
    let following = report.follow(move || shown.progress());
    let lazy = Lazy {
        run,
        report,
        address: &args.common.socket,
        supply: &supply,
        figures,
        bandwidth: args.bandwidth,
        guest: None,
    };
    if args.recover {
        lazy.recover()?
    } else {
        lazy.start()?
    }
    drop(following);
    report.event("completed", &figures.summary());
    Ok(())
}
