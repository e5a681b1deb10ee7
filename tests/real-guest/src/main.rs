//! The command; see the library.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use real_guest::options::{self, Options};
use real_guest::{provision, run};

fn main() -> ExitCode {
    match prove(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("real-guest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn prove(options: &Options) -> Result<bool> {
    let kit = provision::provide(&options::cache_dir()?, options.mirror.as_deref())?;
    let daemon = options.daemon()?;
    let folder = options.work_folder()?;
    let report = run::all(&kit, &daemon, options, folder.path())?;
    println!("{report}");
    folder.close()?;
    Ok(report.passed())
}
