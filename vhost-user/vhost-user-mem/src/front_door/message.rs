//! vhost-user messages on the wire, and what each request of a front-end looks like.

use std::fmt;
use std::os::fd::OwnedFd;

use super::error::RelayError;

/// Bytes of a message header.
pub(super) const HEADER_SIZE: usize = 12;
/// Largest payload that is accepted.
pub(super) const PAYLOAD_MAX: usize = 4096;
/// Most descriptors that may come with one message.
pub(super) const FDS_MAX: usize = 32;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// A request, its flags and the size of its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Number of the request.
    pub(super) request: u32,
    flags: u32,
    /// Bytes of payload that follow.
    pub(super) size: u32,
}

impl Header {
    /// Header of a request that asks for no acknowledgement.
    pub(super) fn request(request: u32, size: usize) -> Self {
        Self { request, flags: VERSION, size: size as u32 }
    }

    /// Header of the reply to `request`.
    pub(super) fn reply(request: u32, size: usize) -> Self {
        Self { request, flags: VERSION | REPLY, size: size as u32 }
    }

    /// The same header, asking for an acknowledgement.
    pub(super) fn asking(self) -> Self {
        Self { flags: self.flags | NEED_REPLY, ..self }
    }

    pub(super) fn is_reply(self) -> bool {
        self.flags & REPLY != 0
    }

    pub(super) fn needs_reply(self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    pub(super) fn parse(bytes: &[u8; HEADER_SIZE]) -> Result<Self, RelayError> {
        let header =
            Self { request: u32_at(bytes, 0), flags: u32_at(bytes, 4), size: u32_at(bytes, 8) };
        let reason = if header.flags & VERSION_MASK != VERSION {
            format!("version {} is not 1", header.flags & VERSION_MASK)
        } else if header.flags & !(VERSION_MASK | REPLY | NEED_REPLY) != 0 {
            format!("reserved flags are set ({:#x})", header.flags)
        } else if header.size as usize > PAYLOAD_MAX {
            format!("a payload of {} bytes is larger than {PAYLOAD_MAX}", header.size)
        } else {
            return Ok(header);
        };
        Err(RelayError::Header { request: header.request, reason })
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..4].copy_from_slice(&self.request.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.flags.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.size.to_le_bytes());
        bytes
    }
}

/// A whole message with the descriptors that came with it; those that are not taken are closed with it.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) header: Header,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Message {
    pub(super) fn u32_at(&self, offset: usize) -> u32 {
        u32_at(&self.body, offset)
    }

    pub(super) fn u64_at(&self, offset: usize) -> u64 {
        u64_at(&self.body, offset)
    }
}

/// The little-endian number at `offset`; zero past the end, where sizes were checked before.
pub(super) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    bytes.get(offset..offset + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

/// Like [`u32_at`], for 64 bits.
pub(super) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from(u32_at(bytes, offset)) | u64::from(u32_at(bytes, offset + 4)) << 32
}

/// Protocol features by bit number.
pub(super) mod protocol {
    pub(in super::super) const MQ: u32 = 0;
    pub(in super::super) const LOG_SHMFD: u32 = 1;
    pub(in super::super) const REPLY_ACK: u32 = 3;
    pub(in super::super) const BACKEND_REQ: u32 = 5;
    pub(in super::super) const PAGEFAULT: u32 = 8;
    pub(in super::super) const CONFIG: u32 = 9;
    pub(in super::super) const INFLIGHT_SHMFD: u32 = 12;
    pub(in super::super) const RESET_DEVICE: u32 = 13;
    pub(in super::super) const CONFIGURE_MEM_SLOTS: u32 = 15;
    pub(in super::super) const STATUS: u32 = 16;
    pub(in super::super) const DEVICE_STATE: u32 = 19;
}

macro_rules! requests {
    ($(
        $name:ident = $id:literal, sizes $sizes:expr, fds $fds:expr, reply $reply:ident,
        feature $feature:expr;
    )*) => {
        /// A request of the front-end that the relay knows.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(non_camel_case_types, missing_docs, clippy::upper_case_acronyms)]
        pub enum FrontendRequest {
            $($name = $id,)*
        }

        impl FrontendRequest {
            /// The name in the specification, without the prefix.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// What the message must look like.
            pub(super) fn shape(self) -> Shape {
                match self {
                    $(Self::$name => Shape {
                        sizes: &$sizes,
                        fds: $fds,
                        reply: Reply::$reply,
                        feature: $feature,
                    },)*
                }
            }

            /// All requests, for tests.
            #[cfg(test)]
            pub(super) const ALL: &'static [Self] = &[$(Self::$name,)*];
        }

        impl TryFrom<u32> for FrontendRequest {
            type Error = u32;

            fn try_from(id: u32) -> Result<Self, u32> {
                match id { $($id => Ok(Self::$name),)* _ => Err(id) }
            }
        }
    };
}

/// What a request must look like, and whether it is answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Payload sizes that are accepted: smallest and largest of each range.
    pub(super) sizes: &'static [(usize, usize)],
    /// Fewest and most descriptors.
    pub(super) fds: (usize, usize),
    pub(super) reply: Reply,
    /// Protocol feature that must have been negotiated.
    pub(super) feature: Option<u32>,
}

/// When a front-end expects an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// When it asked for an acknowledgement and REPLY_ACK was negotiated.
    Asked,
    /// Always.
    Always,
    /// Never: the device has no use for the request, the connection ends.
    Unsupported,
}

const U64: (usize, usize) = (8, 8);
const REGION: (usize, usize) = (40, 40);
const EMPTY: (usize, usize) = (0, 0);
const ANY: (usize, usize) = (0, PAYLOAD_MAX);

