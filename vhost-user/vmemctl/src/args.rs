//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};
use program::duration::parse_duration;
use program::size::{SizeError, parse_size};

use super::ui;

/// Resizes and observes a virtio-mem device, and inspects migration streams.
///
/// Speaks to a running vhost-user-mem over its management socket; `inspect` reads a file and needs
/// no daemon. Sizes are plain numbers, 0x-hex, or have a suffix K, M, G or T (powers of 1024).
///
/// Exit status: 0 done, 1 failed, 2 wrong usage, 3 `resize --wait` timed out.
#[derive(Debug, Parser)]
#[command(name = "vmemctl", version, max_term_width = 100)]
pub struct Args {
    /// Management socket of the daemon, as in its own --api-socket
    #[arg(long, value_name = "PATH", global = true)]
    pub api_socket: Option<PathBuf>,

    /// Print JSON, errors included
    #[arg(long, global = true)]
    pub json: bool,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the device
    Status,

    /// Ask the guest to plug this much
    Resize {
        /// A multiple of the block size, at most the region size
        #[arg(value_name = "SIZE", value_parser = parse_size_argument, allow_negative_numbers = true)]
        size: u64,

        /// Wait until the guest has done it
        #[arg(long)]
        wait: bool,

        /// Wait no longer than this: 30s, 2m, 1h, or seconds
        #[arg(long, value_name = "T", requires = "wait", value_parser = parse_duration)]
        timeout: Option<Duration>,

        /// Ask for this much more, or less, at a time, and go on when the guest has done it: for a
        /// guest that cannot digest all of it at once. Rounded down to blocks. When this command ends
        /// early, the guest is left with the size that it was asked for last
        #[arg(long, value_name = "SIZE", requires = "wait", value_parser = parse_step)]
        step: Option<u64>,

        /// Go on no faster than this many bytes a second, in steps of a second's worth or of --step
        #[arg(long, value_name = "RATE", requires = "wait", value_parser = parse_step)]
        max_rate: Option<u64>,
    },

    /// Draw the region: what is plugged, resident and discarded
    Blocks,

    /// Unplug and discard everything, as a reset of the virtual machine does
    SystemReset,

    /// Discard what the guest has in memory that it has not plugged
    Sweep,

    /// Have the daemon log more, or less, from now on, until it ends
    LogLevel {
        /// off, error, warn, info, debug or trace; or a list of them and of TARGET=LEVEL
        #[arg(value_name = "LEVEL")]
        level: String,
    },

    /// Print changes as they happen
    Watch,

    /// Show the device in a browser
    ///
    /// Serves the daemon's page on a loopback address, and prints the address to open. It has a secret
    /// token in it; without that, nothing of the device is shown. The page changes nothing: only what it
    /// reads is passed on to the daemon, and requests that other web pages make are refused.
    Ui {
        /// Serve it here; port 0 is any that is free
        #[arg(long, value_name = "ADDRESS:PORT", default_value_t = ui::LISTEN,
            value_parser = ui::parse_listen)]
        listen: SocketAddr,
    },

    /// Look for what would keep a guest from its memory, and say what to change
    ///
    /// Of the host: what addresses it has, memory and how it is handed out, huge pages, rights. With
    /// --api-socket, of the region of a running daemon and how its guest does; with --addr and
    /// --region-size, of a planned one. Run it as the user who runs the daemon. The exit status is 1
    /// when there is a problem; warnings do not change it.
    Doctor {
        /// Guest-physical address of the region, as for the daemon
        #[arg(long, value_name = "GPA", requires = "region_size", value_parser = parse_size_argument)]
        addr: Option<u64>,

        /// Size of the region, as for the daemon
        #[arg(long, value_name = "SIZE", requires = "addr", value_parser = parse_size_argument)]
        region_size: Option<u64>,

        /// Size of a block, as for the daemon
        #[arg(long, value_name = "SIZE", requires = "addr", value_parser = parse_size_argument)]
        block_size: Option<u64>,

        /// Bits of a physical address of the guest's CPU, where that is known
        #[arg(long, value_name = "BITS", value_parser = clap::value_parser!(u32).range(32..=64))]
        guest_phys_bits: Option<u32>,

        /// Size of a memory block of the guest: /sys/devices/system/memory/block_size_bytes there,
        /// which is hexadecimal
        #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = parse_step)]
        guest_memory_block: u64,

        /// The file behind the region, or the directory where it is to be; /proc/PID/fd/N of a VMM
        /// works, too
        #[arg(long, value_name = "PATH")]
        memory_file: Option<PathBuf>,

        /// Look at the host below this directory
        #[arg(long, value_name = "DIR", hide = true)]
        root: Option<PathBuf>,
    },

    /// Show what a migration stream in a file holds
    ///
    /// Reads what this project writes and what QEMU's `migrate file:...` does, with and without
    /// mapped-ram: RAM blocks with their normal, zero and absent pages, the state of devices field
    /// by field, and what is plugged of virtio-mem devices. Warns when pages lie in discarded
    /// memory. A damaged file is shown up to where it ends, and then the exit status is 1.
    Inspect {
        /// The file
        #[arg(value_name = "FILE")]
        file: PathBuf,

        /// Memory of a Firecracker snapshot, of which FILE is the state. Given more than once: the full
        /// snapshot first, then the diffs in the order in which they were made
        #[arg(long, value_name = "FILE")]
        memory_file: Vec<PathBuf>,
    },

    /// Print a completion script
    Completions {
        /// The shell to complete in
        shell: clap_complete::Shell,
    },

    /// Print the manual, or write its pages to a directory
    Man {
        /// Where to write vmemctl.1 and a page for each command
        #[arg(value_name = "DIR")]
        dir: Option<PathBuf>,
    },
}

impl Command {
    /// Whether the command is about a running daemon.
    pub fn needs_daemon(&self) -> bool {
        !matches!(
            self,
            Self::Doctor { .. }
                | Self::Inspect { .. }
                | Self::Completions { .. }
                | Self::Man { .. }
        )
    }
}

fn parse_size_argument(text: &str) -> Result<u64, SizeError> {
    parse_size(text)
}

fn parse_step(text: &str) -> Result<u64, String> {
    match parse_size(text) {
        Ok(0) => Err("must be more than 0".to_owned()),
        Ok(size) => Ok(size),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn json_goes_before_and_after_the_command() {
        for words in [
            ["vmemctl", "--json", "--api-socket", "s", "status"],
            ["vmemctl", "--api-socket", "s", "status", "--json"],
            ["vmemctl", "status", "--json", "--api-socket", "s"],
        ] {
            let args = Args::try_parse_from(words).unwrap();
            assert!(args.json && args.api_socket.is_some());
        }
    }
}
