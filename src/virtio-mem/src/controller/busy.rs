//! Why a guest request is answered with BUSY.

use std::io;

use ram_discard::PopulateRefused;
use thiserror::Error;

use super::{MemController, ResetError};
use crate::device::{Request, Response};
use crate::region_memory::NotReady;

/// Why a request is answered with BUSY; nothing was changed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Busy {
    /// Migration is active.
    #[error("block state is frozen")]
    Frozen,
    /// Memory is not mapped, or cannot be discarded.
    #[error(transparent)]
    Memory(#[from] NotReady),
    /// A listener refused: the memory itself, which is not to be had, or another party.
    #[error(transparent)]
    Refused(#[from] PopulateRefused),
    /// The state could not be saved.
    #[error("cannot save the device state: {0}")]
    Store(#[from] io::Error),
    /// Memory of blocks that are unplugged already could not be discarded.
    #[error("cannot discard the memory of unplugged blocks: {0}")]
    Discard(#[source] io::Error),
}

impl From<ResetError> for Busy {
    fn from(error: ResetError) -> Self {
        match error {
            ResetError::Memory(error) => Self::Memory(error),
            ResetError::Store(error) => Self::Store(error),
        }
    }
}

impl MemController {
    /// Says why a request is answered with BUSY.
    pub(super) fn busy(&self, request: Request, reason: &Busy) -> Response {
        match reason {
            // Not worth a line: the migration has its own.
            Busy::Frozen => {}
            Busy::Store(error) => {
                tracing::error!(%error, "cannot save the device state; answering BUSY");
            }
            Busy::Memory(_) | Busy::Refused(_) | Busy::Discard(_) => {
                tracing::warn!(request = request.name(), %reason, "answering BUSY");
            }
        }
        self.state().observers.iter().for_each(|observer| observer.busy(request, reason));
        Response::Busy
    }
}
