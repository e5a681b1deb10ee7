//! The same memory, moved by a stock QEMU and by this project.

mod ours;
mod theirs;

use std::path::Path;

use serde::Serialize;

use crate::tables::Table;
use crate::units::{size, time};

/// Where a guest goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Route {
    /// To a file, as a stream.
    File,
    /// To a file in the mapped-ram layout.
    MappedRam,
    /// Over a Unix socket.
    Socket,
}

impl Route {
    const ALL: [Self; 3] = [Self::File, Self::MappedRam, Self::Socket];

    fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::MappedRam => "file, mapped-ram",
            Self::Socket => "Unix socket",
        }
    }
}

/// One guest, moved once. Sizes are bytes, times milliseconds, pages of 4 KiB.
#[derive(Clone, Debug, Serialize)]
pub struct Moved {
    /// By whom.
    pub who: String,
    /// Where to.
    pub route: Route,
    /// What the sender counted.
    pub sent: u64,
    /// The blocks of the file, or what the kernel saw being read from the socket.
    pub counted: Option<u64>,
    /// Pages with their bytes.
    pub normal: u64,
    /// Pages of zeros, sent as such or left out.
    pub zero: u64,
    /// Until the first page was sent.
    pub setup: f64,
    /// In all.
    pub total: f64,
    /// What the host held for region and boot memory on the source, before and after.
    pub source: [u64; 2],
    /// What it holds for them on the destination.
    pub destination: u64,
}

/// What both did, or why there is no comparison.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Comparison {
    /// Both, route by route; the guest in words.
    Measured {
        /// What was moved.
        guest: String,
        /// By whom, and what came of it.
        moved: Vec<Moved>,
    },
    /// There is none, for this reason.
    NotRun(String),
}

impl Comparison {
    /// Both side by side.
    pub fn table(&self) -> Option<Table> {
        let Self::Measured { guest, moved } = self else { return None };
        let head = [
            "who",
            "route",
            "sent",
            "counted",
            "normal pages",
            "zero pages",
            "setup",
            "total",
            "source held",
            "destination holds",
        ];
        let mut table = Table::new(format!("Against a stock QEMU: {guest}"), head);
        table.rows.extend(moved.iter().map(|moved| {
            vec![
                moved.who.clone(),
                moved.route.name().to_owned(),
                size(moved.sent),
                moved.counted.map_or_else(|| "-".to_owned(), size),
                moved.normal.to_string(),
                moved.zero.to_string(),
                time(moved.setup),
                time(moved.total),
                format!("{} → {}", size(moved.source[0]), size(moved.source[1])),
                size(moved.destination),
            ]
        }));
        Some(table)
    }

    /// What has to be known to read it.
    pub fn notes(&self) -> Vec<String> {
        vec![match self {
            Self::NotRun(reason) => format!("Not compared with a stock QEMU: {reason}."),
            Self::Measured { .. } => "Against a stock QEMU: a Linux guest under TCG with QEMU's own \
                virtio-mem-pci, its memory in memfds, stopped before it is moved; a fresh guest for \
                each route. QEMU's figures are query-migrate's, memory is by st_blocks of the files behind \
                the region and the boot memory together. This project then moves copies of those \
                two files with the same block state, hole for hole; QEMU also moves its devices and firmware \
                (below 1 MiB). To a file this project always uses the mapped-ram layout."
                .to_owned(),
        }]
    }
}

/// Compares, if that is `wanted`.
pub fn compare(wanted: bool, dir: &Path) -> Comparison {
    if !wanted {
        return Comparison::NotRun("--with-qemu was not given".to_owned());
    }
    let compared = theirs::Bench::new(dir).and_then(|bench| {
        let mut moved = Vec::new();
        for route in Route::ALL {
            eprintln!("against QEMU: {}", route.name());
            moved.extend(bench.compare(route)?);
        }
        Ok(Comparison::Measured { guest: bench.guest(), moved })
    });
    compared.unwrap_or_else(|error| Comparison::NotRun(format!("{error:#}")))
}
