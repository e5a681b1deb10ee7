//! Channels that carry the pages of precopy beside the main one, in QEMU's multifd format.
//!
//! A page is sent once between two barriers, by whichever channel is free. At a barrier the source puts a
//! packet with the flag SYNC on each of them, and a flush on the main channel; the destination reads nothing
//! behind either before it has read all of them. So a page that is sent again is written again after it was
//! written, whatever channel it comes by.

pub(super) mod receivers;
pub(super) mod senders;
mod stage;
mod threads;
#[cfg_attr(not(feature = "zstd"), path = "no_zstd.rs")]
mod zstd;

use crate::channel::Channel;
use crate::error::MigrationError;
use crate::stream::{CAPABILITY_MULTIFD, CAPABILITY_MULTIFD_ZSTD, Configuration};

pub(super) use stage::Stage;

/// The most channels.
const CHANNELS_MAX: usize = 64;

/// The channels of one side, each connected to one of the other's. Which is connected to which does not
/// matter. The configuration of both sides has the capability `multifd` and the VM's UUID.
#[derive(Debug)]
pub struct PageChannels {
    pub(super) channels: Vec<Channel>,
}

impl PageChannels {
    /// Of 1 to 64 channels, which go to none but this migration. Each is served by a thread, and waits for the
    /// other side as long as [its writes do](Channel::set_write_patience), at the destination too.
    ///
    /// # Errors
    ///
    /// When there are none, or too many.
    pub fn new(channels: Vec<Channel>) -> Result<Self, MigrationError> {
        match channels.len() {
            1..=CHANNELS_MAX => Ok(Self { channels }),
            count => {
                let what = format!("pages go over 1 to {CHANNELS_MAX} channels, not {count}");
                Err(MigrationError::NotPossible(what))
            }
        }
    }

    /// Of each, whether it is encrypted.
    pub(super) fn encrypted(&self) -> Vec<bool> {
        self.channels.iter().map(Channel::is_encrypted).collect()
    }
}

/// What both sides have agreed on of their channels.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Agreed {
    /// The VM's, by which one of another VM is told.
    uuid: [u8; 16],
    /// Whether pages may be compressed.
    zstd: bool,
}

/// Whether both sides will know of the channels, and of what they carry.
fn check(
    channels: Option<usize>,
    configuration: &Configuration,
) -> Result<Option<Agreed>, MigrationError> {
    let not_possible = |what: String| Err(MigrationError::NotPossible(what));
    let zstd = configuration.has(CAPABILITY_MULTIFD_ZSTD);
    if zstd {
        if channels.is_none() {
            return not_possible(format!(
                "the configuration has the capability {CAPABILITY_MULTIFD_ZSTD}, and RAM has no \
                 channels, which alone are compressed: connect them, or switch it off"
            ));
        }
        zstd::available()?;
    }
    match (channels, configuration.has(CAPABILITY_MULTIFD), configuration.uuid) {
        (None, false, _) => Ok(None),
        (None, true, _) => not_possible(format!(
            "the configuration has the capability {CAPABILITY_MULTIFD}, and RAM has no channels: connect \
             them, or switch it off"
        )),
        (Some(count), false, _) => not_possible(format!(
            "RAM has {count} channels, and the configuration lacks the capability {CAPABILITY_MULTIFD}"
        )),
        (Some(count), true, None) => not_possible(format!(
            "RAM has {count} channels, and the configuration has no UUID, by which those of another VM \
             are told"
        )),
        (Some(_), true, Some(uuid)) => Ok(Some(Agreed { uuid, zstd })),
    }
}

/// An error of a channel by its number.
fn of_channel(number: usize, error: MigrationError) -> MigrationError {
    match error {
        MigrationError::Cancelled => MigrationError::Cancelled,
        error => MigrationError::Channel { number, error: Box::new(error) },
    }
}
