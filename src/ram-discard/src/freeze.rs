//! Frozen block state: what was discarded when it began, and whether it held since.

use std::fmt;

use parking_lot::Mutex;
use thiserror::Error;

use super::{
    Follow, FollowError, FollowedBlockState, NotFollowed, RamDiscardListener, Unavailable,
};
use crate::Section;

/// What block state is frozen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreezeFor {
    /// Memory is read, to be sent or saved: no block changes.
    Source,
    /// Memory arrives: requests of the guest change no block. The device may still load the state
    /// that comes with the memory.
    Destination,
}

/// Why block state is not frozen; nothing was changed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FreezeError {
    /// The manager's process is gone.
    #[error("cannot freeze block state: {0}")]
    Unavailable(#[from] Unavailable),
    /// The device refuses.
    #[error("cannot freeze block state: {0}")]
    Refused(String),
}

/// Block state was not frozen all the time: blocks may have been plugged and written since, so that
/// what is known to be discarded may be wrong.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("the freeze of block state was lost ({0}): plugged memory may have been left out")]
pub struct FreezeLost(pub String);

/// What a manager does for a freeze that it has begun.
pub trait Freeze: Send + Sync {
    /// Whether block state has been frozen without a gap until now. A manager of another process
    /// asks that process: what is not known to have held has not held.
    ///
    /// # Errors
    ///
    /// When it has not, or that cannot be known.
    fn check(&self) -> Result<(), FreezeLost>;

    /// Ends the freeze. Called once; nothing else is called after it.
    ///
    /// # Errors
    ///
    /// When the freeze had ended before, or that cannot be known.
    fn thaw(&mut self) -> Result<(), FreezeLost>;

    /// Whether [`follow`](Self::follow) can be done, as far as that is known before. By default it cannot.
    fn can_follow(&self) -> bool {
        false
    }

    /// In one step, `listener` is registered for the whole region, without being told what is populated, and
    /// the freeze ends. Once that was done, nothing else is called. By default it cannot be done.
    ///
    /// # Errors
    ///
    /// When it cannot be done; the freeze continues.
    fn follow(
        &mut self,
        _listener: Box<dyn RamDiscardListener>,
    ) -> Result<Box<dyn Follow>, FollowError> {
        Err(FollowError::NotPossible)
    }
}

/// Block state that does not change until this is dropped, and what of the region was discarded
/// when that began.
///
/// Both come in one step, so that there is no mask without a freeze that it belongs to. A freeze may
/// be lost, since the process that has the device may end: [`check`](Self::check) says so, for good.
pub struct FrozenBlockState {
    discarded: Vec<Section>,
    freeze: Option<Box<dyn Freeze>>,
    lost: Mutex<Option<FreezeLost>>,
}

impl FrozenBlockState {
    /// For a manager, which has begun `freeze` and then found `discarded`: all maximal ranges of its
    /// region, ascending.
    pub fn new(discarded: Vec<Section>, freeze: Box<dyn Freeze>) -> Self {
        Self { discarded, freeze: Some(freeze), lost: Mutex::new(None) }
    }

    /// For a manager that learns what is discarded after its freeze has begun.
    pub fn set_discarded(&mut self, discarded: Vec<Section>) {
        self.discarded = discarded;
    }

