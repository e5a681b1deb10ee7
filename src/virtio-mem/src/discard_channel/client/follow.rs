//! A listener that follows block state of a device in another process.
//!
//! A client is told of every change for as long as it is connected, so that what follows is what the client has
//! always been: its listener is registered while block state is frozen, knowing what was discarded then, and the
//! freeze ends with `thaw`. What the listener was told is kept, as of every listener, and is what is discarded when
//! block state is frozen again.

use std::sync::Arc;

use ram_discard::{
    Follow, FollowError, Freeze, FreezeFor, FreezeLost, ListenerId, RamDiscardListener, Registered,
    Section, Unavailable,
};

use super::Shared;
use super::events::{Told, View};
use super::freeze::RemoteFreeze;
use super::requests::Answer;
use crate::discard_channel::wire::ClientMessage;

/// A listener that follows.
pub(super) struct RemoteFollow {
    shared: Arc<Shared>,
    purpose: FreezeFor,
    /// None of a region without bytes.
    id: Option<ListenerId>,
}

impl RemoteFollow {
    /// Registers `listener`, which knows what was discarded when `freeze` began, without telling it what is
    /// populated.
    pub(super) fn register(
        shared: &Arc<Shared>,
        freeze: &RemoteFreeze,
        purpose: FreezeFor,
        listener: Box<dyn RamDiscardListener>,
    ) -> Result<Self, FollowError> {
        shared.requests.check_thread().map_err(|error| FollowError::Refused(error.0))?;
        let mut follow = Self { shared: Arc::clone(shared), purpose, id: None };
        let Some(region) = shared.geometry.section() else { return Ok(follow) };
        let mut view = shared.view.lock();
        let blocks = freeze.map(&view).map_err(lost)?;
        // Nothing that it could refuse.
        let added = view.listeners.add(region, listener, &[]);
        let id = added.map_err(|refused| FollowError::Refused(refused.to_string()))?;
        view.told(id, region, blocks);
        follow.id = Some(id);
        Ok(follow)
    }

    /// Takes the listener out without telling it anything, and what it was told until then.
    fn take_out(&mut self, view: &mut View) -> Option<(Registered, Told)> {
        let id = self.id.take()?;
        view.listeners.remove(id).zip(view.take_told(id))
    }
}

impl Follow for RemoteFollow {
    /// Asks the server: when it answers this client, it has not dropped it, and all memory that has gone until
    /// then went after this client had acknowledged that.
    fn check(&self) -> Result<(), FreezeLost> {
        match self.shared.ask(|id| ClientMessage::GetSizes { id }) {
            Ok(Answer::Sizes(_)) => Ok(()),
            Ok(_) => Err(FreezeLost(self.shared.wrong_answer().0)),
            Err(lost) => Err(FreezeLost(lost.to_string())),
        }
    }

    fn freeze(&mut self) -> Result<(Vec<Section>, Box<dyn Freeze>), FreezeLost> {
        // Then the listener has been told of all that was before.
        let begun = RemoteFreeze::begin(&self.shared, self.purpose);
        let shared = Arc::clone(&self.shared);
        let mut view = shared.view.lock();
        let taken = self.take_out(&mut view);
        let frozen = begun.map_err(|error| FreezeLost(error.to_string())).and_then(|freeze| {
            let blocks = freeze.map(&view).map_err(|lost| FreezeLost(lost.to_string()))?;
            Ok((freeze, blocks))
        });
        drop(view);
        // Not with the view locked, which the listener may ask for.
        let told = taken.map(|(_, told)| told);
        let (freeze, blocks) = frozen?;
        if told.is_some_and(|told| told.blocks().words() != blocks.blocks.words()) {
            let what = "the server broke the protocol: the bitmap is not what it told of";
            return Err(FreezeLost(shared.lose(what).0));
        }
        Ok((shared.discarded(&blocks), Box::new(freeze)))
    }

    fn end(&mut self) {
        let shared = Arc::clone(&self.shared);
        let taken = self.take_out(&mut shared.view.lock());
        drop(taken);
    }
}

impl Drop for RemoteFollow {
    fn drop(&mut self) {
        self.end();
    }
}

fn lost(lost: Unavailable) -> FollowError {
    FreezeLost(lost.0).into()
}
