//! Block state that may change while memory is read or arrives: a listener follows it.

use std::fmt;

use parking_lot::Mutex;
use thiserror::Error;

use super::{Freeze, FreezeLost, FrozenBlockState};
use crate::Section;

/// Why a freeze did not become a listener that follows. Block state is frozen as before.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FollowError {
    /// Managers of this kind can only freeze.
    #[error("block state can only be frozen here, not followed")]
    NotPossible,
    /// Block state had not been frozen all the time.
    #[error(transparent)]
    Lost(#[from] FreezeLost),
    /// The device refuses.
    #[error("cannot follow block state: {0}")]
    Refused(String),
}

/// A freeze that did not become a listener that follows, and why.
#[derive(Debug, Error)]
#[error("{reason}")]
pub struct NotFollowed {
    /// The freeze, which continues.
    pub frozen: FrozenBlockState,
    /// Why.
    #[source]
    pub reason: FollowError,
}

/// What a manager does for a listener that follows block state.
pub trait Follow: Send + Sync {
    /// Whether the listener was told of every change until now.
    ///
    /// # Errors
    ///
    /// When it was not, or that cannot be known.
    fn check(&self) -> Result<(), FreezeLost>;

    /// In one step: block state is frozen, for the purpose it was frozen for before, and the listener
    /// is taken out without being told anything. What is discarded then, all maximal ranges ascending, which is what
    /// the listener was told. Called once; nothing else is called after it.
    ///
    /// # Errors
    ///
    /// When it was not told of every change, or that cannot be known. Nothing is frozen then, and the
    /// listener was taken out all the same.
    fn freeze(&mut self) -> Result<(Vec<Section>, Box<dyn Freeze>), FreezeLost>;

    /// Takes the listener out without telling it anything. Called once; nothing else is called after it.
    fn end(&mut self);
}

/// Block state that a listener follows: it knew what was discarded when it was registered, and was told of every
/// change since. Dropped, it takes the listener out.
pub struct FollowedBlockState {
    follow: Option<Box<dyn Follow>>,
    lost: Mutex<Option<FreezeLost>>,
}

impl FollowedBlockState {
    /// For a manager, which has registered the listener.
    pub fn new(follow: Box<dyn Follow>) -> Self {
        Self { follow: Some(follow), lost: Mutex::new(None) }
    }

    /// Whether the listener was told of every change until now. Must not be called within a
    /// transaction or a listener.
    ///
    /// # Errors
    ///
    /// When it was not, or that cannot be known; from then on, always.
    pub fn check(&self) -> Result<(), FreezeLost> {
        let mut lost = self.lost.lock();
        if let Some(lost) = &*lost {
            return Err(lost.clone());
        }
        let checked = self.follow.as_ref().map_or(Ok(()), |follow| follow.check());
        *lost = checked.clone().err();
        checked
    }

    /// Freezes block state again. In one step the freeze begins and the listener is taken out: it has been
    /// told of everything until then, and is told nothing of what the freeze finds. Must not be called within
    /// a transaction or a listener.
    ///
    /// # Errors
    ///
    /// When the listener was not told of every change, or that cannot be known. Nothing is frozen then.
    pub fn freeze(mut self) -> Result<FrozenBlockState, FreezeLost> {
        if let Some(lost) = self.lost.get_mut().take() {
            return Err(lost);
        }
        let follow = self.follow.take();
        let ended = || FreezeLost("it has ended".to_owned());
        let (discarded, freeze) = follow.ok_or_else(ended)?.freeze()?;
        Ok(FrozenBlockState::new(discarded, freeze))
    }
}

impl fmt::Debug for FollowedBlockState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FollowedBlockState").field("lost", &self.lost).finish_non_exhaustive()
    }
}

impl Drop for FollowedBlockState {
    fn drop(&mut self) {
        if let Some(mut follow) = self.follow.take() {
            follow.end();
        }
    }
}
