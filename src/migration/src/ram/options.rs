//! What a VMM says of a RAM block.

/// Whether a block takes part in migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Participation {
    /// It is in the list of blocks, and its pages are sent.
    Listed,
    /// The destination makes its own: it is left out of the list.
    LeftOut,
    /// Not declared: migration refuses to start, since the VMM has forgotten it.
    #[default]
    Undeclared,
}

/// Whether pages of zeros are looked for before they are sent (QEMU's `zero-page-detection`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroPageDetection {
    /// Every page is sent with its bytes, and placed as data by the destination.
    None,
    /// A page of zeros is sent as such, and left out of a snapshot.
    #[default]
    Legacy,
}

/// What a VMM says of a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockOptions {
    /// Whether it takes part.
    pub participation: Participation,
    /// Whether its memory is a file that the destination has too: with x-ignore-shared it is
    /// listed, but its pages are not sent.
    pub shared: bool,
    /// Whether others than this process write it, as a vhost-user back-end does, or a device by DMA
    /// into pages that stay pinned: a background snapshot then saves it while the guest is stopped,
    /// since it cannot see such writes.
    pub written_elsewhere: bool,
    /// Whether its resident pages stay the ones that they are while it is loaded into, because they are
    /// pinned (vfio, vDPA, fixed buffers of io_uring), locked or preallocated. Zeros are then written where
    /// other blocks discard: a page that is discarded while it is pinned is replaced for the guest, but
    /// not for the device. Ranges that are discarded by contract are no part of this, and it cannot be
    /// the destination of postcopy or of a lazy restore, which need pages to be missing.
    ///
    /// What pins a block without it attaches when the guest has been told to run, not before.
    pub keep_resident: bool,
    /// Its used length, bytes, where that may change up to the length of the block, as firmware's
    /// does. The destination then follows the source.
    pub resizable: Option<u64>,
    /// Whether what the host holds nothing for is read, which allocates it, and sent as zeros: what
    /// a VMM does that does not look for holes.
    pub send_holes: bool,
    /// Whether its pages of zeros are found.
    pub zero_page_detection: ZeroPageDetection,
}

impl BlockOptions {
    /// Of a block whose pages are sent.
    pub fn migratable() -> Self {
        Self { participation: Participation::Listed, ..Self::default() }
    }
}
