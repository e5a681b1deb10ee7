//! Has QEMU's `scripts/analyze-migration.py` read what this project writes.
//!
//! The script comes from Debian's source package of QEMU, into a temporary folder, and is not
//! kept. What it prints is compared with what our own inspection reads, and the memory that it
//! extracts with that of the guest.

mod compare;
mod files;
mod script;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use script::Script;

/// The exit status when there is no script to run: no network, or no apt.
const COULD_NOT_RUN: u8 = 77;

/// Has QEMU's scripts/analyze-migration.py read what this project writes.
#[derive(Parser)]
struct Options {
    /// The script; Debian's when not given
    #[arg(long, value_name = "PATH")]
    script: Option<PathBuf>,
    /// Debian archive to fetch it from; the host's own when not given
    #[arg(long, value_name = "URL")]
    mirror: Option<String>,
}

fn main() -> ExitCode {
    match prove(&Options::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("qemu-analyzer: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn prove(options: &Options) -> Result<ExitCode> {
    let folder = tempfile::Builder::new().prefix("qemu-analyzer-").tempdir()?;
    let script = match &options.script {
        Some(path) => Script::at(path, "that was given")?,
        None => match Script::fetch(folder.path(), options.mirror.as_deref()) {
            Ok(script) => script,
            Err(error) => {
                eprintln!("qemu-analyzer: could not run, there is no script: {error:#}");
                return Ok(ExitCode::from(COULD_NOT_RUN));
            }
        },
    };
    println!("analyze-migration.py of QEMU {}", script.version);
    let mut failed = false;
    for written in files::write_all(folder.path())? {
        let what = written.what;
        if written.mapped_ram && !script.knows_mapped_ram {
            println!("{what}: not read, since the script of this version does not know mapped-ram");
            continue;
        }
        let place = folder.path().join("extracted");
        std::fs::create_dir_all(&place)?;
        match compare::compare(&script, &written, &place) {
            Ok(values) => println!("{what}: {values} values and all memory are alike"),
            Err(error) => {
                failed = true;
                println!("{what}: {error:#}");
            }
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
