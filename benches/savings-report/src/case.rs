//! What is measured: one way of moving one guest, by a VMM that knows more or less.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::content::Content;
use crate::link::Link;
use crate::units::PAGE;

/// How a guest is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// All of it before the guest goes.
    Precopy,
    /// One round of precopy, and the rest after the guest has gone.
    Hybrid,
    /// The guest goes first.
    Postcopy,
    /// To a file, while the guest runs.
    BackgroundSnapshot,
    /// From that file, while the guest already runs.
    Restore,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Precopy, Self::Hybrid, Self::Postcopy, Self::BackgroundSnapshot, Self::Restore];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::Hybrid => "hybrid",
            Self::Postcopy => "postcopy",
            Self::BackgroundSnapshot => "background snapshot",
            Self::Restore => "restore",
        }
    }

    /// Whether there is a guest that writes while it runs.
    pub fn has_running_source(self) -> bool {
        self != Self::Restore
    }
}

/// What a VMM knows of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Nothing: everything in it is read and sent.
    DiscardBlind,
    /// Nothing, but it looks for zeros in everything that it reads.
    ZeroDetecting,
    /// Which blocks are plugged, and it looks for zeros there: QEMU.
    BlockAware,
    /// Which blocks are plugged, and what the host holds of them: this project.
    HoleAware,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 4] =
        [Self::DiscardBlind, Self::ZeroDetecting, Self::BlockAware, Self::HoleAware];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::DiscardBlind => "discard-blind",
            Self::ZeroDetecting => "zero-detecting",
            Self::BlockAware => "block-aware",
            Self::HoleAware => "block- and hole-aware",
        }
    }

    /// Whether it asks the RamDiscardManager.
    pub fn knows_blocks(self) -> bool {
        matches!(self, Self::BlockAware | Self::HoleAware)
    }
}

/// One point of the sweep. Sizes are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// Size of the region.
    pub region: u64,
    /// How much of it is plugged.
    pub plugged: u64,
    /// How much of every plugged block holds data, percent.
    pub touched_percent: u64,
    /// What the guest writes, bytes a second.
    pub dirty_rate: u64,
    /// How it is moved.
    pub way: Way,
    /// By whom.
    pub mode: Mode,
    /// Over what.
    pub link: Link,
    /// What the guest's memory holds; noise in journals that do not say.
    #[serde(default)]
    pub content: Content,
}

impl Case {
    /// Bytes of a block: what is touched and what is not lies side by side in each.
    pub const BLOCK: u64 = 2 << 20;

    /// Bytes of a plugged block that hold data: its first pages.
    pub fn touched_in_block(&self) -> u64 {
        Self::BLOCK / PAGE * self.touched_percent / 100 * PAGE
    }

    /// Bytes that hold data.
    pub fn touched(&self) -> u64 {
        self.plugged / Self::BLOCK * self.touched_in_block()
    }

    /// Bytes that have to be read on the source.
    pub fn read(&self) -> u64 {
        match self.mode {
            Mode::DiscardBlind | Mode::ZeroDetecting => self.region,
            Mode::BlockAware => self.plugged,
            Mode::HoleAware => self.touched(),
        }
    }

    /// Bytes of pages that have to be moved, without what is written meanwhile.
    pub fn moved(&self) -> u64 {
        if self.mode == Mode::DiscardBlind { self.region } else { self.touched() }
    }

    /// Memory that both sides and a file in the page cache take at most.
    pub fn memory(&self) -> u64 {
        let file = matches!(self.way, Way::BackgroundSnapshot | Way::Restore);
        self.read() + self.moved() * if file { 2 } else { 1 }
    }

    /// Percentage of the region that is plugged.
    pub fn plugged_percent(&self) -> f64 {
        self.plugged as f64 * 100.0 / self.region as f64
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = crate::units::size;
        let Self { region, plugged, touched_percent, dirty_rate, way, mode, link, content } = self;
        write!(
            f,
            "{}, {}: region {}, plugged {}, touched {touched_percent} %, dirtied {}/s",
            way.name(),
            mode.name(),
            size(*region),
            size(*plugged),
            size(*dirty_rate)
        )?;
        if *content != Content::default() {
            write!(f, ", of {}", content.name())?;
        }
        if *link == Link::default() { Ok(()) } else { write!(f, ", over {}", link.name()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mode_reads_and_moves_what_it_does_not_know_better() {
        let case = |mode| Case {
            region: 1 << 30,
            plugged: 256 << 20,
            touched_percent: 50,
            dirty_rate: 0,
            way: Way::Precopy,
            mode,
            link: Link::default(),
            content: Content::default(),
        };
        let costs = Mode::ALL.map(|mode| (case(mode).read() >> 20, case(mode).moved() >> 20));
        assert_eq!(costs, [(1024, 1024), (1024, 128), (256, 128), (128, 128)]);
    }
}
