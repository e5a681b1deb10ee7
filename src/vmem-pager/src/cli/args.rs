//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use program::access::parse_mode;
use program::duration::parse_duration;
use program::log::Format;
use program::size::{SizeError, parse_size};

use crate::cloud_hypervisor::edit::Edit;
use crate::socket::Address;

/// Saves a guest of a stock VMM to an image, and restores it within milliseconds.
///
/// Speaks the migration protocols that VMMs have; nothing in them is changed. An image is one file in
/// QEMU's mapped-ram layout, which stock QEMU loads, too, and `vmemctl inspect` shows.
///
/// Exit status: 0 all memory is saved, or with the VMM, 1 failed, 2 wrong usage, 3 timed out.
#[derive(Debug, Parser)]
#[command(name = "vmem-pager", version, max_term_width = 100)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Save a running guest to an image
    ///
    /// Is the destination of the VMM's migration: `migrate unix:PATH` of QEMU, plain, multifd or
    /// postcopy, and `send-migration destination_url=unix:PATH,local=on` of Cloud Hypervisor. Until the image is whole and on the disk, a failure of any kind leaves the guest
    /// running at its source, and nothing under the image's name; once QEMU has begun postcopy, paused there until this
    /// is run again with --recover.
    Save(SaveArgs),

    /// Restore a guest from an image
    ///
    /// Is the source of the VMM's migration: `-incoming defer` and `migrate-incoming unix:PATH` of QEMU
    /// with the capabilities postcopy-ram and postcopy-preempt, and `receive-migration
    /// receiver_url=unix:PATH,memory_mode=postcopy` of Cloud Hypervisor. The guest runs at once, and its memory
    /// arrives as it is touched.
    ///
    /// Of Firecracker it is the page-fault handler: it listens on --socket, which is the backend_path of
    /// `PUT /snapshot/load` with the backend_type Uffd. --image is the snapshot's state file.
    Restore(RestoreArgs),

    /// Hand a guest over from one Cloud Hypervisor to another on this host, without a copy
    ///
    /// Start the new one with `receive-migration receiver_url=unix:TO`, then this, and then have the old one
    /// `send-migration destination_url=unix:PATH,local=on`. If the new one fails, the old one continues.
    Handover(HandoverArgs),
}

impl Command {
    /// What happens is told as lines of JSON.
    pub fn json(&self) -> bool {
        match self {
            Self::Save(args) => args.common.json,
            Self::Restore(args) => args.common.json,
            Self::Handover(args) => args.json,
        }
    }

    /// Who may connect, and how it is told what goes wrong.
    pub fn service(&self) -> &ServiceArgs {
        match self {
            Self::Save(args) => &args.common.service,
            Self::Restore(args) => &args.common.service,
            Self::Handover(args) => &args.service,
        }
    }

    /// Whether this is the second process of a restore.
    pub fn is_worker(&self) -> bool {
        matches!(self, Self::Restore(args) if args.worker)
    }

    /// How long it may take.
    pub fn timeout(&self) -> Option<Duration> {
        match self {
            Self::Save(args) => args.common.timeout,
            Self::Restore(args) => args.common.timeout,
            Self::Handover(args) => args.timeout,
        }
    }

    /// How this process confines itself.
    pub fn sandbox(&self) -> &sandbox::Options {
        match self {
            Self::Save(args) => &args.common.sandbox,
            Self::Restore(args) => &args.common.sandbox,
            Self::Handover(args) => &args.sandbox,
        }
    }
}

/// The VMMs that a guest can be saved of and restored to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Vmm {
    /// QEMU 11 or newer.
    Qemu,
    /// Cloud Hypervisor 53 or newer.
    CloudHypervisor,
    /// Firecracker, of which guests are restored.
    Firecracker,
}

/// What both commands have.
#[derive(Clone, Debug, clap::Args)]
pub struct Common {
    /// Where the guest runs, or is to run
    #[arg(long, value_name = "VMM")]
    pub vmm: Vmm,

