//! The vhost-user wire: message numbers, feature bits and payloads, as bytes.
//!
//! Payload functions build what a correct front-end sends. Nothing here checks anything: a test
//! that wants a wrong message changes the bytes.

/// Length of the header: request, flags and size, 32 bits each, little-endian.
pub const HEADER_SIZE: usize = 12;
/// The protocol version, in the low two bits of the flags.
pub const VERSION: u32 = 1;
/// Flag of a reply.
pub const FLAG_REPLY: u32 = 1 << 2;
/// Flag of a request that wants an acknowledgement.
pub const FLAG_NEED_REPLY: u32 = 1 << 3;
/// In the payload of the three eventfd messages: no file descriptor comes with it.
pub const VRING_NO_FD: u64 = 1 << 8;
/// In the flags of `SET_VRING_ADDR`: writes to the used ring are to be logged.
pub const VRING_F_LOG: u32 = 1;
/// The message on the backend channel that announces a changed configuration.
pub const BACKEND_CONFIG_CHANGE_MSG: u32 = 2;

/// Numbers of the messages of the front-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[expect(missing_docs, reason = "the names are those of the specification")]
pub enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    ResetOwner = 4,
    SetMemTable = 5,
    SetLogBase = 6,
    SetLogFd = 7,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    SetVringErr = 14,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    SendRarp = 19,
    NetSetMtu = 20,
    SetBackendReqFd = 21,
    IotlbMsg = 22,
    SetVringEndian = 23,
    GetConfig = 24,
    SetConfig = 25,
    PostcopyAdvise = 28,
    PostcopyListen = 29,
    PostcopyEnd = 30,
    GetInflightFd = 31,
    SetInflightFd = 32,
    ResetDevice = 34,
    VringKick = 35,
    GetMaxMemSlots = 36,
    AddMemReg = 37,
    RemMemReg = 38,
    SetStatus = 39,
    GetStatus = 40,
    GetSharedObject = 41,
    SetDeviceStateFd = 42,
    CheckDeviceState = 43,
}

impl From<Request> for u32 {
    fn from(request: Request) -> u32 {
        request as u32
    }
}

/// Virtio feature bits.
#[expect(missing_docs, reason = "the names are those of the specification")]
pub mod feature {
    pub const VIRTIO_MEM_ACPI_PXM: u64 = 1 << 0;
    pub const VIRTIO_MEM_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
    pub const VIRTIO_MEM_PERSISTENT_SUSPEND: u64 = 1 << 2;
    pub const LOG_ALL: u64 = 1 << 26;
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const RING_PACKED: u64 = 1 << 34;
}

/// vhost-user protocol feature bits.
#[expect(missing_docs, reason = "the names are those of the specification")]
pub mod protocol_feature {
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const PAGEFAULT: u64 = 1 << 8;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const DEVICE_STATE: u64 = 1 << 19;
}

/// The header of a message.
pub fn header(request: u32, flags: u32, size: u32) -> [u8; HEADER_SIZE] {
    let mut bytes = [0; HEADER_SIZE];
    bytes[..4].copy_from_slice(&request.to_le_bytes());
    bytes[4..8].copy_from_slice(&flags.to_le_bytes());
    bytes[8..].copy_from_slice(&size.to_le_bytes());
    bytes
}

/// One entry of the memory table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// First guest-physical address.
    pub guest_addr: u64,
    /// Length in bytes.
    pub size: u64,
    /// Where the front-end has it mapped.
    pub user_addr: u64,
    /// Where it starts in the file.
    pub mmap_offset: u64,
}

impl MemoryRegion {
    /// An entry as it came back in postcopy; zeros where the bytes do not reach.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self {
            guest_addr: read64(bytes, 0),
            size: read64(bytes, 8),
            user_addr: read64(bytes, 16),
            mmap_offset: read64(bytes, 24),
        }
    }

    /// The four words of the entry.
    pub fn to_bytes(self) -> Vec<u8> {
        words64(&[self.guest_addr, self.size, self.user_addr, self.mmap_offset])
    }
}

/// Payload of `SET_MEM_TABLE`.
pub fn mem_table(regions: &[MemoryRegion]) -> Vec<u8> {
    let mut bytes = words32(&[regions.len() as u32, 0]);
    for region in regions {
        bytes.extend(region.to_bytes());
    }
    bytes
}

/// Payload of `ADD_MEM_REG` and `REM_MEM_REG`.
pub fn single_mem_region(region: MemoryRegion) -> Vec<u8> {
    let mut bytes = words64(&[0]);
    bytes.extend(region.to_bytes());
    bytes
}

/// Payload of `SET_VRING_NUM`, `SET_VRING_BASE`, `SET_VRING_ENABLE` and `GET_VRING_BASE`.
pub fn vring_state(index: u32, value: u32) -> Vec<u8> {
    words32(&[index, value])
}

/// Payload of `SET_VRING_ADDR`; addresses are user addresses, except for the log.
pub fn vring_addr(
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
) -> Vec<u8> {
    let mut bytes = words32(&[index, flags]);
    bytes.extend(words64(&[descriptors, used, available, log]));
    bytes
}

/// Payload of `GET_CONFIG` and `SET_CONFIG`.
pub fn config(offset: u32, flags: u32, bytes: &[u8]) -> Vec<u8> {
    let mut payload = words32(&[offset, bytes.len() as u32, flags]);
    payload.extend_from_slice(bytes);
    payload
}

/// Payload of `SET_LOG_BASE`.
pub fn log_base(size: u64, offset: u64) -> Vec<u8> {
    words64(&[size, offset])
}

/// Some 32-bit words, little-endian.
pub fn words32(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Some 64-bit words, little-endian.
pub fn words64(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The 32-bit word at `offset`; zero when the bytes do not reach that far.
pub fn read32(bytes: &[u8], offset: usize) -> u32 {
    bytes
        .get(offset..offset + 4)
        .map_or(0, |word| u32::from_le_bytes(word.try_into().unwrap_or_default()))
}

/// The 64-bit word at `offset`; zero when the bytes do not reach that far.
pub fn read64(bytes: &[u8], offset: usize) -> u64 {
    bytes
        .get(offset..offset + 8)
        .map_or(0, |word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
}
