//! A freeze of a device in another process.

use std::sync::Arc;

use super::Shared;
use super::requests::Answer;
use crate::ram_discard::channel::wire::ClientMessage;
use crate::ram_discard::{Freeze, FreezeError, FreezeFor, FreezeLost, Unavailable};

/// A freeze that lasts as long as the connection on which it was asked for.
pub(super) struct RemoteFreeze {
    shared: Arc<Shared>,
    purpose: FreezeFor,
}

impl RemoteFreeze {
    pub(super) fn begin(shared: Arc<Shared>, purpose: FreezeFor) -> Result<Self, FreezeError> {
        shared.requests.check_thread()?;
        if purpose == FreezeFor::Source {
            let mut freezes = shared.freezes.lock();
            if *freezes == 0 {
                shared.request(|id| ClientMessage::Freeze { id })?.map_err(FreezeError::Refused)?;
            }
            *freezes += 1;
        } else {
            shared.requests.check()?;
        }
        Ok(Self { shared, purpose })
    }
}

impl Freeze for RemoteFreeze {
    /// Asks the server: one that answers on this connection has held the freeze, which ends with
    /// the connection and by nothing else.
    fn check(&self) -> Result<(), FreezeLost> {
        let answered = self.shared.ask(|id| ClientMessage::GetSizes { id });
        answered.map(drop).map_err(|lost| FreezeLost(lost.to_string()))
    }

    fn thaw(&mut self) -> Result<(), FreezeLost> {
        let lost = |lost: Unavailable| FreezeLost(lost.to_string());
        if self.purpose == FreezeFor::Destination {
            return self.shared.requests.check().map_err(lost);
        }
        // A listener must not call back. Its freeze ends with the connection then.
        if let Err(error) = self.shared.requests.check_thread() {
            return Err(lost(self.shared.lose(&error.to_string())));
        }
        let mut freezes = self.shared.freezes.lock();
        *freezes -= 1;
        if *freezes != 0 {
            drop(freezes);
            return self.check();
        }
        let thawed = self.shared.request(|id| ClientMessage::Thaw { id }).map_err(lost)?;
        thawed.map_err(FreezeLost)
    }
}

impl Shared {
    /// Has the server do something; its reason when it does not.
    fn request(
        &self,
        message: impl FnOnce(u64) -> ClientMessage,
    ) -> Result<Result<(), String>, Unavailable> {
        match self.ask(message)? {
            Answer::Done => Ok(Ok(())),
            Answer::Failed(reason) => Ok(Err(reason)),
            Answer::Sizes(_) => Err(self.lose("the server broke the protocol: a wrong answer")),
        }
    }
}
