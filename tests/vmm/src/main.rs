//! `small-vmm`: the demonstration, and the VMM process in it.

use std::io::{stdin, stdout};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use test_vmm::demo::{self, parse_size};
use test_vmm::guest;

/// A small VMM for a vhost-user memory device.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show how a guest grows and shrinks, and what the host holds for it.
    Demo {
        /// The daemon; beside this program unless given.
        #[arg(long, value_name = "PATH")]
        daemon: Option<PathBuf>,
        /// How much the guest may grow by.
        #[arg(long, value_name = "SIZE", default_value = "8G", value_parser = parse_size)]
        region_size: u64,
    },
    /// Run a guest that takes its commands from the standard input.
    #[command(hide = true)]
    Guest {
        #[arg(long)]
        socket: PathBuf,
        #[arg(long, value_parser = parse_size)]
        addr: u64,
        #[arg(long, value_parser = parse_size)]
        region_size: u64,
    },
}

fn main() -> ExitCode {
    let right = match Args::parse().command {
        Command::Demo { daemon, region_size } => demo::run(daemon, region_size),
        Command::Guest { socket, addr, region_size } => {
            guest::run(&socket, addr, region_size, stdin().lock(), stdout().lock()).map(|()| true)
        }
    };
    match right {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("small-vmm: {error:#}");
            ExitCode::FAILURE
        }
    }
}