    /// Where VMM and pager meet: a path, unix:PATH, or tcp:HOST:PORT. `save` listens there, `restore`
    /// connects; of Firecracker, `restore` listens
    #[arg(long, value_name = "SOCKET")]
    pub socket: Address,

    /// The image
    #[arg(long, value_name = "FILE")]
    pub image: PathBuf,

    /// QEMU's control socket: has the pager set capabilities and start the migration itself
    #[arg(long, value_name = "PATH")]
    pub qmp: Option<PathBuf>,

    /// Serve OpenMetrics on this Unix socket
    #[arg(long, value_name = "PATH")]
    pub metrics_socket: Option<PathBuf>,

    /// Who may connect, and how it is told what goes wrong.
    #[command(flatten)]
    pub service: ServiceArgs,

    /// Print a JSON object a line of what happens, errors included
    #[arg(long)]
    pub json: bool,

    /// Give up after this long: 30s, 2m, 1h, or seconds. What a VMM is silent for is bounded in any case,
    /// what it takes to connect only by this
    #[arg(long, value_name = "T", value_parser = parse_duration)]
    pub timeout: Option<Duration>,

    /// How this process confines itself.
    #[command(flatten)]
    pub sandbox: sandbox::Options,
}

/// What all commands have that one has that is a service.
#[derive(Clone, Debug, clap::Args)]
pub struct ServiceArgs {
    /// Permissions of all sockets that it listens on, octal, whatever the umask
    #[arg(long, value_name = "MODE", default_value = "0600", allow_hyphen_values = true, value_parser = parse_mode)]
    pub socket_mode: u32,

    /// Group of all sockets that it listens on, a name or a number [default: the group of the process]
    #[arg(long, value_name = "GROUP", overrides_with = "socket_group")]
    pub socket_group: Option<String>,

    /// Tell what goes wrong as a log, text or JSON, with time and level; otherwise it is told as commands do
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<Format>,
}

/// The command line of `save`.
#[derive(Clone, Debug, clap::Args)]
pub struct SaveArgs {
    /// What both commands have.
    #[command(flatten)]
    pub common: Common,

    /// Have Cloud Hypervisor end before the image is written: shorter, but a pager that fails before the
    /// image is whole loses the guest
    #[arg(long)]
    pub ack_early: bool,

    /// Go on with a save whose pager died, or whose channel broke, in postcopy: the QEMU that has the guest is in
    /// postcopy-paused
    #[arg(long, conflicts_with = "ack_early")]
    pub recover: bool,
}

/// The command line of `restore`.
#[derive(Clone, Debug, clap::Args)]
pub struct RestoreArgs {
    /// What both commands have.
    #[command(flatten)]
    pub common: Common,

    /// Send all memory before the guest runs
    #[arg(long)]
    pub eager: bool,

    /// Memory of the guest, where the VMM has it in a file of its own (Firecracker). Given more than once:
    /// the full snapshot first, then the diff snapshots after it, in the order in which they were made.
    /// None of them is written
    #[arg(long, value_name = "FILE")]
    pub memory_file: Vec<PathBuf>,

    /// Write the order in which the guest touches its memory to this file. Of Cloud Hypervisor, what the guest
    /// touches before Cloud Hypervisor has asked for it on its own
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,

    /// Send first what this file, written by --record, says was touched first
    #[arg(long, value_name = "FILE")]
    pub replay: Option<PathBuf>,

    /// Send what was not asked for no faster than this, bytes a second: 64M. Cloud Hypervisor asks for all of its
    /// boot memory, some 60 MiB a second, which is not held up
    #[arg(long, value_name = "RATE", value_parser = parse_rate, allow_negative_numbers = true)]
    pub bandwidth: Option<u64>,

    /// Texts of the configuration that the guest gets.
    #[arg(
        long,
        value_name = "PATH=VALUE",
        help = "Give the guest another path or other text, as disks[0].path=/new/disk; of Cloud Hypervisor"
    )]
    pub set: Vec<Edit>,

    /// Go on with a restore whose pager died, in a QEMU that is in postcopy-paused
    #[arg(long, conflicts_with = "eager")]
    pub recover: bool,

    /// Serve the guest from a second process, and from another one when that dies (Firecracker). What is needed
    /// to continue is kept by this one
    #[arg(long)]
    pub supervise: bool,

    /// Be that second process
    #[arg(long, hide = true)]
    pub worker: bool,
}