requests! {
    GET_FEATURES = 1, sizes [EMPTY], fds (0, 0), reply Always, feature None;
    SET_FEATURES = 2, sizes [U64], fds (0, 0), reply Asked, feature None;
    SET_OWNER = 3, sizes [EMPTY], fds (0, 0), reply Asked, feature None;
    RESET_OWNER = 4, sizes [EMPTY], fds (0, 0), reply Asked, feature None;
    SET_MEM_TABLE = 5, sizes [(8, 8 + 32 * FDS_MAX)], fds (0, FDS_MAX), reply Asked, feature None;
    SET_LOG_BASE = 6, sizes [(16, 16)], fds (1, 1), reply Always, feature Some(protocol::LOG_SHMFD);
    SET_LOG_FD = 7, sizes [(0, 8)], fds (0, 1), reply Asked, feature None;
    SET_VRING_NUM = 8, sizes [U64], fds (0, 0), reply Asked, feature None;
    SET_VRING_ADDR = 9, sizes [(40, 40)], fds (0, 0), reply Asked, feature None;
    SET_VRING_BASE = 10, sizes [U64], fds (0, 0), reply Asked, feature None;
    GET_VRING_BASE = 11, sizes [U64], fds (0, 0), reply Always, feature None;
    SET_VRING_KICK = 12, sizes [U64], fds (0, 1), reply Asked, feature None;
    SET_VRING_CALL = 13, sizes [U64], fds (0, 1), reply Asked, feature None;
    SET_VRING_ERR = 14, sizes [U64], fds (0, 1), reply Asked, feature None;
    GET_PROTOCOL_FEATURES = 15, sizes [EMPTY], fds (0, 0), reply Always, feature None;
    SET_PROTOCOL_FEATURES = 16, sizes [U64], fds (0, 0), reply Asked, feature None;
    GET_QUEUE_NUM = 17, sizes [EMPTY], fds (0, 0), reply Always, feature Some(protocol::MQ);
    SET_VRING_ENABLE = 18, sizes [U64], fds (0, 0), reply Asked, feature None;
    SEND_RARP = 19, sizes [ANY], fds (0, FDS_MAX), reply Unsupported, feature None;
    NET_SET_MTU = 20, sizes [ANY], fds (0, FDS_MAX), reply Unsupported, feature None;
    SET_BACKEND_REQ_FD = 21, sizes [(0, 8)], fds (1, 1), reply Asked,
        feature Some(protocol::BACKEND_REQ);
    IOTLB_MSG = 22, sizes [ANY], fds (0, FDS_MAX), reply Unsupported, feature None;
    SET_VRING_ENDIAN = 23, sizes [ANY], fds (0, FDS_MAX), reply Unsupported, feature None;
    GET_CONFIG = 24, sizes [(12, PAYLOAD_MAX)], fds (0, 0), reply Always,
        feature Some(protocol::CONFIG);
    SET_CONFIG = 25, sizes [(12, PAYLOAD_MAX)], fds (0, 0), reply Asked,
        feature Some(protocol::CONFIG);
    CREATE_CRYPTO_SESSION = 26, sizes [ANY], fds (0, FDS_MAX), reply Unsupported, feature None;
    CLOSE_CRYPTO_SESSION = 27, sizes [ANY], fds (0, FDS_MAX), reply Unsupported, feature None;
    POSTCOPY_ADVISE = 28, sizes [EMPTY], fds (0, 0), reply Always,
        feature Some(protocol::PAGEFAULT);
    POSTCOPY_LISTEN = 29, sizes [EMPTY], fds (0, 0), reply Asked,
        feature Some(protocol::PAGEFAULT);
    POSTCOPY_END = 30, sizes [EMPTY], fds (0, 0), reply Always, feature Some(protocol::PAGEFAULT);
    GET_INFLIGHT_FD = 31, sizes [ANY], fds (0, FDS_MAX), reply Always,
        feature Some(protocol::INFLIGHT_SHMFD);
    SET_INFLIGHT_FD = 32, sizes [ANY], fds (0, FDS_MAX), reply Asked,
        feature Some(protocol::INFLIGHT_SHMFD);
    GPU_SET_SOCKET = 33, sizes [ANY], fds (0, FDS_MAX), reply Unsupported, feature None;
    RESET_DEVICE = 34, sizes [EMPTY], fds (0, 0), reply Asked,
        feature Some(protocol::RESET_DEVICE);
    VRING_KICK = 35, sizes [ANY], fds (0, FDS_MAX), reply Unsupported, feature None;
    GET_MAX_MEM_SLOTS = 36, sizes [EMPTY], fds (0, 0), reply Always,
        feature Some(protocol::CONFIGURE_MEM_SLOTS);
    ADD_MEM_REG = 37, sizes [U64, REGION], fds (0, 1), reply Asked,
        feature Some(protocol::CONFIGURE_MEM_SLOTS);
    REM_MEM_REG = 38, sizes [U64, REGION], fds (0, 1), reply Asked,
        feature Some(protocol::CONFIGURE_MEM_SLOTS);
    SET_STATUS = 39, sizes [U64], fds (0, 0), reply Asked, feature Some(protocol::STATUS);
    GET_STATUS = 40, sizes [EMPTY], fds (0, 0), reply Always, feature Some(protocol::STATUS);
    GET_SHARED_OBJECT = 41, sizes [ANY], fds (0, FDS_MAX), reply Unsupported, feature None;
    SET_DEVICE_STATE_FD = 42, sizes [U64], fds (1, 1), reply Always, feature None;
    CHECK_DEVICE_STATE = 43, sizes [EMPTY], fds (0, 0), reply Always, feature None;
    GET_SHMEM_CONFIG = 44, sizes [ANY], fds (0, FDS_MAX), reply Unsupported, feature None;
}

impl fmt::Display for FrontendRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
