//! A migration as its administrator sees it, with the names of QEMU's query-migrate.

use std::time::Duration;

use migration::lazy::FaultStatistics;
use migration::{MigrationInfo, Status};
use serde::{Deserialize, Serialize};

/// How a migration stands. Times are in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationReport {
    /// QEMU's name of the state.
    pub status: String,
    /// Whether this process has done all it does for it.
    pub over: bool,
    /// Since it began, or until it ended.
    pub total_time: f64,
    /// Until memory began to be sent.
    pub setup_time: f64,
    /// From the guest's stop until it could run on the destination.
    pub downtime: Option<f64>,
    /// For how long block state was frozen, the last time, while the guest was here.
    #[serde(default)]
    pub busy_time: Option<f64>,
    /// How long it is expected to take until the guest can run at the destination. None where that is not
    /// known, or the guest writes too much for it to come to an end.
    #[serde(default)]
    pub expected_time_left: Option<f64>,
    /// Memory.
    pub ram: RamReport,
    /// Percentage of time that vCPUs are kept from running.
    pub cpu_throttle_percentage: u64,
    /// How often it went on over a new channel.
    #[serde(default)]
    pub recoveries: u64,
    /// Writes that waited for their page to be in a background snapshot.
    #[serde(default)]
    pub write_faults: u64,
    /// Faults of the guest, where its memory arrives while it runs.
    #[serde(default)]
    pub faults: Option<FaultReport>,
    /// Why it failed.
    pub error_desc: Option<String>,
}

/// How faults on memory that arrives were resolved. Times are in microseconds, to the next power
/// of two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FaultReport {
    /// Pages that were asked for, and have arrived.
    pub asked: u64,
    /// Pages that nothing comes for, filled with zeros on the spot.
    pub zero: u64,
    /// Faults on pages that had arrived by the time that the fault was looked at.
    pub arrived: u64,
    /// How long half of those who asked waited at most.
    pub p50: Option<u64>,
    /// How long 99 of 100 waited at most.
    pub p99: Option<u64>,
}

/// What became of memory. Sizes in bytes; the rest in pages of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RamReport {
    /// Bytes sent, all together.
    pub transferred: u64,
    /// Bytes that may still have to be sent.
    pub remaining: u64,
    /// Bytes that were there to be sent when it began.
    pub total: u64,
    /// Pages sent with their bytes.
    pub normal: u64,
    /// Pages sent as zeros.
    pub duplicate: u64,
    /// Pages discarded, not sent.
    pub discarded: u64,
    /// Pages never touched, not sent.
    pub holes: u64,
    /// Pages written although discarded, not sent.
    pub dirty_while_discarded: u64,
    /// How often written pages were collected.
    pub dirty_sync_count: u64,
    /// Pages written by the guest per second.
    pub dirty_pages_rate: u64,
}

impl MigrationReport {
    /// What the engine knows, and how it ended. What goes wrong before the engine has begun is an
    /// error as well.
    pub(super) fn new(
        known: &MigrationInfo,
        faults: Option<FaultStatistics>,
        outcome: Option<Result<(), String>>,
    ) -> Self {
        let error = outcome.clone().and_then(Result::err);
        let ended = matches!(known.status, Status::Failed | Status::Cancelled);
        let status = match &error {
            Some(_) if !ended => Status::Failed,
            _ => known.status,
        };
        Self {
            status: status.name().to_owned(),
            over: outcome.is_some(),
            total_time: milliseconds(known.total_time),
            setup_time: milliseconds(known.setup_time),
            downtime: known.downtime.map(milliseconds),
            busy_time: known.busy_time.map(milliseconds),
            expected_time_left: known.expected_time_left.map(milliseconds),
            ram: RamReport {
                transferred: known.transferred,
                remaining: known.remaining,
                total: known.total,
                normal: known.normal,
                duplicate: known.duplicate,
                discarded: known.discarded,
                holes: known.holes,
                dirty_while_discarded: known.dirty_while_discarded,
                dirty_sync_count: known.dirty_sync_count,
                dirty_pages_rate: known.dirty_pages_rate,
            },
            cpu_throttle_percentage: known.cpu_throttle_percentage,
            recoveries: known.postcopy_recoveries,
            write_faults: known.write_faults,
            faults: faults.as_ref().map(FaultReport::new),
            error_desc: error.or_else(|| known.error_desc.clone()),
        }
    }
}

impl FaultReport {
    fn new(known: &FaultStatistics) -> Self {
        let quantile = |share| {
            let time = known.remote.quantile(share)?;
            u64::try_from(time.as_micros()).ok()
        };
        Self {
            asked: known.remote.count,
            zero: known.zero.count,
            arrived: known.arrived,
            p50: quantile(0.5),
            p99: quantile(0.99),
        }
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
