//! A guest is written to a file while it runs, and goes on from there in another VMM before its
//! memory has been read.
//!
//! Its vCPUs only look at their memory over there until it was compared with that of a third VMM,
//! which reads the whole file before anything runs. What the vCPUs look for is what they had
//! written at the instant of the snapshot.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, ensure};

use super::host::{Host, Sizes, TIMEOUT};
use super::show::{human, latency, print_rows};
use super::{compare, progress};
use crate::guest::Command;
use crate::memory::PAGE_SIZE;
use crate::migration::MigrationReport;

/// What came of it.
struct Outcome {
    sizes: Sizes,
    saved: MigrationReport,
    restored: MigrationReport,
    /// What the file takes on its disk.
    file: u64,
    /// What was resident of the region: at the source before and after, at the destination.
    resident: [u64; 3],
}

/// Runs it; everything that was wrong.
pub(super) fn run(daemon: &Path, region: u64) -> anyhow::Result<Vec<String>> {
    let start = Instant::now();
    let sizes = Sizes::of_region(region);
    println!(
        "A guest of {} with {} plugged and {} written is saved to a file while its vCPUs keep \
         writing, and goes on from there at once in another VMM.\n",
        human(region),
        human(sizes.plugged),
        human(sizes.touched),
    );
    let mut from = Host::with_guest(daemon, sizes)?;
    let before = from.resident()?;
    let file = from.daemon.socket().with_file_name("snapshot");
    from.vmm.tell(Command::Snapshot { file: file.clone(), background: true })?;
    let saved = progress::follow(&mut from.vmm, "snapshot", |_, _| Ok(()))?;
    ensure!(saved.status == "completed", "the snapshot {}: {:?}", saved.status, saved.error_desc);
    from.vmm.verify(2 * sizes.touched / PAGE_SIZE, TIMEOUT).context("the guest that was saved")?;

    let mut to = Host::waiting(daemon, sizes, false)?;
    to.vmm.tell(Command::ReadOnly { on: true })?;
    to.vmm.tell(Command::Restore { file: file.clone(), lazy: true })?;
    let mut looked = false;
    let restored = progress::follow(&mut to.vmm, "restore", |to, report| {
        if !looked && report.faults.is_some() {
            let (offset, size) = sizes.gap();
            to.tell(Command::Look { offset, size })?;
            looked = true;
        }
        Ok(())
    })?;
    let status = &restored.status;
    ensure!(status == "completed", "the restore {status}: {:?}", restored.error_desc);
    to.vmm.verify(2 * sizes.touched / PAGE_SIZE, TIMEOUT).context("the guest that was restored")?;

    let mut whole = Host::waiting(daemon, sizes, true)?;
    whole.vmm.tell(Command::Restore { file: file.clone(), lazy: false })?;
    let read = whole.vmm.wait_migration(TIMEOUT)?;
    ensure!(read.status == "completed", "the second restore: {:?}", read.error_desc);
    let (compared, mut wrong) = compare::memory(&mut whole.vmm, &mut to.vmm)?;
    for other in [&from, &whole] {
        wrong.extend(compare::devices(&other.daemon.api(), &to.daemon.api())?);
    }
    let resident = [before, from.resident()?, to.resident()?];
    let file = fs::metadata(&file)?.blocks() * 512;
    let outcome = Outcome { sizes, saved, restored, file, resident };
    to.go_on(sizes)?;
    outcome.check(looked, &mut wrong);
    outcome.print_table();
    println!(
        "\nThe vCPUs found every page as it was at the instant of the snapshot. Memory ({} that \
         either side holds) is the file's bit by bit, block state and configuration are the \
         guest's ({:.1} s).",
        human(compared),
        start.elapsed().as_secs_f64()
    );
    for host in [from, to, whole] {
        wrong.extend(host.end()?);
    }
    Ok(wrong.into_iter().map(|line| format!("snapshot: {line}")).collect())
}

impl Outcome {
    /// Checks what must be so, whatever the guest was doing.
    fn check(&self, looked: bool, wrong: &mut Vec<String>) {
        let Sizes { region, plugged, touched } = self.sizes;
        let mut is = |what: &str, found: u64, low: u64, high: u64| {
            if found < low || found > high {
                wrong.push(format!("{what}: {found}, not {low} to {high}"));
            }
        };
        let saved = self.saved.ram;
        let discarded = (region - plugged) / PAGE_SIZE;
        is("discarded", saved.discarded, discarded, discarded);
        is("pages saved", saved.normal, touched / PAGE_SIZE, u64::MAX);
        is(
            "room for the file",
            self.file,
            touched,
            touched + touched / 4 + crate::machine::BOOT_SIZE,
        );
        let faults = self.restored.faults.unwrap_or_default();
        is("pages of zeros", faults.zero, 0, Sizes::GAP / PAGE_SIZE);
        let [before, after, arrived] = self.resident;
        is("resident before", before, touched, touched);
        is("resident after", after, touched, touched);
        // A guest that has looked at the gap has memory for it.
        let there = touched + if looked { Sizes::GAP } else { 0 };
        is("resident after the restore", arrived, there, there);
    }

    fn print_table(&self) {
        let Self { saved, restored, resident, .. } = self;
        let faults = restored.faults.unwrap_or_default();
        print_rows(
            "snapshot",
            &[
                ("status", saved.status.clone()),
                ("bytes written", human(saved.ram.transferred)),
                ("room on disk", human(self.file)),
                ("pages discarded, not saved", saved.ram.discarded.to_string()),
                ("pages never touched, not saved", saved.ram.holes.to_string()),
                ("pages saved", saved.ram.normal.to_string()),
                ("writes that waited", saved.write_faults.to_string()),
                ("total time", format!("{:.2} s", saved.total_time / 1000.0)),
                ("downtime", format!("{:.0} ms", saved.downtime.unwrap_or_default())),
                ("resident before", human(resident[0])),
                ("resident after", human(resident[1])),
            ],
        );
        println!();
        print_rows(
            "lazy restore",
            &[
                ("status", restored.status.clone()),
                ("pages asked for by faults", faults.asked.to_string()),
                ("pages of zeros on the spot", faults.zero.to_string()),
                ("a fault takes, half of them", latency(faults.p50)),
                ("a fault takes, 99 of 100", latency(faults.p99)),
                ("until all is read", format!("{:.2} s", restored.total_time / 1000.0)),
                ("resident", human(resident[2])),
            ],
        );
    }
}
