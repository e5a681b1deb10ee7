//! Descriptors and how they are linked, right or wrong.

/// Descriptor flag: another descriptor follows.
pub const DESC_F_NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const DESC_F_WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const DESC_F_INDIRECT: u16 = 4;
/// Length of a descriptor.
pub const DESC_SIZE: u64 = 16;

/// How a descriptor is linked to the next one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Next {
    /// As the chain goes on: to the following segment, or nowhere at its end.
    #[default]
    Auto,
    /// Ends the chain here, whatever follows.
    Stop,
    /// Goes on at this entry of the table, which may be one that does not exist.
    Entry(u16),
    /// Goes back to the first segment of the chain.
    Head,
}

/// One descriptor of a chain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address of the buffer.
    pub addr: u64,
    /// Its length.
    pub len: u32,
    /// Flags apart from `NEXT`.
    pub flags: u16,
    /// The link.
    pub next: Next,
}

impl Segment {
    /// A buffer that the device reads.
    pub fn readable(addr: u64, len: u32) -> Self {
        Self { addr, len, ..Self::default() }
    }

    /// A buffer that the device writes.
    pub fn writable(addr: u64, len: u32) -> Self {
        Self { addr, len, flags: DESC_F_WRITE, ..Self::default() }
    }

    /// A table of `count` descriptors at `addr`.
    pub fn indirect(addr: u64, count: usize) -> Self {
        let len = count as u32 * DESC_SIZE as u32;
        Self { addr, len, flags: DESC_F_INDIRECT, next: Next::Auto }
    }

    /// The same segment with another link.
    pub fn with_next(self, next: Next) -> Self {
        Self { next, ..self }
    }

    /// The same segment with more flags.
    pub fn with_flags(self, flags: u16) -> Self {
        Self { flags: self.flags | flags, ..self }
    }

    /// The descriptor, when it stands at place `at` of a chain whose entries are `table`.
    pub(super) fn to_bytes(self, at: usize, table: &[u16]) -> [u8; DESC_SIZE as usize] {
        let (linked, next) = match self.next {
            Next::Auto => table.get(at + 1).map_or((false, 0), |next| (true, *next)),
            Next::Stop => (false, 0),
            Next::Entry(entry) => (true, entry),
            Next::Head => (true, table[0]),
        };
        let flags = self.flags | if linked { DESC_F_NEXT } else { 0 };
        let mut bytes = [0; DESC_SIZE as usize];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        bytes
    }
}
