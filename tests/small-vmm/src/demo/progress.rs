//! A migration as it goes on: a bar on a terminal, lines elsewhere.

use std::io::{IsTerminal, stderr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use indicatif::{ProgressBar, ProgressStyle};

use super::MIB;
use super::show::human;
use crate::migration::MigrationReport;
use crate::process::Vmm;

const TIMEOUT: Duration = Duration::from_secs(120);
const STEP: Duration = Duration::from_millis(50);
/// Between two lines where there is no terminal.
const LINES: Duration = Duration::from_millis(1000);

/// Shows the migration that a VMM has begun until it has ended. Whenever something is known of it,
/// `react` may do something about it.
pub(super) fn follow(
    vmm: &mut Vmm,
    name: &str,
    mut react: impl FnMut(&mut Vmm, &MigrationReport) -> anyhow::Result<()>,
) -> anyhow::Result<MigrationReport> {
    let bar = if stderr().is_terminal() { ProgressBar::new(1) } else { ProgressBar::hidden() };
    let template = format!("{name:<14} {{bar:40}} {{msg}}");
    bar.set_style(ProgressStyle::with_template(&template)?.progress_chars("█▌·"));
    let start = Instant::now();
    let mut next_line = start;
    let report = loop {
        let report = vmm.migration()?;
        let ram = report.ram;
        bar.set_length(ram.total.max(1));
        bar.set_position(ram.total.saturating_sub(ram.remaining));
        let message = line(&report);
        let began = report.status != "none";
        if bar.is_hidden() && (report.over || began && Instant::now() >= next_line) {
            println!("{name:<14} {message}");
            next_line = Instant::now() + LINES;
        }
        bar.set_message(message);
        if report.over {
            break report;
        }
        react(vmm, &report)?;
        ensure!(start.elapsed() < TIMEOUT, "the migration still runs after {TIMEOUT:?}");
        thread::sleep(STEP);
    };
    bar.abandon();
    println!();
    Ok(report)
}

/// What is known of a migration, in a line.
fn line(report: &MigrationReport) -> String {
    let ram = report.ram;
    let mut line = format!(
        "{}, round {}: {} sent, {} left, {} written a second",
        report.status,
        ram.dirty_sync_count,
        human(ram.transferred / MIB * MIB),
        human(ram.remaining / MIB * MIB),
        human(ram.dirty_pages_rate * 4096 / MIB * MIB),
    );
    match report.expected_time_left {
        Some(time) => line.push_str(&format!(", done in {:.1} s", time / 1000.0)),
        None if report.status == "active" && ram.dirty_sync_count > 1 => {
            line.push_str(", does not converge");
        }
        None => {}
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::RamReport;

    #[test]
    fn a_line_says_how_long_it_still_takes_or_that_it_does_not_converge() {
        let ram = RamReport {
            transferred: 5 * MIB + 7,
            remaining: 3 << 20,
            dirty_sync_count: 2,
            dirty_pages_rate: 256,
            ..RamReport::default()
        };
        let (status, expected_time_left) = ("active".to_owned(), Some(1234.5));
        let mut report =
            MigrationReport { status, expected_time_left, ram, ..MigrationReport::default() };
        let known = "active, round 2: 5M sent, 3M left, 1M written a second";
        assert_eq!(line(&report), format!("{known}, done in 1.2 s"));
        report.expected_time_left = None;
        assert_eq!(line(&report), format!("{known}, does not converge"));
        report.ram.dirty_sync_count = 1;
        assert_eq!(line(&report), known.replace("round 2", "round 1"));
    }
}
