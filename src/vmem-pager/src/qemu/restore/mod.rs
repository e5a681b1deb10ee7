//! The source of a postcopy migration: a guest runs at once, and its memory follows.

use std::sync::Arc;

use parking_lot::Mutex;
use prometheus_client::registry::Registry;

use crate::cli::args::RestoreArgs;
use crate::cli::report::Report;
use crate::error::PagerError;
use crate::metrics::SharedRegistry;
use crate::run::Run;

/// What is measured of a restore.
pub struct RestoreMetrics {
    registry: SharedRegistry,
}

impl Default for RestoreMetrics {
    fn default() -> Self {
        Self::new()
    }
}

impl RestoreMetrics {
    /// All zero.
    pub fn new() -> Self {
        Self { registry: Arc::new(Mutex::new(Registry::with_prefix("vmem_pager_restore"))) }
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
    _args: &RestoreArgs,
    _run: &Arc<Run>,
    _report: &Report,
    _metrics: &RestoreMetrics,
) -> Result<(), PagerError> {
    Err(PagerError::Usage("restore: this version only saves".to_owned()))
}
