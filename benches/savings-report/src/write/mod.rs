//! The report's files.

mod bars;
mod charts;
mod html;
mod markdown;
mod readme;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::host::Machine;
use crate::qemu::{self, Comparison, Paged};
use crate::record::{Outcome, Record};
use crate::sweep::Profile;
use crate::tables::{self, Table};
use crate::view::View;

pub use readme::{update as update_readme, update_pager as update_readme_pager};

/// What the whole report is made of.
#[derive(Serialize)]
pub struct Report {
    /// How it was made.
    pub profile: Profile,
    /// Where.
    pub machine: Machine,
    /// What came out.
    pub records: Vec<Record>,
    /// What is compared with a stock QEMU, or why nothing is.
    pub qemu: Comparison,
}

impl Report {
    /// Its records as sweeps.
    pub fn view(&self) -> View<'_> {
        View { profile: self.profile, records: &self.records }
    }

    /// Whether all that ran came to its end, and counts agree.
    pub fn can_be_trusted(&self) -> bool {
        !self.records.iter().any(Record::is_wrong) && !self.qemu.is_wrong()
    }

    fn tables(&self) -> Vec<Table> {
        // The last one is long.
        let mut tables = tables::report(&self.view());
        let all = tables.pop();
        tables.extend(self.qemu.measured().into_iter().flat_map(qemu::tables));
        tables.extend(all);
        tables
    }

    /// What has to be known to read it, a paragraph each.
    fn notes(&self) -> Vec<String> {
        let count = |test: fn(&Outcome) -> bool| {
            self.records.iter().filter(|record| test(&record.outcome)).count()
        };
        let Machine { processor, cpus, memory, kernel, .. } = &self.machine;
        let agree = |outcome: &Outcome| matches!(outcome, Outcome::Measured(figures) if figures.agrees == Some(true));
        let mut notes = vec![
            format!(
                "{cpus} × {processor}, {} of memory, Linux {kernel}. {} cases: {} measured, {} not \
                 run, {} failed. In {} the bytes that the engine counts agree with an independent \
                 count.",
                crate::units::size(*memory),
                self.records.len(),
                count(|outcome| matches!(outcome, Outcome::Measured(_))),
                count(|outcome| matches!(outcome, Outcome::NotRun(_))),
                count(|outcome| matches!(outcome, Outcome::Failed(_))),
                count(agree),
            ),
            "All modes are the same engine with something switched off. Discard-blind: no \
             RamDiscardManager, holes are read, no zero-page detection; everything in the region is \
             read and sent. Zero-detecting: the same, but pages of zeros are sent as such: the best \
             that a VMM without discard knowledge can do. Block-aware: plugged blocks are read, and \
             pages of zeros sent as such: what QEMU does. Block- and hole-aware: what the host holds \
             nothing for is not even read: what this project does."
                .to_owned(),
            "Source and destination are two threads of one process, connected by a Unix socket pair \
             (postcopy: two; channels for pages: one more each); with TLS, all of them are over it; handshakes \
             are part of the processor time, not of the total. Snapshots go to a file in the page cache. Memory is fresh memfds with \
             4 KiB pages; plugged are the first blocks of the region, touched the first pages of \
             every block, with data that does not compress, but where compression is compared: there seven pages \
             of sixteen are lines of words and numbers, as many are records of pointers, counters, times and flags, \
             and two are noise. What zstd does not make smaller goes plain, and costs the attempt. Before each run as much memory as it \
             takes, up to 2 GiB, is touched and freed: where the first touch of memory is slow, cases that \
             take more still pay for it. Every case runs once. Sizes are powers of 1024, pages of \
             4 KiB."
                .to_owned(),
            "Downtime is the engine's: from the guest's stop until it could run on the destination; \
             of a restore the time until the guest could run, while its memory was still read. CPU is the \
             processor time of both sides together, with the guest's own writes. The source's memory \
             is what its file holds before and after, by st_blocks. The independent count is what the kernel \
             saw this process read (rchar in /proc/self/io), which is what the destination received, or the blocks \
             of the snapshot file; it may differ by 1 % and 256 KiB."
                .to_owned(),
        ];
        notes.extend(self.qemu.notes());
        notes
    }
}

/// What is printed: the tables without the one of all cases.
pub fn summary(report: &Report) -> String {
    let mut tables = report.tables();
    tables.retain(|table| table.title != tables::ALL);
    printed(&tables)
}

/// What is printed of the pager alone.
pub fn pager(paged: &Paged) -> String {
    printed(&qemu::pager_tables(paged))
}

fn printed(tables: &[Table]) -> String {
    let text = |table: &Table| format!("\n{}\n\n{}", table.title, markdown::table(table));
    tables.iter().map(text).collect()
}

/// A chart, and where it is.
pub struct Chart {
    /// What is above it.
    pub title: String,
    /// Name of its file.
    pub name: String,
    /// The SVG.
    pub svg: String,
}

/// Writes everything to `dir`; the page to open.
///
/// # Errors
///
/// When a file cannot be written.
pub fn write(report: &Report, dir: &Path) -> Result<PathBuf> {
    let put = |name: &str, text: &str| {
        fs::write(dir.join(name), text).with_context(|| format!("cannot write {name}"))
    };
    put("report.json", &serde_json::to_string_pretty(report)?)?;
    let (tables, notes) = (report.tables(), report.notes());
    let mut charts = charts::all(&report.view())?;
    charts.extend(report.qemu.measured().map(bars::all).transpose()?.unwrap_or_default());
    for chart in &charts {
        put(&chart.name, &chart.svg)?;
    }
    put("report.md", &markdown::page(&notes, &tables, &charts))?;
    put("report.html", &html::page(&notes, &tables, &charts))?;
    Ok(dir.join("report.html"))
}
