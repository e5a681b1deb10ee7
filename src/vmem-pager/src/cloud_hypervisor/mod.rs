//! Cloud Hypervisor's local migration, with an unmodified Cloud Hypervisor on the other side, which calls this
//! side an "offload daemon".
//!
//! [`protocol`] has the frames and their order, [`channel`] a connection, [`layout`] and [`state`] what Config and
//! State say of memory, [`image`] a guest in an image; [`taking`] and [`giving`] are the two ends, [`save`],
//! [`restore`] and [`handover`] the commands, [`edit`] is what `--set` changes. Of a restore on demand, `lazy` serves
//! what is asked for, `background` what is not, and `filling` knows what has which. States,
//! deadlines, and who has the guest when something fails, are in `spec-notes/pager-cloud-hypervisor.md`.

mod background;
pub mod channel;
mod copy;
pub mod edit;
mod filling;
pub mod giving;
pub mod handover;
mod huge_pages;
pub mod image;
pub mod layout;
mod lazy;
mod memory;
pub mod metrics;
mod pace;
pub mod protocol;
pub mod restore;
pub mod save;
pub mod state;
pub mod taking;
mod touches;

use std::time::Duration;

use crate::error::PagerError;
use crate::socket::Address;

/// For a last word to a peer, when the run itself may have ended.
const LAST_WORD: Duration = Duration::from_secs(2);

/// Descriptors go over Unix sockets only.
fn unix(address: &Address) -> Result<(), PagerError> {
    match address {
        Address::Unix(_) => Ok(()),
        Address::Tcp(_) => Err(PagerError::Usage(format!(
            "--socket {address}: Cloud Hypervisor hands memory over as descriptors; give a Unix socket"
        ))),
    }
}

#[cfg(test)]
mod tests;
