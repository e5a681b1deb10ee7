//! How far the channels of one side are.

use super::{Agreed, PageChannels, check};
use crate::error::MigrationError;
use crate::stream::Configuration;

/// Channels for pages: none, or not begun, or served by `T`, with a thread each.
pub(in crate::ram) enum Stage<T> {
    None,
    Waiting(PageChannels, Agreed),
    Started(T),
    /// The guest has left, or the migration has ended.
    Ended,
}

impl<T> Stage<T> {
    /// Takes over what both sides have agreed on.
    pub(in crate::ram) fn check(
        &mut self,
        configuration: &Configuration,
    ) -> Result<(), MigrationError> {
        let count = match self {
            Self::Waiting(channels, _) => Some(channels.channels.len()),
            _ => None,
        };
        let agreed = check(count, configuration)?;
        if let (Self::Waiting(_, on), Some(agreed)) = (self, agreed) {
            *on = agreed;
        }
        Ok(())
    }

    /// Of each that waits, whether it is encrypted.
    pub(in crate::ram) fn encrypted(&self) -> Vec<bool> {
        match self {
            Self::Waiting(channels, _) => channels.encrypted(),
            _ => Vec::new(),
        }
    }

    /// Starts those that wait; they have ended when that fails.
    pub(in crate::ram) fn start_by(
        &mut self,
        start: impl FnOnce(PageChannels, Agreed) -> Result<T, MigrationError>,
    ) -> Result<(), MigrationError> {
        *self = match std::mem::replace(self, Self::Ended) {
            Self::Waiting(channels, agreed) => Self::Started(start(channels, agreed)?),
            other => other,
        };
        Ok(())
    }
}
