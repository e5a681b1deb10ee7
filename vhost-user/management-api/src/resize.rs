//! How far the guest has got with what it is asked for, and what keeps it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How the guest is doing with the requested size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Resize {
    /// Whether it is done, on its way, or stands still.
    pub state: ResizeState,
    /// Which way the guest has to go; null when it is done.
    #[schema(required)]
    pub direction: Option<Direction>,
    /// Bytes between plugged_size and requested_size.
    pub remaining_size: u64,
    /// Bytes a second in the last ten seconds; null unless there was progress in them.
    #[schema(required)]
    pub rate: Option<u64>,
    /// Seconds until the guest is done, at this rate; null while there is none.
    #[schema(required)]
    pub expected_seconds: Option<u64>,
    /// Since when nothing has moved: the last progress, or the request for this size if that was
    /// later. Null when the guest is done. RFC 3339, UTC.
    #[schema(required, format = DateTime)]
    pub since: Option<String>,
    /// What keeps the guest, when it stands still.
    #[schema(required)]
    pub reason: Option<StallReason>,
    /// The guest's last request to plug or unplug, of any time; null when this daemon has seen none.
    #[schema(required)]
    pub last_request: Option<LastRequest>,
}

/// Whether a resize is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ResizeState {
    /// As much is plugged as is requested.
    Done,
    /// The guest was asked less than ten seconds ago, and nothing is known that would keep it.
    Waiting,
    /// There was progress in the last ten seconds.
    Progressing,
    /// It stands still; there is a reason.
    Stalled,
}

/// Which way the guest has to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// It is asked to plug.
    Grow,
    /// It is asked to unplug.
    Shrink,
}

/// What keeps the guest, as far as the device can know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StallReason {
    /// For programs.
    pub kind: StallKind,
    /// For people: what was seen, and what to do. It may have words of a client of the discard channel
    /// in it.
    pub text: String,
}

/// Why a resize stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum StallKind {
    /// No front-end is connected.
    NoFrontEnd,
    /// Block state is frozen: every request is answered with BUSY.
    Migration,
    /// The front-end has sent no memory for part of the region.
    NoMemory,
    /// The queue has not run since the front-end connected: the guest has not booted, or has no driver.
    DriverAbsent,
    /// The driver has not accepted VIRTIO_F_VERSION_1.
    FeaturesNotAccepted,
    /// The queue has run, and was stopped: the guest is paused, was reset, or has unloaded its driver.
    QueueStopped,
    /// The last request was answered with BUSY: the host could not give or take memory.
    HostMemory,
    /// The last request was answered with BUSY: a listener or a client of the discard channel refused.
    Refused,
    /// The last request was answered with BUSY: the state could not be saved.
    StateNotSaved,
    /// The last request was answered with ERROR: Linux calls the device broken then, and asks no more.
    DriverBroken,
    /// The last request was answered with NACK: the guest asked for more than it may have.
    Rejected,
    /// The guest unplugs at once what it has plugged: it cannot use it.
    GuestCannotAdd,
    /// The guest's memory blocks do not fit into what is left of the region.
    OutOfReach,
    /// The guest plugs no more until what it has plugged is online there.
    NotOnline,
    /// The guest does not ask for anything.
    GuestSilent,
    /// The guest does not unplug what it still has: it uses it, or cannot move it.
    Unmovable,
    /// One that this version does not know.
    #[serde(other)]
    Unknown,
}

/// A request of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LastRequest {
    /// PLUG, UNPLUG or UNPLUG_ALL, as in the metrics.
    #[serde(rename = "type")]
    pub request_type: String,
    /// How it was answered, as in the metrics.
    pub response: String,
    /// When. RFC 3339, UTC.
    #[schema(format = DateTime)]
    pub at: String,
}

/// What a sweep has discarded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Swept {
    /// Bytes of unplugged memory that the host held, and holds no longer.
    pub swept_size: u64,
}
