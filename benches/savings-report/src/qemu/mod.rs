//! The same memory, moved by a stock QEMU and by this project, and the same guest resized.

mod bench;
mod ours;
mod pager;
mod resize;
mod tables;
mod theirs;

use std::path::Path;

use serde::{Deserialize, Serialize};

use bench::Bench;
pub use pager::Paged;
pub use pager::tables as pager_tables;
pub use resize::Resized;
pub use tables::{moves, summary, tables};

/// Whose engine, or device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Who {
    /// QEMU's.
    Qemu,
    /// This project's.
    Ours,
}

impl Who {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "QEMU",
            Self::Ours => "this project",
        }
    }
}

/// Where a guest goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Route {
    /// Over a Unix socket.
    Socket,
    /// To a file in the mapped-ram layout.
    MappedRam,
    /// To a file, as a stream.
    File,
}

impl Route {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Socket, Self::MappedRam, Self::File];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Socket => "Unix socket",
            Self::MappedRam => "file, mapped-ram",
            Self::File => "file, stream",
        }
    }
}

/// What the host holds for a guest, bytes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Resident {
    /// For the region of the device.
    pub region: u64,
    /// For the memory that it booted with.
    pub boot: u64,
}

/// One guest, moved once. Sizes are bytes, times milliseconds, pages of 4 KiB.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Moved {
    /// By whom.
    pub who: Who,
    /// Where to.
    pub route: Route,
    /// What the sender counted.
    pub sent: u64,
    /// The same, counted from outside: the size or the blocks of the file, what came out of the
    /// socket.
    pub counted: u64,
    /// Pages with their bytes.
    pub normal: u64,
    /// Pages of zeros, sent as such or left out.
    pub zero: u64,
    /// Until the first page was sent.
    pub setup: f64,
    /// In all.
    pub total: f64,
    /// While it could run nowhere, had it run; `None` where that is not counted.
    pub downtime: Option<f64>,
    /// On the source, before and after.
    pub source: [Resident; 2],
    /// On the destination, afterwards.
    pub destination: Resident,
}

impl Moved {
    /// Whether both counts are the same but for what is not memory: headers, devices, and what a file
    /// system keeps beside the data.
    fn agrees(&self) -> bool {
        const SLACK: u64 = 1 << 20;
        self.counted.abs_diff(self.sent) <= SLACK + self.sent / 100
    }
}

/// What both did, or why there is no comparison.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Comparison {
    /// Both.
    Measured(Box<Measured>),
    /// There is none, for this reason.
    NotRun(String),
    /// It ended with this error.
    Failed(String),
}

/// What both did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// Which QEMU.
    pub qemu: String,
    /// The guest that was moved, in words.
    pub guest: String,
    /// Every move of a guest.
    pub moved: Vec<Moved>,
    /// Every resize of a guest.
    pub resized: Vec<Resized>,
    /// The pager beside what QEMU does itself.
    pub paged: Paged,
}

impl Comparison {
    /// What was measured, if it was.
    pub fn measured(&self) -> Option<&Measured> {
        match self {
            Self::Measured(measured) => Some(measured),
            Self::NotRun(_) | Self::Failed(_) => None,
        }
    }

    /// Whether it began and did not come to its end, or counts of the same bytes differ.
    pub fn is_wrong(&self) -> bool {
        match self {
            Self::Measured(measured) => !measured.moved.iter().all(Moved::agrees),
            Self::NotRun(_) => false,
            Self::Failed(_) => true,
        }
    }

    /// What has to be known to read it.
    pub fn notes(&self) -> Vec<String> {
        match self {
            Self::NotRun(reason) => vec![format!("Not compared with a stock QEMU: {reason}.")],
            Self::Failed(reason) => {
                vec![format!("The comparison with a stock QEMU failed: {reason}.")]
            }
            Self::Measured(_) => {
                tables::NOTES.into_iter().chain([pager::NOTE]).map(str::to_owned).collect()
            }
        }
    }
}

/// Compares, with files in `dir`.
pub fn compare(dir: &Path) -> Comparison {
    let bench = match Bench::new(dir) {
        Ok(bench) => bench,
        Err(error) => return Comparison::NotRun(format!("{error:#}")),
    };
    match bench.measure() {
        Ok(measured) => Comparison::Measured(Box::new(measured)),
        Err(error) => Comparison::Failed(format!("{error:#}")),
    }
}

/// Compares only what the pager does, with files in `dir`.
///
/// # Errors
///
/// When there is no QEMU to be had, or something does not come to its end.
pub fn compare_pager(dir: &Path) -> anyhow::Result<Paged> {
    Bench::new(dir)?.measure_pager()
}
