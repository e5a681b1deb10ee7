//! The state of memory: populated or discarded.

/// The state of memory in the sense of QEMU's RamDiscardManager: whether its users may rely on it.
///
/// What is resident is another question: the host may have nothing yet of memory that is populated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemoryState {
    /// Its users may rely on it. Of virtio-mem: what is plugged.
    Populated,
    /// Its users may not rely on it: its content is lost, now or at any time. Of virtio-mem: what is not plugged.
    Discarded,
}

impl MemoryState {
    /// Each of the two.
    pub const BOTH: [Self; 2] = [Self::Populated, Self::Discarded];

    /// Whether it is [`Populated`](Self::Populated): a bit of a bitmap of what is populated.
    #[inline]
    pub const fn is_populated(self) -> bool {
        matches!(self, Self::Populated)
    }

    /// The other state: what memory was in before it was changed.
    #[inline]
    #[must_use]
    pub const fn opposite(self) -> Self {
        match self {
            Self::Populated => Self::Discarded,
            Self::Discarded => Self::Populated,
        }
    }
}
