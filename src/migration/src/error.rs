//! Why a migration fails.

use std::io;
use std::time::Duration;

use ram_discard::{FreezeError, FreezeLost, Unavailable};
use thiserror::Error;
use vmstate::wire::WireError;

use super::ram::BlockError;
use super::stream::{FormatError, ReturnMessage};

/// Why a migration fails. The guest goes on where it ran before.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MigrationError {
    /// What came is no migration stream, or ends too early.
    #[error(transparent)]
    Format(FormatError),
    /// The RAM blocks of the two sides differ.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The manager of discarded memory is gone.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// Block state cannot be frozen.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// Block state was not frozen all the time.
    #[error(transparent)]
    FreezeLost(#[from] FreezeLost),
    /// A system call failed.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The memory of a block failed.
    #[error("RAM block {block:?}: cannot {what}: {source}")]
    Memory {
        /// Id of the block.
        block: String,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A page comes for discarded memory.
    #[error(
        "RAM block {block:?}: a page at {offset:#x} (byte {at:#x} of the stream) lies in a \
         discarded range"
    )]
    Discarded {
        /// Id of the block.
        block: String,
        /// Bytes from the start of the block.
        offset: u64,
        /// Bytes from the start of the stream.
        at: u64,
    },
    /// Block state of the source changes in a way that is not possible here.
    #[error("RAM block {block:?}: {what} (byte {at:#x} of the stream)")]
    BlockState {
        /// Id of the block.
        block: String,
        /// Bytes from the start of the stream.
        at: u64,
        /// What is wrong with it.
        what: String,
    },
    /// A page comes for nowhere.
    #[error("byte {at:#x} of the stream: {what}")]
    Page {
        /// Bytes from the start of the stream.
        at: u64,
        /// What is wrong with it.
        what: String,
    },
    /// The stream or the file ends RAM without a list of blocks.
    #[error(
        "there is no RAM in what was received: a list of RAM blocks was expected before its end"
    )]
    NoRam,
    /// A page that is outstanding has data here, which would be taken for it.
    #[error(
        "the outstanding page at {offset:#x} of block {block:?} has data here, which cannot be discarded"
    )]
    Present {
        /// Id of the block.
        block: String,
        /// Bytes from the start of the block.
        offset: u64,
    },
    /// A range is not whole pages of a block.
    #[error(
        "RAM block {block:?}: {len:#x} bytes at {start:#x} are not whole pages of {page_size:#x} within \
         its {used_length:#x} bytes"
    )]
    NotWholePages {
        /// Id of the block.
        block: String,
        /// Bytes from the start of the block.
        start: u64,
        /// Bytes.
        len: u64,
        /// Bytes of a page of the block.
        page_size: u64,
        /// Bytes of the block that are in use.
        used_length: u64,
    },
    /// A section that is unknown here, or out of place.
    #[error("section {section:?} at byte {at:#x} of the stream: {what}")]
    Section {
        /// Its id string.
        section: String,
        /// Bytes from the start of the stream.
        at: u64,
        /// What is wrong with it.
        what: String,
    },
    /// A device refuses its state, or cannot save it.
    #[error("device state {section:?}: {reason}")]
    Device {
        /// Its id string.
        section: String,
        /// Why.
        reason: String,
    },
    /// The two sides are configured differently.
    #[error("{what}: {stream:?} in the stream, {local:?} here")]
    Configuration {
        /// What differs.
        what: &'static str,
        /// In the stream.
        stream: String,
        /// Here.
        local: String,
    },
    /// The destination says that it cannot load what was sent.
    #[error("the destination refused the migration (error {code}){}", why(reason.as_deref()))]
    Refused {
        /// The error number.
        code: u32,
        /// Why, where it says so to this source.
        reason: Option<String>,
    },
    /// The destination says something that makes no sense now.
    #[error("unexpected message from the destination: {0}")]
    Unexpected(String),
    /// What the migration was asked for cannot be done together.
    #[error("{0}")]
    NotPossible(String),
    /// The destination sends more than is kept for it.
    #[error(
        "the destination sends more than {limit} {what} that are not answered yet; one that works \
         does not, so it is not listened to any more"
    )]
    Flooded {
        /// What it sends.
        what: &'static str,
        /// How many are kept.
        limit: usize,
    },
    /// One of several channels for pages failed, which ends the migration.
    #[error("channel {number} for pages: {error}")]
    Channel {
        /// Its number, from 0.
        number: usize,
        /// Why it failed.
        error: Box<MigrationError>,
    },
    /// What a channel for pages brings is not possible, or its thread ended.
    #[error("{0}")]
    OnChannel(String),
    /// The other side closed the channel.
    #[error("the other side closed the channel while {0}")]
    ChannelClosed(&'static str),
    /// The guest writes memory faster than it is sent.
    #[error(
        "after {rounds} rounds {left} bytes are left: the guest would be stopped for {expected:?} \
         ({sync:?} of it to collect dirty pages) where the downtime limit is {limit:?}; raise the \
         limit or the bandwidth, use auto-converge or postcopy, or ask for stop-and-copy"
    )]
    NotConverging {
        /// How often dirty pages were collected.
        rounds: u64,
        /// Bytes left to send.
        left: u64,
        /// How long the guest would be stopped for.
        expected: Duration,
        /// How long it took to collect dirty pages.
        sync: Duration,
        /// How long it may be stopped for.
        limit: Duration,
    },
    /// The device discards memory, and what is outstanding of it could not be saved in the time that it
    /// waits for its listeners.
    #[error(
        "RAM block {block:?}: memory was unplugged and could not be saved in the time that the device waits for \
         that; take the snapshot on faster storage, or while no memory is unplugged"
    )]
    DiscardedTooSoon {
        /// Id of the block.
        block: String,
    },
    /// The VMM could not do its part.
    #[error("the VMM cannot {what}: {reason}")]
    Vmm {
        /// What it was asked for.
        what: &'static str,
        /// Why it could not.
        reason: String,
    },
    /// Memory is given up before all of it has arrived.
    #[error(
        "{pages} pages have not arrived and are not waited for any more; a guest that runs on this \
         memory must be stopped"
    )]
    Outstanding {
        /// Target pages.
        pages: u64,
    },
    /// It was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// It was paused on request.
    #[error("paused on request")]
    Paused,
}

