//! Measures what knowing of discarded and untouched memory saves when a guest is moved, against
//! VMMs that know less, and writes the report: JSON, Markdown, SVG and HTML.

mod case;
mod content;
mod guest;
mod host;
mod journal;
mod link;
mod measure;
mod qemu;
mod record;
mod run;
mod side;
mod statistics;
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

use crate::host::Machine;
use crate::journal::{Head, Journal};
use crate::qemu::Comparison;
use crate::sweep::Profile;
use crate::write::Report;

/// Measures what discard-aware migration saves, and writes the report.
#[derive(Parser)]
struct Options {
    /// Sweep one dimension at a time on small regions: minutes instead of an hour or two
    #[arg(long)]
    quick: bool,
    /// Folder for the report, and for snapshots while they are measured
    #[arg(long, value_name = "DIR", default_value = "target/savings-report")]
    out: PathBuf,
    /// Go on with a report that was interrupted, as the journal in its folder has it
    #[arg(long)]
    resume: bool,
    /// Put the small table and its chart into the README of the workspace
    #[arg(long)]
    update_readme: bool,
    /// Compare with a stock QEMU, which is brought if there is none (Debian, root)
    #[arg(long)]
    with_qemu: bool,
    /// Compare only what vmem-pager does with what a stock QEMU does itself
    #[arg(long, conflicts_with_all = ["quick", "resume", "with_qemu"])]
    only_pager: bool,
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
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    if options.only_pager {
        let paged = qemu::compare_pager(&options.out)?;
        if options.update_readme {
            write::update_readme_pager(&paged, &root)?;
        }
        println!("{}", write::pager(&paged));
        return Ok(true);
    }
    let begin = Instant::now();
    let machine = Machine::here()?;
    let head = Head::new(profile, machine.clone())?;
    let open = if options.resume { Journal::resume } else { Journal::create };
    let mut journal = open(&options.out, &head)?;
    let qemu = compare(options, &mut journal)?;
    let records = measure::all(profile, &mut journal, &options.out)?;
    let report = Report { profile, machine, records, qemu };
    let page = write::write(&report, &options.out)?;
    if options.update_readme {
        write::update_readme(&report, &root)?;
    }
    println!("{}", write::summary(&report));
    println!("{} in {:.0} s", page.display(), begin.elapsed().as_secs_f64());
    Ok(report.can_be_trusted())
}

/// Compares with QEMU, if that is wanted and not in the journal.
fn compare(options: &Options, journal: &mut Journal) -> Result<Comparison> {
    if let Some(found) = journal.found_qemu() {
        return Ok(found.clone());
    }
    if !options.with_qemu {
        return Ok(Comparison::NotRun("--with-qemu was not given".to_owned()));
    }
    let comparison = qemu::compare(&options.out);
    // Of what did not come about another attempt may be made.
    if comparison.measured().is_some() {
        journal.add_qemu(&comparison)?;
    }
    Ok(comparison)
}
