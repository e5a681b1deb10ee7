//! The command line: strings in, a checked [`Config`] out.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use program::access::{find_group, parse_mode};
use program::duration::parse_duration;
use program::listener::Access;
use program::size::parse_size;
use thiserror::Error;
use virtio_mem::device::{Geometry, GeometryError, VirtioMem};

use crate::log::Format;
use crate::renew;

/// vhost-user back-end for virtio-mem.
///
/// Tracks which blocks of one guest-physical region are plugged, serves the guest's requests,
/// gives unplugged memory back to the host and is resized over a management API.
///
/// Sizes are plain numbers, 0x-hex, or have a suffix K, M, G or T (powers of 1024).
#[derive(Debug, Parser)]
#[command(name = "vhost-user-mem", version, max_term_width = 100)]
pub struct Args {
    /// Listen for the front-end on this Unix socket; without it and --fd, on the one that the service
    /// manager passes as front-end
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    pub socket_path: Option<PathBuf>,

    /// Use this inherited file descriptor: a connected or a listening Unix socket
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub fd: Option<String>,

    /// Guest-physical address of the region
    #[arg(long, value_name = "GPA", allow_hyphen_values = true)]
    pub addr: String,

    /// Size of the region
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub region_size: String,

    /// Size of a block [default: the host's transparent huge page size]
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub block_size: Option<String>,

    /// What the guest is asked to plug; with --state-file, what was set last wins
    #[arg(long, value_name = "SIZE", default_value = "0", allow_hyphen_values = true)]
    pub requested_size: String,

    /// Offer VIRTIO_MEM_F_ACPI_PXM with this NUMA node
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub node_id: Option<String>,

    /// Serve the management API on this Unix socket
    #[arg(long, value_name = "PATH")]
    pub api_socket: Option<PathBuf>,

    /// Serve GET /metrics alone on this Unix socket, to scrapers that are not to change anything
    #[arg(long, value_name = "PATH")]
    pub metrics_socket: Option<PathBuf>,

    /// Tell VMMs in other processes what is populated and discarded on this Unix socket
    #[arg(long, value_name = "PATH")]
    pub discard_socket: Option<PathBuf>,

    /// Keep the device's state in this file, to survive a crash or restart of the daemon
    #[arg(long, value_name = "PATH")]
    pub state_file: Option<PathBuf>,

    /// Offer postcopy (PAGEFAULT): a front-end that asks for it is trusted with this process,
    /// which starts itself anew before it serves another
    #[arg(long)]
    pub postcopy: bool,

    /// Permissions of all sockets, octal, whatever the umask
    #[arg(long, value_name = "MODE", default_value = "0600", allow_hyphen_values = true)]
    pub socket_mode: String,

    /// Group of all sockets, a name or a number [default: the group of the process]
    #[arg(long, value_name = "GROUP")]
    pub socket_group: Option<String>,

    /// Take memory, dirty logs and device state in files of any file system, and not only in memfds
    /// and on tmpfs and hugetlbfs; a file system that does not answer then stops the daemon
    #[arg(long)]
    pub allow_file_memory: bool,

    /// What lines of the log are written as
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t)]
    pub log_format: Format,

    /// How this process confines itself.
    #[command(flatten)]
    pub sandbox: sandbox::Options,

    /// Discard what the guest has in unplugged memory this often: 30s, 2m, 1h, or seconds; 0 is never
    #[arg(long, value_name = "T", default_value = "0", allow_hyphen_values = true)]
    pub sweep_interval: String,

    /// Print the back-end's capabilities as JSON and exit; other options are ignored
    #[arg(long)]
    pub print_capabilities: bool,
}

/// Where the front-end comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A socket to bind.
    Path(PathBuf),
    /// An inherited descriptor.
    Fd(i32),
    /// A socket that the service manager passes.
    Passed,
}

/// A checked command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where the front-end comes from.
    pub endpoint: Endpoint,
    /// What never changes.
    pub geometry: Geometry,
    /// What the guest is asked to plug at first, bytes.
    pub requested_size: u64,
    /// Where the management API is served.
    pub api_socket: Option<PathBuf>,
    /// Where the metrics alone are served.
    pub metrics_socket: Option<PathBuf>,
    /// Where the discard channel is served.
    pub discard_socket: Option<PathBuf>,
    /// Where the state is kept.
    pub state_file: Option<PathBuf>,
    /// Whether front-ends may use postcopy.
    pub postcopy: bool,
    /// Who may connect to the sockets.
    pub access: Access,
    /// How often unplugged memory is swept, if it is.
    pub sweep_interval: Option<Duration>,
    /// Whether the front-end's files may be of any file system.
    pub allow_file_memory: bool,
    /// What lines of the log are written as.
    pub log_format: Format,
    /// How this process confines itself.
    pub sandbox: sandbox::Options,
}

