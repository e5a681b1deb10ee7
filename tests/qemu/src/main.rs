//! Boots a real Linux on a stock QEMU, with the daemon as its virtio-mem device, and proves that
//! what the device says is what the guest sees and what the host pays for.

mod api;
mod daemon;
mod guest;
mod initramfs;
mod machine;
mod options;
mod process;
mod provision;
mod qemu;
mod qmp;
mod relay;
mod report;
mod run;
mod sizes;
mod steps;
mod vhost_message;
mod wait;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use options::Options;

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
    let kit = provision::provide(&options.cache_dir()?, options.mirror.as_deref())?;
    let daemon = options.daemon()?;
    let folder = options.work_folder()?;
    let report = run::all(&kit, &daemon, options, folder.path())?;
    println!("{report}");
    folder.close()?;
    Ok(report.passed())
}
