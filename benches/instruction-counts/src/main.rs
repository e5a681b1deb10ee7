//! Counts the instructions of the hot paths under callgrind, and compares them with a stored
//! baseline: times of a shared machine are noise, and these are not.
//!
//! The program runs itself again for each path. What a path needs is set up there uncounted; only
//! the work inside [`counted::counted`] is counted, and divided by the pages, ranges or requests
//! that it was for. What the kernel does is not counted.
//!
//! Counted parts run in one thread, and do not depend on the time. Callgrind shows programs a
//! processor of its own, the same on every host with AVX2, so that neither the library nor libc
//! chooses its instructions by the machine. What is left is the compiler, which is pinned, and
//! the version of libc: its copies and fills come to a few percent at most, its allocator to a third
//! where small pieces are taken and given back (`receive/every-other-page`).

mod callgrind;
mod compare;
mod counted;
mod figure;
mod measure;
mod paths;
mod table;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;

use crate::compare::compare;
use crate::figure::Figures;
use crate::measure::measure;
use crate::paths::{HotPath, PATHS};

/// Counts the instructions of the hot paths, and compares them with the baseline
#[derive(Parser)]
struct Options {
    /// Only the paths whose names contain this
    #[arg(value_name = "NAME", conflicts_with = "update")]
    only: Option<String>,
    /// Make what is counted now the baseline
    #[arg(long)]
    update: bool,
    /// How far above the baseline a path may be, percent
    #[arg(long, value_name = "PERCENT", default_value_t = 25)]
    bound: u8,
    /// Leave the profiles in this folder, for callgrind_annotate
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Do the work of one path, and print how many units it was
    #[arg(long, value_name = "PATH", hide = true)]
    run: Option<String>,
}

impl Options {
    fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| name.contains(only.as_str()))
    }
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("instruction-counts: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all is well.
fn run(options: &Options) -> Result<bool> {
    if let Some(name) = &options.run {
        let path = PATHS.iter().find(|path| path.name == name);
        println!("{}", (path.with_context(|| format!("no path {name:?}"))?.run)()?);
        return Ok(true);
    }
    ensure!(!cfg!(debug_assertions), "the baseline is of optimised code: run with --release");
    callgrind::check()?;
    let now = count(options)?;
    if !is_comparable() {
        table::print(&now);
        println!("Not compared: the baseline is of x86-64 with AVX2, which this machine is not.");
        return Ok(!options.update);
    }
    let file = figure::baseline_path();
    if options.update {
        table::print(&now);
        figure::write(&file, &now)?;
        return Ok(true);
    }
    let mut baseline = figure::read(&file)?;
    baseline.retain(|name, _| options.wants(name));
    let comparisons = compare(&baseline, &now, f64::from(options.bound) / 100.0);
    table::print_compared(&comparisons);
    let wrong = comparisons.iter().filter(|comparison| comparison.verdict.is_error()).count();
    if wrong != 0 {
        let all = comparisons.len();
        eprintln!(
            "instruction-counts: {wrong} of {all} paths are not as the baseline has them; \
             benches/instruction-counts/README.md says what to do"
        );
    }
    Ok(wrong == 0)
}

/// Counts the paths that are wanted.
fn count(options: &Options) -> Result<Figures> {
    let paths: Vec<&HotPath> = PATHS.iter().filter(|path| options.wants(path.name)).collect();
    ensure!(!paths.is_empty(), "no path has such a name");
    let Some(dir) = &options.keep else { return measure(&paths, tempfile::tempdir()?.path()) };
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    measure(&paths, dir)
}

/// Whether the baseline says anything about this machine.
fn is_comparable() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx2");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}
