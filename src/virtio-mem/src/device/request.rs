//! Guest requests and responses (VIRTIO 1.4, 5.15.6.2): bytes to enum and back, nothing else.

/// Length of `struct virtio_mem_req`, bytes.
pub const REQUEST_LEN: usize = 24;
/// Length of `struct virtio_mem_resp`, bytes. Every response has it, whatever its type.
pub const RESPONSE_LEN: usize = 10;

const VIRTIO_MEM_REQ_PLUG: u16 = 0;
const VIRTIO_MEM_REQ_UNPLUG: u16 = 1;
const VIRTIO_MEM_REQ_UNPLUG_ALL: u16 = 2;
const VIRTIO_MEM_REQ_STATE: u16 = 3;

const VIRTIO_MEM_RESP_ACK: u16 = 0;
const VIRTIO_MEM_RESP_NACK: u16 = 1;
const VIRTIO_MEM_RESP_BUSY: u16 = 2;
const VIRTIO_MEM_RESP_ERROR: u16 = 3;

const VIRTIO_MEM_STATE_PLUGGED: u16 = 0;
const VIRTIO_MEM_STATE_UNPLUGGED: u16 = 1;
const VIRTIO_MEM_STATE_MIXED: u16 = 2;

// Offsets within the request; bytes 2..8 and 18..24 are padding, ignored (5.15.6.3.1).
const ADDR: usize = 8;
const NB_BLOCKS: usize = 16;

/// The blocks a request names, as the guest wrote them: not yet checked against the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSpan {
    /// Guest-physical address of the first block.
    pub addr: u64,
    /// Number of blocks.
    pub nb_blocks: u16,
}

/// A guest request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Make unplugged blocks usable.
    Plug(BlockSpan),
    /// Unplug plugged blocks.
    Unplug(BlockSpan),
    /// Unplug everything.
    UnplugAll,
    /// Ask for the state of blocks.
    State(BlockSpan),
    /// A type the specification does not name; answered with ERROR.
    Unsupported(u16),
}

impl Request {
    /// Parses `struct virtio_mem_req`. Padding is ignored.
    pub fn from_bytes(bytes: &[u8; REQUEST_LEN]) -> Self {
        let kind = le16(bytes, 0);
        let mut addr = [0; 8];
        addr.copy_from_slice(&bytes[ADDR..ADDR + 8]);
        let span = BlockSpan { addr: u64::from_le_bytes(addr), nb_blocks: le16(bytes, NB_BLOCKS) };
        match kind {
            VIRTIO_MEM_REQ_PLUG => Self::Plug(span),
            VIRTIO_MEM_REQ_UNPLUG => Self::Unplug(span),
            VIRTIO_MEM_REQ_UNPLUG_ALL => Self::UnplugAll,
            VIRTIO_MEM_REQ_STATE => Self::State(span),
            other => Self::Unsupported(other),
        }
    }

    /// The canonical bytes of the request: padding and ignored fields are zero, so that equal
    /// requests have equal bytes.
    pub fn to_bytes(self) -> [u8; REQUEST_LEN] {
        let none = BlockSpan { addr: 0, nb_blocks: 0 };
        let (kind, span) = match self {
            Self::Plug(span) => (VIRTIO_MEM_REQ_PLUG, span),
            Self::Unplug(span) => (VIRTIO_MEM_REQ_UNPLUG, span),
            Self::UnplugAll => (VIRTIO_MEM_REQ_UNPLUG_ALL, none),
            Self::State(span) => (VIRTIO_MEM_REQ_STATE, span),
            Self::Unsupported(kind) => (kind, none),
        };
        let mut bytes = [0; REQUEST_LEN];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[ADDR..ADDR + 8].copy_from_slice(&span.addr.to_le_bytes());
        bytes[NB_BLOCKS..NB_BLOCKS + 2].copy_from_slice(&span.nb_blocks.to_le_bytes());
        bytes
    }

    /// The name of the request type, for logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plug(_) => "plug",
            Self::Unplug(_) => "unplug",
            Self::UnplugAll => "unplug_all",
            Self::State(_) => "state",
            Self::Unsupported(_) => "unsupported",
        }
    }
}

/// The state of a span of blocks, as STATE reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// All plugged.
    Plugged,
    /// All unplugged.
    Unplugged,
    /// Some plugged, some not.
    Mixed,
}

/// The answer to a guest request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Response {
    /// Done.
    Ack,
    /// Done; the answer to STATE.
    AckState(BlockState),
    /// Refused: it would exceed the requested size.
    Nack,
    /// Not now; nothing was changed.
    Busy,
    /// The request is wrong; nothing was changed.
    Error,
}

impl Response {
    /// `struct virtio_mem_resp`. The state field is 0 in every answer but the one to STATE.
    pub fn to_bytes(self) -> [u8; RESPONSE_LEN] {
        let (kind, state) = match self {
            Self::Ack => (VIRTIO_MEM_RESP_ACK, 0),
            Self::AckState(BlockState::Plugged) => (VIRTIO_MEM_RESP_ACK, VIRTIO_MEM_STATE_PLUGGED),
            Self::AckState(BlockState::Unplugged) => {
                (VIRTIO_MEM_RESP_ACK, VIRTIO_MEM_STATE_UNPLUGGED)
            }
            Self::AckState(BlockState::Mixed) => (VIRTIO_MEM_RESP_ACK, VIRTIO_MEM_STATE_MIXED),
            Self::Nack => (VIRTIO_MEM_RESP_NACK, 0),
            Self::Busy => (VIRTIO_MEM_RESP_BUSY, 0),
            Self::Error => (VIRTIO_MEM_RESP_ERROR, 0),
        };
        let mut bytes = [0; RESPONSE_LEN];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&u16::to_le_bytes(state));
        bytes
    }

    /// The name of the response type, for logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ack | Self::AckState(_) => "ack",
            Self::Nack => "nack",
            Self::Busy => "busy",
            Self::Error => "error",
        }
    }
}

fn le16(bytes: &[u8; REQUEST_LEN], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn padding_is_ignored() {
        let mut bytes = [0xff; REQUEST_LEN];
        bytes[..2].copy_from_slice(&0u16.to_le_bytes());
        bytes[8..16].copy_from_slice(&0x1_4000_0000u64.to_le_bytes());
        bytes[16..18].copy_from_slice(&3u16.to_le_bytes());
        let span = BlockSpan { addr: 0x1_4000_0000, nb_blocks: 3 };
        assert_eq!(Request::from_bytes(&bytes), Request::Plug(span));
    }

    #[test]
    fn responses_have_the_layout_of_the_specification() {
        assert_eq!(Response::Ack.to_bytes(), [0; 10]);
        assert_eq!(Response::Nack.to_bytes()[0], 1);
        assert_eq!(Response::Busy.to_bytes()[0], 2);
        assert_eq!(Response::Error.to_bytes()[0], 3);
        let mixed = Response::AckState(BlockState::Mixed).to_bytes();
        assert_eq!(mixed, [0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
    }

    proptest! {
        #[test]
        fn any_bytes_parse_and_canonical_bytes_round_trip(bytes: [u8; REQUEST_LEN]) {
            let request = Request::from_bytes(&bytes);
            prop_assert_eq!(Request::from_bytes(&request.to_bytes()), request);
        }
    }
}