/// The command line of `handover`.
#[derive(Clone, Debug, clap::Args)]
pub struct HandoverArgs {
    /// Where it listens for the Cloud Hypervisor that has the guest
    #[arg(long, value_name = "SOCKET")]
    pub socket: Address,

    /// Where the Cloud Hypervisor listens that is to have it
    #[arg(long, value_name = "SOCKET")]
    pub to: Address,

    /// Texts of the configuration that the guest gets.
    #[arg(
        long,
        value_name = "PATH=VALUE",
        help = "Give the guest another path or other text, as disks[0].path=/new/disk"
    )]
    pub set: Vec<Edit>,

    /// Who may connect, and how it is told what goes wrong.
    #[command(flatten)]
    pub service: ServiceArgs,

    /// Print a JSON object a line of what happens, errors included
    #[arg(long)]
    pub json: bool,

    /// Give up after this long: 30s, 2m, 1h, or seconds
    #[arg(long, value_name = "T", value_parser = parse_duration)]
    pub timeout: Option<Duration>,

    /// How this process confines itself.
    #[command(flatten)]
    pub sandbox: sandbox::Options,
}

/// Bytes a second, of which there must be some.
fn parse_rate(text: &str) -> Result<u64, String> {
    match parse_size(text).map_err(|error: SizeError| error.to_string())? {
        0 => Err("at this rate it would never end".to_owned()),
        rate => Ok(rate),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(words: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(words.split_whitespace())
    }

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_save_and_a_restore_are_parsed() {
        let words = "vmem-pager save --vmm qemu --socket s --image i --timeout 2m --json";
        let Command::Save(save) = parse(words).unwrap().command else { panic!("not a save") };
        assert_eq!(save.common.socket, Address::Unix("s".into()));
        assert_eq!(save.common.timeout, Some(Duration::from_secs(120)));
        assert!(save.common.json && save.common.sandbox.sandbox == sandbox::Mode::On);
        let words = "vmem-pager restore --vmm qemu --socket tcp:h:1 --image i --bandwidth 64M";
        let Command::Restore(restore) = parse(words).unwrap().command else { panic!("a save") };
        assert_eq!(restore.bandwidth, Some(64 << 20));
        let service = restore.common.service;
        assert_eq!((service.socket_mode, service.socket_group), (0o600, None));
        let words = "vmem-pager handover --socket s --to t --socket-mode 0660 --socket-group a \
                     --log-format json --socket-group 7";
        let service = parse(words).unwrap().command.service().clone();
        assert_eq!((service.socket_mode, service.socket_group.as_deref()), (0o660, Some("7")));
        assert_eq!(service.log_format, Some(Format::Json));
    }

    #[test]
    fn wrong_words_are_refused() {
        for words in [
            "vmem-pager",
            "vmem-pager save",
            "vmem-pager save --vmm xen --socket s --image i",
            "vmem-pager save --vmm qemu --socket tcp:x --image i",
            "vmem-pager save --vmm qemu --socket s --image i --timeout soon",
            "vmem-pager save --vmm qemu --socket s --image i --sandbox perhaps",
            "vmem-pager save --vmm qemu --socket s --image i --eager",
            "vmem-pager restore --vmm qemu --socket s --image i --bandwidth 0",
            "vmem-pager restore --vmm qemu --socket s --image i --recover --eager",
            "vmem-pager restore --vmm cloud-hypervisor --socket s --image i --set memory.size=1",
            "vmem-pager handover --socket s",
            "vmem-pager handover --socket s --to t --socket-mode 0800",
            "vmem-pager handover --socket s --to t --socket-mode 1777",
            "vmem-pager handover --socket s --to t --log-format xml",
        ] {
            assert!(parse(words).is_err(), "{words}");
        }
    }
}
