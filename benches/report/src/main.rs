//! Measures what knowing of discarded and untouched memory saves when a guest is moved, against
//! VMMs that know less, and writes the report: JSON, Markdown, SVG and HTML.

mod case;
mod guest;
mod host;
mod qemu;
mod record;
mod run;
mod side;
mod sweep;
mod tables;
mod units;
mod view;
mod write;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;

use crate::case::Case;
use crate::host::Machine;
use crate::record::{Outcome, Record};
use crate::sweep::Profile;
use crate::units::size;
use crate::write::Report;

/// Measures what discard-aware migration saves, and writes the report.
#[derive(Parser)]
struct Options {
    /// Sweep one dimension at a time on small regions: minutes instead of hours
    #[arg(long)]
    quick: bool,
    /// Folder for the report, and for snapshots while they are measured
    #[arg(long, value_name = "DIR", default_value = "target/savings-report")]
    out: PathBuf,
    /// Put the small table and its chart into the README of the workspace
    #[arg(long)]
    update_readme: bool,
    /// Compare with a stock QEMU, which is brought if there is none (Debian, root)
    #[arg(long)]
    with_qemu: bool,
}

fn main() -> ExitCode {
    match report(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("savings-report: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every case that ran can be trusted.
fn report(options: &Options) -> Result<bool> {
    let profile = if options.quick { Profile::Quick } else { Profile::Full };
    std::fs::create_dir_all(&options.out)
        .with_context(|| format!("cannot create {}", options.out.display()))?;
    let begin = Instant::now();
    let machine = Machine::here()?;
    let qemu = qemu::compare(options.with_qemu, &options.out);
    let records = measure(profile, options);
    let report = Report { profile, machine, records, qemu };
    let page = write::write(&report, &options.out)?;
    if options.update_readme {
        write::update_readme(&report, &Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."))?;
    }
    println!("{}", write::summary(&report));
    println!("{} in {:.0} s", page.display(), begin.elapsed().as_secs_f64());
    Ok(report.can_be_trusted())
}

fn measure(profile: Profile, options: &Options) -> Vec<Record> {
    let cases = profile.cases();
    let all = cases.len();
    let measure = |(number, case): (usize, Case)| {
        let outcome = outcome(&case, profile, options);
        let told = match &outcome {
            Outcome::Measured(figures) => format!(
                "{} in {}{}",
                size(figures.wire),
                units::time(figures.total),
                if figures.agrees == Some(false) { ", COUNTS DIFFER" } else { "" }
            ),
            Outcome::NotRun(reason) | Outcome::Failed(reason) => reason.clone(),
        };
        eprintln!("{:>4}/{all} {case}: {told}", number + 1);
        Record { case, outcome }
    };
    cases.into_iter().enumerate().map(measure).collect()
}

fn outcome(case: &Case, profile: Profile, options: &Options) -> Outcome {
    // The rest is for whoever else is on the machine.
    let room = host::available_memory().unwrap_or(0) / 4 * 3;
    if case.moved() > profile.limit() {
        return Outcome::NotRun(format!("not run (would move {})", size(case.moved())));
    }
    if case.read() > profile.limit() {
        return Outcome::NotRun(format!("not run (would read {})", size(case.read())));
    }
    if case.memory() > room {
        return Outcome::NotRun(format!("not run (would take {} of memory)", size(case.memory())));
    }
    match run::run(case, &options.out) {
        Ok(figures) => Outcome::Measured(Box::new(figures)),
        Err(error) => Outcome::Failed(format!("failed: {error:#}")),
    }
}
