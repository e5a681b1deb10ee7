//! What was seen, what was expected, and the table of both.

use std::fmt::{Display, Write as _};

use crate::api::{Blocks, Device};
use crate::sizes::{MIB, change, human};

/// Guest, API and host at one moment, and what is wrong with that.
pub struct Observation {
    /// MemTotal with nothing plugged.
    pub base: u64,
    /// MemTotal.
    pub mem_total: u64,
    /// What the guest's resource tree gives to virtio-mem.
    pub iomem: u64,
    /// What the host holds for the region.
    pub host: u64,
    /// What the API says.
    pub device: Device,
    /// More that the guest saw, for the table.
    pub guest_note: String,
    /// More that the API said, for the table.
    pub api_note: String,
    /// All that is not as it should be.
    pub problems: Vec<String>,
}

impl Observation {
    /// MemTotal may differ by what the kernel itself keeps at one boot and not at another.
    pub const SLACK: u64 = 4 * MIB;

    /// Notes what is wrong.
    pub fn problem(&mut self, problem: String) {
        self.problems.push(problem);
    }

    /// Notes `claim` as wrong unless it holds.
    pub fn claim(&mut self, claim: impl Display, holds: bool) {
        if !holds {
            self.problem(format!("not so: {claim}"));
        }
    }

    /// All sides agree that the guest has `size`.
    pub fn expect_size(&mut self, size: u64) {
        let (mem_total, iomem) = (self.mem_total, self.iomem);
        let expected = self.base + size;
        self.claim(
            format!("MemTotal grew by {}", human(size)),
            mem_total.abs_diff(expected) <= Self::SLACK,
        );
        self.claim(format!("/proc/iomem has {} of virtio_mem", human(size)), iomem == size);
        let Device { plugged_size, requested_size, resident_size, .. } = self.device;
        self.claim(format!("plugged_size is {size}"), plugged_size == size);
        self.claim(format!("requested_size is {size}"), requested_size == size);
        self.claim("host memory is within what is plugged", self.host <= size);
        // The guest runs on between the two looks.
        let resident = resident_size.unwrap_or(u64::MAX);
        self.claim(
            format!("resident_size {resident} is what the host holds"),
            resident.abs_diff(self.host) <= 16 * MIB,
        );
    }

    /// The block map covers the region and agrees with the plugged size.
    pub fn expect_blocks(&mut self, blocks: &Blocks) {
        let plugged: u64 = blocks.plugged.iter().map(|range| range.size).sum();
        let mut all: Vec<_> = blocks.plugged.iter().chain(&blocks.discarded).collect();
        all.sort_by_key(|range| range.offset);
        let end = all.iter().try_fold(0, |end, range| {
            (range.offset == end && range.size > 0).then(|| end + range.size)
        });
        self.claim("blocks cover the region once", end == Some(self.device.region_size));
        self.claim("blocks sum up to plugged_size", plugged == self.device.plugged_size);
    }
}

/// One line of the table.
struct Row {
    step: String,
    guest: String,
    api: String,
    host: String,
    problems: Vec<String>,
}

/// All rows so far.
#[derive(Default)]
pub struct Report {
    step: &'static str,
    rows: Vec<Row>,
}

impl Report {
    /// The rows that follow belong to `step`.
    pub fn begin(&mut self, step: &'static str) {
        self.step = step;
    }

    /// Adds what was seen at one stage of the step.
    pub fn saw(&mut self, stage: impl Display, seen: Observation) {
        let device = &seen.device;
        let frozen = if device.migration_active { ", frozen" } else { "" };
        let mut guest =
            format!("MemTotal {}, iomem {}", change(seen.base, seen.mem_total), human(seen.iomem));
        let mut api = format!(
            "plugged {}, requested {}{frozen}",
            human(device.plugged_size),
            human(device.requested_size)
        );
        for (text, note) in [(&mut guest, &seen.guest_note), (&mut api, &seen.api_note)] {
            if !note.is_empty() {
                let _ = write!(text, ", {note}");
            }
        }
        self.add(stage, guest, api, human(seen.host), seen.problems);
    }

    /// Adds a stage that could not be brought to its end.
    pub fn failed(&mut self, stage: impl Display, reason: String) {
        let none = || "-".to_owned();
        self.add(stage, none(), none(), none(), vec![reason]);
    }

    /// Whether no row has a problem.
    pub fn passed(&self) -> bool {
        !self.rows.is_empty() && self.failures() == 0
    }

    /// How many rows have problems.
    pub fn failures(&self) -> usize {
        self.rows.iter().filter(|row| !row.problems.is_empty()).count()
    }

    /// Adds a stage in words.
    pub fn add(
        &mut self,
        stage: impl Display,
        guest: String,
        api: String,
        host: String,
        problems: Vec<String>,
    ) {
        let row = Row { step: format!("{}: {stage}", self.step), guest, api, host, problems };
        eprintln!("real-guest: {} ... {}", row.step, row.verdict());
        self.rows.push(row);
    }
}

impl Row {
    fn verdict(&self) -> String {
        match self.problems.as_slice() {
            [] => "ok".to_owned(),
            problems => format!("FAILED: {}", problems.join("; ")),
        }
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let heading = ["step", "guest saw", "API said", "resident", "verdict"].map(str::to_owned);
        let lines: Vec<[String; 5]> = std::iter::once(heading)
            .chain(self.rows.iter().map(|row| {
                let Row { step, guest, api, host, .. } = row;
                [step.clone(), guest.clone(), api.clone(), host.clone(), row.verdict()]
            }))
            .collect();
        let mut widths = [0; 4];
        for line in &lines {
            for (width, cell) in widths.iter_mut().zip(line) {
                *width = (*width).max(cell.chars().count());
            }
        }
        for [step, guest, api, host, verdict] in &lines {
            let [a, b, c, d] = widths;
            writeln!(f, "{step:a$} | {guest:b$} | {api:c$} | {host:d$} | {verdict}")?;
        }
        let failed = self.failures();
        write!(f, "{} passed, {failed} failed", self.rows.len() - failed)
    }
}
