//! The management API: HTTP/1.1 with JSON on a Unix socket.
//!
//! - [`Management`] is what the API needs of the device; the server knows nothing else of it.
//! - [`Server`] has the socket; `router` the resources; [`ErrorAnswer`] every error.
//! - [`openapi()`] describes all of it, and is served at `/openapi.json`; `page` is what a browser shows.

mod audit;
mod body;
mod caller;
mod event_stream;
#[cfg(any(test, feature = "test-utils"))]
pub mod fake;
mod hangup;
mod openapi;
mod page;
mod places;
mod problem;
mod range_lists;
mod router;
mod server;
mod stream;
#[cfg(test)]
mod tests;

pub use openapi::openapi;
pub use problem::{ErrorAnswer, Refusal};
pub use range_lists::{RangeList, Ranges};
pub use router::OPENMETRICS;
pub use server::Server;

use management_api::{DeviceInfo, Event, Swept};
use tokio::sync::broadcast;

/// The whole region at one moment, as maximal ascending ranges.
pub struct BlockRanges {
    /// What the guest may use.
    pub plugged: RangeList,
    /// What it may not.
    pub discarded: RangeList,
}

/// The device as the management API sees it.
///
/// All calls may block; the server makes them on threads of their own.
pub trait Management: Send + Sync + 'static {
    /// The device now.
    fn device(&self) -> DeviceInfo;

    /// Asks the guest to plug this much.
    ///
    /// # Errors
    ///
    /// When the size breaks a rule of the device; nothing has changed then.
    fn resize(&self, requested_size: u64) -> Result<DeviceInfo, Refusal>;

    /// What is plugged, and what is not, at one moment.
    fn blocks(&self) -> BlockRanges;

    /// Where the host holds memory; `None` when guest memory is not mapped.
    fn resident(&self) -> Option<RangeList>;

    /// Unplugs and discards everything.
    ///
    /// # Errors
    ///
    /// When that is not possible now.
    fn system_reset(&self) -> Result<DeviceInfo, Refusal>;

    /// Discards what the guest has in unplugged memory.
    ///
    /// # Errors
    ///
    /// When memory must stay as it is now, or cannot be discarded.
    fn sweep(&self) -> Result<Swept, Refusal>;

    /// Starts or ends migration.
    ///
    /// # Errors
    ///
    /// When that cannot be saved. Nothing has changed then if it was to start; if it was to end, it
    /// has ended nevertheless.
    fn set_migration(&self, active: bool) -> Result<DeviceInfo, Refusal>;

    /// Has this logged from now on: a level, or a list of levels and of TARGET=LEVEL.
    ///
    /// # Errors
    ///
    /// When the text is not that; nothing has changed then.
    fn set_log_level(&self, level: &str) -> Result<(), Refusal>;

    /// All metrics in the OpenMetrics text format.
    fn metrics(&self) -> String;

    /// Events from now on.
    fn subscribe(&self) -> broadcast::Receiver<Event>;
}