/// An option that breaks a rule.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("--{option}{}{value}: {rule}", if value.is_empty() { "" } else { " " })]
pub struct ArgsError {
    option: &'static str,
    value: String,
    rule: String,
}

impl ArgsError {
    pub(crate) fn new(option: &'static str, value: &str, rule: impl ToString) -> Self {
        Self { option, value: value.to_owned(), rule: rule.to_string() }
    }
}

impl TryFrom<Args> for Config {
    type Error = ArgsError;

    fn try_from(args: Args) -> Result<Self, ArgsError> {
        let size = |option, value: &str| {
            parse_size(value).map_err(|error| ArgsError::new(option, value, error))
        };
        let addr = size("addr", &args.addr)?;
        let region_size = size("region-size", &args.region_size)?;
        let block_text = args.block_size.unwrap_or_else(|| huge_page_size().to_string());
        let block_size = size("block-size", &block_text)?;
        let requested_size = size("requested-size", &args.requested_size)?;
        let node_id = match &args.node_id {
            None => None,
            Some(text) => Some(number::<u16>(text).ok_or_else(|| {
                ArgsError::new("node-id", text, "not a whole number from 0 to 65535")
            })?),
        };
        let page_size = rustix::param::page_size() as u64;
        if block_size.is_power_of_two() && block_size < page_size {
            let rule = format!("smaller than the host's page size ({page_size})");
            return Err(ArgsError::new("block-size", &block_text, rule));
        }
        let geometry = Geometry::new(addr, region_size, block_size, node_id).map_err(|error| {
            let (option, value) = match error {
                GeometryError::BlockSizeNotPowerOfTwo(_) | GeometryError::BlockSizeTooSmall(_) => {
                    ("block-size", &block_text)
                }
                GeometryError::AddrUnaligned { .. } => ("addr", &args.addr),
                // All others are of the region's size.
                _ => ("region-size", &args.region_size),
            };
            ArgsError::new(option, value, error)
        })?;
        VirtioMem::new(geometry, requested_size)
            .map_err(|error| ArgsError::new("requested-size", &args.requested_size, error))?;
        let endpoint = match (args.socket_path, &args.fd) {
            (_, Some(text)) => Endpoint::Fd(number(text).ok_or_else(|| {
                ArgsError::new("fd", text, "not the number of a file descriptor")
            })?),
            (Some(path), None) => Endpoint::Path(path),
            (None, None) => Endpoint::Passed,
        };
        let (api_socket, metrics_socket) = (args.api_socket, args.metrics_socket);
        let (discard_socket, state_file) = (args.discard_socket, args.state_file);
        let socket_path = match &endpoint {
            Endpoint::Path(path) => Some(path),
            Endpoint::Fd(_) | Endpoint::Passed => None,
        };
        let paths = [
            ("socket-path", socket_path),
            ("api-socket", api_socket.as_ref()),
            ("metrics-socket", metrics_socket.as_ref()),
            ("discard-socket", discard_socket.as_ref()),
            ("state-file", state_file.as_ref()),
        ];
        for (index, (option, path)) in paths.into_iter().enumerate() {
            let same =
                paths[..index].iter().find(|(_, earlier)| path.is_some() && *earlier == path);
            if let (Some(path), Some((earlier, _))) = (path, same) {
                let rule = format!("the same path as --{earlier}");
                return Err(ArgsError::new(option, &path.to_string_lossy(), rule));
            }
        }
        let access = Access {
            mode: parse_mode(&args.socket_mode)
                .map_err(|rule| ArgsError::new("socket-mode", &args.socket_mode, rule))?,
            group: match &args.socket_group {
                // Its sockets are there already, and where groups are listed is out of reach by now.
                Some(_) if renew::is_continued() => None,
                None => None,
                Some(text) => Some(
                    find_group(text).map_err(|rule| ArgsError::new("socket-group", text, rule))?,
                ),
            },
        };
        let sweep_interval = parse_duration(&args.sweep_interval)
            .map_err(|rule| ArgsError::new("sweep-interval", &args.sweep_interval, rule))?;
        let sweep_interval = (!sweep_interval.is_zero()).then_some(sweep_interval);
        let postcopy = args.postcopy;
        Ok(Self {
            endpoint,
            geometry,
            requested_size,
            api_socket,
            metrics_socket,
            discard_socket,
            state_file,
            sweep_interval,
            allow_file_memory: args.allow_file_memory,
            postcopy,
            access,
            log_format: args.log_format,
            sandbox: args.sandbox,
        })
    }
}

