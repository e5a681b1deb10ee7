//! `small-vmm`: the demonstration, the VMM process in it, and the soak.

use std::io::{stdin, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand, value_parser};
use small_vmm::demo::{self, DemoOptions, Parts, parse_size};
use small_vmm::guest::{self, GuestOptions};
use small_vmm::machine::MachineOptions;
use small_vmm::migration::Links;
use small_vmm::soak::{self, SoakOptions};

/// A small VMM for a vhost-user memory device.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show how a guest grows, shrinks and moves, and what the host holds for it.
    Demo {
        /// The daemon; beside this program unless given.
        #[arg(long, value_name = "PATH")]
        daemon: Option<PathBuf>,
        /// How much the guest may grow by.
        #[arg(long, value_name = "SIZE", default_value = "8G", value_parser = parse_size)]
        region_size: u64,
        /// Migrate over TCP instead of a Unix socket.
        #[arg(long)]
        tcp: bool,
        /// Migrate pages over this many channels of their own, 1 to 64.
        #[arg(long, value_name = "N", value_parser = value_parser!(u8).range(1..=64))]
        channels: Option<u8>,
        /// Compress pages on their channels, at a level of 1 (the fastest, unless given) to 20.
        #[arg(long, value_name = "zstd[:LEVEL]", requires = "channels", value_parser = parse_compress)]
        compress: Option<u8>,
        /// Migrate over TLS 1.3, with certificates that are made for this run.
        #[arg(long)]
        tls: bool,
        /// Migrate over TLS 1.3, with the certificates in this folder, under QEMU's names.
        #[arg(long, value_name = "DIR")]
        tls_dir: Option<PathBuf>,
        /// Only show a guest that moves before its memory does.
        #[arg(long)]
        postcopy: bool,
        /// Break the channel of the postcopy migration; both sides recover over a new one.
        #[arg(long)]
        break_channel: bool,
        /// Only show a guest that is saved while it runs, and goes on from the file at once.
        #[arg(long)]
        snapshot: bool,
        /// Only show a guest that grows and shrinks while it moves; with --postcopy, that then moves before its
        /// memory does.
        #[arg(long)]
        resize: bool,
    },
    /// Do everything at random for some minutes, with faults, and look whether what is promised
    /// holds. Ends with status 1 when it does not.
    Soak {
        /// The daemon; beside this program unless given.
        #[arg(long, value_name = "PATH")]
        daemon: Option<PathBuf>,
        /// How long.
        #[arg(long, value_name = "N", default_value_t = 10)]
        minutes: u64,
        /// Choose again what was chosen with this seed.
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Run a guest that takes its commands from the standard input.
    #[command(hide = true)]
    Guest {
        #[arg(long)]
        socket: PathBuf,
        #[arg(long)]
        discard_socket: Option<PathBuf>,
        #[arg(long, value_parser = parse_size)]
        addr: u64,
        #[arg(long, value_parser = parse_size)]
        region_size: u64,
        /// Wait for a guest: unix:PATH, tcp:HOST:PORT, or defer until a command says where.
        #[arg(long, value_name = "ADDRESS")]
        incoming: Option<String>,
        /// Of that guest: how many channels its pages come over, 1 to 64.
        #[arg(long, value_name = "N", value_parser = value_parser!(u8).range(1..=64))]
        channels: Option<u8>,
        /// Of that guest: its pages come compressed; the level is the source's.
        #[arg(long, value_name = "zstd[:LEVEL]", requires = "channels", value_parser = parse_compress)]
        compress: Option<u8>,
        /// Of that guest: the folder with certificates, under QEMU's names.
        #[arg(long, value_name = "DIR")]
        tls_dir: Option<PathBuf>,
        /// Do not let a guest run that came from elsewhere before it is told to.
        #[arg(long)]
        paused: bool,
        /// Send and take the state of devices as this release of QEMU's machine types does.
        #[arg(long, value_name = "LEVEL")]
        compat_level: Option<String>,
    },
}

fn main() -> ExitCode {
    let right = match Args::parse().command {
        Command::Demo {
            daemon,
            region_size,
            tcp,
            channels,
            compress,
            tls,
            tls_dir,
            postcopy,
            break_channel,
            snapshot,
            resize,
        } => {
            let parts = Parts { postcopy, break_channel, snapshot, resize };
            let tls = (tls || tls_dir.is_some()).then_some(tls_dir);
            let channels = channels.map_or(0, usize::from);
            demo::run(&DemoOptions { daemon, region_size, tcp, channels, compress, tls, parts })
        }
        Command::Soak { daemon, minutes, seed } => {
            soak::run(&SoakOptions { daemon, time: Duration::from_secs(60 * minutes), seed })
        }
        Command::Guest {
            socket,
            discard_socket,
            addr,
            region_size,
            incoming,
            channels,
            compress,
            tls_dir,
            paused,
            compat_level,
        } => {
            let machine = MachineOptions {
                socket,
                discard_socket,
                addr,
                region_size,
                incoming: incoming.is_some(),
                paused,
                compat_level,
            };
            let incoming = incoming.filter(|from| from != "defer");
            let channels = channels.map_or(0, usize::from);
            let links = Links { channels, tls_dir, zstd: compress };
            guest::run(GuestOptions { machine, incoming, links }, stdin().lock(), stdout().lock())
                .map(|()| true)
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

/// The level of `zstd`, or of `zstd:LEVEL`.
fn parse_compress(text: &str) -> Result<u8, String> {
    let level = match text.split_once(':') {
        None if text == "zstd" => Some(1),
        Some(("zstd", level)) => level.parse().ok().filter(|level| (1..=20).contains(level)),
        _ => None,
    };
    level.ok_or_else(|| "not zstd, or zstd:LEVEL with a level of 1 to 20".to_owned())
}
