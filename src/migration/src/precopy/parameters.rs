//! What a migration may cost, and how long it waits.

use std::time::Duration;

use super::convergence::{AtMaxRounds, ThrottleParameters};
use crate::stream::Configuration;

/// What a migration may cost, under QEMU's names.
#[derive(Clone, Debug)]
pub struct Parameters {
    /// Bytes a second; `None` or 0 for as fast as the channel takes.
    pub max_bandwidth: Option<u64>,
    /// Bytes a second of postcopy's pages that were not asked for; `None` or 0 for as fast as the channel
    /// takes. The less, the sooner a vCPU that waits for a page has it. A host page goes whole, and
    /// what it takes beyond the limit is made up for by a longer pause.
    pub max_postcopy_bandwidth: Option<u64>,
    /// The guest is stopped once what is left is expected to take no longer, the time to find it out
    /// included, and sending some more of it first would not make it much less.
    pub downtime_limit: Duration,
    /// How often dirty pages are collected at most, where postcopy was not provided for. By default 500:
    /// a guest that writes faster than memory is sent is told from one that takes long, and the
    /// steps of auto-converge have had their time.
    pub max_rounds: u64,
    /// What follows when what is left does not fit the downtime limit then; by default the
    /// migration fails.
    pub at_max_rounds: AtMaxRounds,
    /// How vCPUs are slowed down when they write faster than memory is sent.
    pub throttle: ThrottleParameters,
    /// How long the destination may read nothing, and how long it may take for its verdict, while the
    /// guest is stopped. One that takes so long again to take the guest does not get it any more,
    /// unless it is just doing so: until it says which, or the channel breaks, the guest stays
    /// stopped. A socket whose other host may vanish should have SO_KEEPALIVE and TCP_USER_TIMEOUT
    /// set. While the guest runs, here or there, writes wait for as long as the channel's handle says
    /// ([`Channel::set_write_patience`](crate::Channel::set_write_patience)).
    pub switchover_timeout: Duration,
    /// For how long a PLUG of the guest waits for the destination, whose device follows, before it is answered with
    /// BUSY; 1 s by default. `None` keeps block state frozen from the beginning to the end, as a destination does that
    /// cannot follow, and a manager of discarded memory that can only freeze.
    pub block_state_timeout: Option<Duration>,
    /// How hard pages are compressed, 1 to 20, where the configuration has the capability
    /// [`CAPABILITY_MULTIFD_ZSTD`](crate::stream::CAPABILITY_MULTIFD_ZSTD); 1, the fastest, by default. The source
    /// alone has a level. Both sides keep some MiB a channel for it, the source up to 50 MiB at the highest levels.
    pub multifd_zstd_level: u8,
    /// What both sides must agree on: machine type and capabilities.
    pub configuration: Configuration,
    /// Whether nothing is heard of a destination: the stream goes to a file, or down a pipe. All of
    /// it being written is then all that is known at the end. The guest stays stopped here, and it is
    /// for the VMM to say whether it continues here or where the stream is loaded, and never both.
    /// Postcopy is not possible.
    pub one_way: bool,
    /// Whether the guest, once it is stopped, waits for [`Progress::continue_switchover`](crate::Progress::continue_switchover) before anything else
    /// of it is sent, or for a cancel: the VMM flushes its disks meanwhile.
    pub pause_before_switchover: bool,
}

impl Parameters {
    /// QEMU's defaults, but without a bandwidth limit.
    pub fn new(configuration: Configuration) -> Self {
        Self {
            max_bandwidth: None,
            max_postcopy_bandwidth: None,
            downtime_limit: Duration::from_millis(300),
            max_rounds: 500,
            at_max_rounds: AtMaxRounds::Fail,
            throttle: ThrottleParameters::default(),
            switchover_timeout: Duration::from_secs(30),
            block_state_timeout: Some(Duration::from_secs(1)),
            multifd_zstd_level: 1,
            configuration,
            one_way: false,
            pause_before_switchover: false,
        }
    }
}
