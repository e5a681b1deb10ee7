//! Why a connection ended otherwise than by being closed.

use std::io;

use thiserror::Error;

use super::message::FrontendRequest;

/// Why the relay ended a connection.
#[derive(Debug, Error)]
pub enum RelayError {
    /// A header that no front-end may send.
    #[error("the front-end sent a malformed header (request {request}): {reason}")]
    Header {
        /// Request number in the header.
        request: u32,
        /// What is wrong.
        reason: String,
    },
    /// There was no room for the descriptors of a message.
    #[error(
        "there are not enough file descriptors for what the front-end sent: raise the limit of \
         open files"
    )]
    NoDescriptors,
    /// The connection was closed in the middle of a message.
    #[error("the connection was closed in the middle of a message")]
    Truncated,
    /// More descriptors than a message may carry.
    #[error("a message came with more than 32 file descriptors")]
    TooManyFds,
    /// A request number that does not exist.
    #[error("the front-end sent the unknown request {0}")]
    Unknown(u32),
    /// A request that this kind of device does not have.
    #[error("the front-end sent {0}, which this device does not support")]
    Unsupported(FrontendRequest),
    /// A request whose protocol feature was not negotiated.
    #[error("the front-end sent {request} without having negotiated protocol feature {feature}")]
    NotNegotiated {
        /// The request.
        request: FrontendRequest,
        /// Bit number of the feature.
        feature: u32,
    },
    /// A payload of the wrong size.
    #[error("the front-end sent {request} with a payload of {size} bytes")]
    Size {
        /// The request.
        request: FrontendRequest,
        /// Bytes of payload.
        size: usize,
    },
    /// The wrong number of descriptors.
    #[error("the front-end sent {request} with {count} file descriptors")]
    Fds {
        /// The request.
        request: FrontendRequest,
        /// How many came.
        count: usize,
    },
    /// A payload whose content cannot be accepted.
    #[error("the front-end sent {request} with {reason}")]
    Value {
        /// The request.
        request: FrontendRequest,
        /// What is wrong.
        reason: String,
    },
    /// The device answered with an error.
    #[error("the device refused {0}")]
    Refused(FrontendRequest),
    /// The device side closed the connection instead of answering.
    #[error("the device could not handle {0} and closed the connection")]
    Closed(FrontendRequest),
    /// The device side did not answer in time.
    #[error("the device did not answer {0} in time")]
    Silent(FrontendRequest),
    /// The dirty log could not be applied to memory that was added after it.
    #[error("the dirty log does not cover the memory that {0} added")]
    Log(FrontendRequest),
    /// The device side answered something else than what was asked.
    #[error("the device answered {request} with {reason}")]
    Answer {
        /// The request.
        request: FrontendRequest,
        /// What came.
        reason: String,
    },
    /// The device side spoke without having been asked.
    #[error("the device side sent a message that was not asked for")]
    Unsolicited,
    /// Memory or the dirty log is gone that the front-end shared.
    #[error("memory that the front-end shared is gone: its file was truncated, or has no pages")]
    MemoryLost,
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The error.
        source: io::Error,
    },
}

impl RelayError {
    pub(super) fn io(what: &'static str, error: rustix::io::Errno) -> Self {
        Self::Io { what, source: error.into() }
    }
}
