//! The freezes of a manager that have not ended.

use std::fmt;

use crate::{FreezeFor, FreezeLost};

/// Names a freeze that has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FreezeId(u64);

/// All of them. Block state is frozen while there is one.
#[derive(Default)]
pub(super) struct Freezes {
    last_id: u64,
    held: Vec<Held>,
}

struct Held {
    id: FreezeId,
    purpose: FreezeFor,
    /// Why blocks have changed all the same.
    lost: Option<FreezeLost>,
}

impl Freezes {
    pub(super) fn begin(&mut self, purpose: FreezeFor) -> FreezeId {
        self.last_id += 1;
        let id = FreezeId(self.last_id);
        self.held.push(Held { id, purpose, lost: None });
        id
    }

    pub(super) fn end(&mut self, id: FreezeId) {
        self.held.retain(|held| held.id != id);
    }

    pub(super) fn any(&self) -> bool {
        !self.held.is_empty()
    }

    pub(super) fn any_for_source(&self) -> bool {
        self.held.iter().any(|held| held.purpose == FreezeFor::Source)
    }

    /// Blocks change although no freeze for a source permits that.
    pub(super) fn lose(&mut self, reason: impl fmt::Display) {
        for held in self.held.iter_mut().filter(|held| held.purpose == FreezeFor::Source) {
            held.lost.get_or_insert_with(|| FreezeLost(reason.to_string()));
        }
    }

    pub(super) fn check(&self, id: FreezeId) -> Result<(), FreezeLost> {
        match self.held.iter().find(|held| held.id == id) {
            Some(Held { lost: Some(lost), .. }) => Err(lost.clone()),
            Some(_) => Ok(()),
            None => Err(FreezeLost("it has ended".to_owned())),
        }
    }
}
