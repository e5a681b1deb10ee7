//! The destination of a migration: what QEMU sends becomes an image.

use std::sync::Arc;

use parking_lot::Mutex;
use prometheus_client::registry::Registry;

use crate::cli::args::SaveArgs;
use crate::cli::report::Report;
use crate::error::PagerError;
use crate::metrics::SharedRegistry;
use crate::run::Run;

/// What is measured of a save.
pub struct SaveMetrics {
    registry: SharedRegistry,
}

impl Default for SaveMetrics {
    fn default() -> Self {
        Self::new()
    }
}

impl SaveMetrics {
    /// All zero.
    pub fn new() -> Self {
        Self { registry: Arc::new(Mutex::new(Registry::with_prefix("vmem_pager_save"))) }
    }

    /// What scrapers are told.
    pub fn registry(&self) -> SharedRegistry {
        Arc::clone(&self.registry)
    }
}

/// Saves a guest.
///
/// # Errors
///
/// See [`PagerError`].
pub fn run(
    _args: &SaveArgs,
    _run: &Arc<Run>,
    _report: &Report,
    _metrics: &SaveMetrics,
) -> Result<(), PagerError> {
    Err(PagerError::Usage("save: this version only restores".to_owned()))
}