    /// The maximal discarded ranges of `section`, ascending.
    pub fn discarded(&self, section: Section) -> impl Iterator<Item = Section> + '_ {
        let first = self.discarded.partition_point(|range| range.end() <= section.start());
        self.discarded[first..].iter().map_while(move |range| range.intersection(section))
    }

    /// Whether block state has been frozen without a gap until now.
    ///
    /// # Errors
    ///
    /// When it has not, or that cannot be known; from then on, always.
    pub fn check(&self) -> Result<(), FreezeLost> {
        let mut lost = self.lost.lock();
        if let Some(lost) = &*lost {
            return Err(lost.clone());
        }
        let checked = self.freeze.as_ref().map_or(Ok(()), |freeze| freeze.check());
        *lost = checked.clone().err();
        checked
    }

    /// Whether a listener can [follow](Self::follow), as far as that is known before.
    pub fn can_follow(&self) -> bool {
        self.freeze.as_ref().is_some_and(|freeze| freeze.can_follow())
    }

    /// Has `listener` follow block state from here on. In one step it is registered for the whole region and the
    /// freeze ends, so that it is told of every change after [`discarded`](Self::discarded), which it is not told. (What
    /// comes with memory may change block state that is frozen for a destination; the listener then follows what it
    /// has become.) Must not be called within a transaction or a listener.
    ///
    /// # Errors
    ///
    /// When the manager cannot do it, or the freeze was lost before. It continues then.
    pub fn follow(
        mut self,
        listener: Box<dyn RamDiscardListener>,
    ) -> Result<FollowedBlockState, NotFollowed> {
        let followed = self.check().map_err(FollowError::from).and_then(|()| {
            let freeze = self.freeze.as_mut().ok_or(FollowError::NotPossible)?;
            freeze.follow(listener)
        });
        match followed {
            Ok(follow) => {
                // It has ended.
                self.freeze = None;
                Ok(FollowedBlockState::new(follow))
            }
            Err(reason) => Err(NotFollowed { frozen: self, reason }),
        }
    }

    /// Ends the freeze, and says whether it had held without a gap until then.
    ///
    /// # Errors
    ///
    /// When it had not, or that cannot be known. It has ended in any case.
    pub fn thaw(mut self) -> Result<(), FreezeLost> {
        let lost = self.lost.get_mut().take();
        let thawed = self.freeze.take().map_or(Ok(()), |mut freeze| freeze.thaw());
        lost.map_or(Ok(()), Err).and(thawed)
    }
}

impl fmt::Debug for FrozenBlockState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut frozen = f.debug_struct("FrozenBlockState");
        frozen.field("discarded", &self.discarded).field("lost", &self.lost).finish_non_exhaustive()
    }
}

impl Drop for FrozenBlockState {
    fn drop(&mut self) {
        if let Some(mut freeze) = self.freeze.take()
            && let Err(error) = freeze.thaw()
        {
            tracing::warn!(%error, "block state was not frozen until the end");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// Is lost once when told to, and counts its ends.
    #[derive(Clone, Default)]
    struct Scripted(Arc<Mutex<Script>>);

    #[derive(Default)]
    struct Script {
        lost: Option<FreezeLost>,
        thaws: u32,
    }

    impl Freeze for Scripted {
        fn check(&self) -> Result<(), FreezeLost> {
            self.0.lock().lost.take().map_or(Ok(()), Err)
        }

        fn thaw(&mut self) -> Result<(), FreezeLost> {
            self.0.lock().thaws += 1;
            self.check()
        }
    }

    fn range(start: u64, end: u64) -> Section {
        Section::from_bounds(start, end).unwrap()
    }

    #[test]
    fn a_freeze_that_was_lost_once_is_lost_for_good() {
        let scripted = Scripted::default();
        let frozen = FrozenBlockState::new(Vec::new(), Box::new(scripted.clone()));
        frozen.check().unwrap();
        let lost = FreezeLost("restarted".to_owned());
        scripted.0.lock().lost = Some(lost.clone());
        for _ in 0..2 {
            assert_eq!(frozen.check(), Err(lost.clone()));
        }
        assert_eq!(frozen.thaw(), Err(lost));
        assert_eq!(scripted.0.lock().thaws, 1);
    }

    #[test]
    fn a_freeze_ends_once_however_it_ends() {
        let scripted = Scripted::default();
        drop(FrozenBlockState::new(Vec::new(), Box::new(scripted.clone())));
        FrozenBlockState::new(Vec::new(), Box::new(scripted.clone())).thaw().unwrap();
        let lost = FreezeLost("gone".to_owned());
        scripted.0.lock().lost = Some(lost.clone());
        let frozen = FrozenBlockState::new(Vec::new(), Box::new(scripted.clone()));
        assert_eq!(frozen.thaw(), Err(lost));
        assert_eq!(scripted.0.lock().thaws, 3);
    }

    #[test]
    fn discarded_ranges_are_clipped_to_the_section() {
        let map = vec![range(0, 10), range(20, 30), range(40, 50)];
        let frozen = FrozenBlockState::new(map, Box::new(Scripted::default()));
        let of = |start, end| frozen.discarded(range(start, end)).collect::<Vec<_>>();
        assert_eq!(of(0, 50), [range(0, 10), range(20, 30), range(40, 50)]);
        assert_eq!(of(5, 41), [range(5, 10), range(20, 30), range(40, 41)]);
        assert_eq!(of(10, 20), []);
        assert_eq!(of(22, 23), [range(22, 23)]);
        assert_eq!(of(50, 90), []);
    }
}