/// A number written like a size.
fn number<T: TryFrom<u64>>(text: &str) -> Option<T> {
    parse_size(text).ok().and_then(|number| number.try_into().ok())
}

/// The host's transparent huge page size, bytes: the smallest block that is discarded without
/// splitting a page. 2 MiB where the host does not say.
fn huge_page_size() -> u64 {
    std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .filter(|size: &u64| size.is_power_of_two())
        .unwrap_or(2 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(options: &str) -> Result<Config, ArgsError> {
        let good = "vhost-user-mem --socket-path s --addr 0x140000000 --region-size 8G";
        let words = good.split(' ').chain(options.split(' ').filter(|word| !word.is_empty()));
        // The last of an option given twice wins.
        let mut words: Vec<&str> = words.collect();
        for option in ["--addr", "--region-size"] {
            let at: Vec<usize> = (0..words.len()).filter(|&i| words[i] == option).collect();
            if let [first, _] = at[..] {
                words.drain(first..first + 2);
            }
        }
        Config::try_from(Args::try_parse_from(words).unwrap())
    }

    #[test]
    fn the_readme_has_every_option() {
        let readme = include_str!("../../README.md");
        let command = <Args as clap::CommandFactory>::command();
        let options = command.get_arguments().filter_map(|option| option.get_long());
        let missing: Vec<_> =
            options.filter(|name| !readme.contains(&format!("`--{name}"))).collect();
        assert!(missing.is_empty(), "not in vhost-user/README.md: {missing:?}");
    }

    #[test]
    fn good_options_make_a_configuration() {
        let config = config("--block-size 2M --requested-size 1G --node-id 0x3").unwrap();
        assert_eq!(config.geometry.addr(), 0x1_4000_0000);
        assert_eq!(config.geometry.region_size(), 8 << 30);
        assert_eq!(config.geometry.block_size(), 2 << 20);
        assert_eq!(config.geometry.node_id(), Some(3));
        assert_eq!(config.requested_size, 1 << 30);
    }

    #[test]
    fn wrong_options_are_named_with_value_and_rule() {
        for (options, option) in [
            ("--block-size 3M", "--block-size 3M: "),
            ("--block-size 0", "--block-size 0: "),
            ("--block-size 2048", "--block-size 2048: "),
            ("--addr 1M", "--addr 1M: "),
            ("--addr x", "--addr x: "),
            ("--region-size 3", "--region-size 3: "),
            ("--region-size 0xffffffffffe00000", "--region-size 0xffffffffffe00000: "),
            ("--requested-size 9G", "--requested-size 9G: "),
            ("--requested-size 1", "--requested-size 1: "),
            ("--requested-size -1", "--requested-size -1: "),
            ("--region-size -2M", "--region-size -2M: "),
            ("--node-id 65536", "--node-id 65536: "),
            ("--node-id -1", "--node-id -1: "),
            ("--api-socket s", "--api-socket s: "),
            ("--sweep-interval often", "--sweep-interval often: "),
            ("--sweep-interval -1", "--sweep-interval -1: "),
            ("--socket-mode 0800", "--socket-mode 0800: "),
            ("--socket-mode +7", "--socket-mode +7: "),
            ("--socket-mode 1777", "--socket-mode 1777: "),
            ("--socket-group no-such-group", "--socket-group no-such-group: "),
            ("--api-socket a --discard-socket a", "--discard-socket a: "),
            ("--api-socket a --metrics-socket a", "--metrics-socket a: "),
            ("--api-socket a --state-file a", "--state-file a: "),
        ] {
            let message = config(options).unwrap_err().to_string();
            assert!(message.starts_with(option), "{options}: {message}");
        }
    }
}
