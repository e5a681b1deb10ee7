//! What requests and answers of the daemon's management API carry: HTTP/1.1 with JSON on a Unix socket.
//!
//! ```text
//!   vmemctl, an orchestrator                                vhost-user-mem
//!   PUT /v1/device/requested-size  RequestedSize  --->
//!                                                 <---  DeviceInfo, or a Problem (RFC 9457)
//!   GET /v1/events                                --->
//!                                                 <---  Event, Event, ... (server-sent events)
//! ```
//!
//! ```
//! use management_api::{Event, RequestedSize};
//!
//! let body = serde_json::to_string(&RequestedSize { requested_size: 1 << 30 }).unwrap();
//! assert_eq!(body, r#"{"requested_size":1073741824}"#);
//! assert_eq!(Event::parse("migration", r#"{"active":true}"#), Some(Event::Migration(true)));
//! ```

mod device;
mod event;
mod problem;
mod resize;
mod time;

pub use device::{Blocks, DeviceInfo, LogLevel, MigrationSetting, Range, RequestedSize, Resident};
pub use event::Event;
pub use problem::{PROBLEM_JSON, Problem};
pub use resize::{Direction, LastRequest, Resize, ResizeState, StallKind, StallReason, Swept};
pub use time::rfc3339;
