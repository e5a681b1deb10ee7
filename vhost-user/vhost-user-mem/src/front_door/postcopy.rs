//! Postcopy, which is answered in front of the crate.

use std::os::fd::AsFd;

use tracing::{info, warn};

use super::error::RelayError;
use super::link::Stop;
use super::message::{FrontendRequest, Message, u64_at};
use super::session::Session;

/// Bytes of a region in the payload of messages about memory.
const REGION: usize = 32;
/// Where in it the user address is.
const USER_ADDR: usize = 16;
/// Bytes in front of the first region.
const REGIONS: usize = 8;

impl Session<'_> {
    /// POSTCOPY_ADVISE, POSTCOPY_LISTEN, POSTCOPY_END.
    pub(super) fn postcopy(
        &mut self,
        request: FrontendRequest,
        message: Message,
    ) -> Result<(), Stop> {
        let header = message.header;
        let out_of_order = |error: std::io::Error| RelayError::Value {
            request,
            reason: format!("userfaultfd cannot be had: {error}"),
        };
        match request {
            FrontendRequest::POSTCOPY_ADVISE => match self.events.postcopy_advise() {
                Ok(fd) => {
                    info!("the front-end gets the page faults of this process (postcopy)");
                    self.answer(header, &[], &[fd.as_fd()])
                }
                Err(error) => {
                    warn!(%error, "postcopy is refused");
                    self.answer(header, &[], &[])
                }
            },
            FrontendRequest::POSTCOPY_LISTEN => {
                self.events.postcopy_listen().map_err(out_of_order)?;
                self.listening = true;
                self.acknowledge(header, 0)
            }
            _ => {
                self.events.postcopy_end().map_err(out_of_order)?;
                self.listening = false;
                self.unconfirmed = None;
                self.answer(header, &0u64.to_le_bytes(), &[])
            }
        }
    }

    /// The front-end can bring what is missing of the memory it sent: one confirmation for each
    /// message, or for several, by the number of any of them. It is not answered.
    pub(super) fn confirm_memory(
        &mut self,
        request: FrontendRequest,
        message: &Message,
    ) -> Result<(), Stop> {
        if !self.listening {
            return Err(RelayError::Size { request, size: message.body.len() }.into());
        }
        if message.u64_at(0) != 0 {
            let reason = "the word that it cannot bring what is missing".into();
            return Err(RelayError::Value { request, reason }.into());
        }
        self.unconfirmed = None;
        Ok(())
    }

    /// Replaces the front-end's addresses of regions by the device's.
    pub(super) fn tell_addresses(
        &self,
        request: FrontendRequest,
        body: &mut [u8],
    ) -> Result<(), RelayError> {
        for region in body[REGIONS..].chunks_exact_mut(REGION) {
            let gpa = u64_at(region, 0);
            let Some(address) = self.events.mapped_at(gpa) else {
                let reason = format!("a region at {gpa:#x} that was not mapped");
                return Err(RelayError::Value { request, reason });
            };
            region[USER_ADDR..USER_ADDR + 8].copy_from_slice(&address.to_le_bytes());
        }
        Ok(())
    }
}