fn why(reason: Option<&str>) -> String {
    reason.map_or("; its own report says why".to_owned(), |reason| format!(": {reason}"))
}

impl MigrationError {
    /// What a message of the destination says that is not expected.
    pub(crate) fn unexpected(message: &ReturnMessage) -> Self {
        match message {
            ReturnMessage::Shut(code) if *code != 0 => Self::Refused { code: *code, reason: None },
            other => Self::Unexpected(format!("{other:?}")),
        }
    }
}

impl From<FormatError> for MigrationError {
    fn from(error: FormatError) -> Self {
        match &error {
            // A read that was cancelled says nothing of the stream.
            FormatError::Wire(WireError::Io { source, .. })
                if source.raw_os_error() == Some(libc::ECANCELED) =>
            {
                Self::Cancelled
            }
            _ => Self::Format(error),
        }
    }
}

impl From<WireError> for MigrationError {
    fn from(error: WireError) -> Self {
        FormatError::from(error).into()
    }
}

impl MigrationError {
    /// Makes an error of a system call.
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.raw_os_error() {
            Some(libc::ECANCELED) => Self::Cancelled,
            _ => Self::Io { what, source },
        }
    }

    /// Makes an error of a block's memory.
    pub(crate) fn memory(block: &str, what: &'static str) -> impl FnOnce(io::Error) -> Self {
        let block = block.to_owned();
        move |source| Self::Memory { block, what, source }
    }

    /// Whether it passes once there is memory.
    pub(crate) fn is_no_memory(&self) -> bool {
        match self {
            Self::Io { source, .. } | Self::Memory { source, .. } => {
                matches!(source.raw_os_error(), Some(libc::ENOMEM | libc::ENOSPC))
            }
            _ => false,
        }
    }

    /// The same as an error of a system call, with its number if it has one.
    pub(crate) fn into_io(self) -> io::Error {
        match self {
            Self::Io { source, .. } | Self::Memory { source, .. } => source,
            other => io::Error::other(other),
        }
    }

    /// The error number that tells the source of it.
    pub(crate) fn code(&self) -> u32 {
        let errno = match self {
            Self::Cancelled => libc::ECANCELED,
            Self::Io { source, .. } | Self::Memory { source, .. } => {
                source.raw_os_error().unwrap_or(libc::EIO)
            }
            Self::Channel { error, .. } => return error.code(),
            _ => libc::EINVAL,
        };
        errno.unsigned_abs().max(1)
    }
}
