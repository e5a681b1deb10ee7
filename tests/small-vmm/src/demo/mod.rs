//! The demonstration: daemons, small VMMs and an administrator, all processes of their own over
//! real sockets.
//!
//! The administrator is this process. Every number that it prints is checked; one that is off makes
//! the run fail at its end.

pub mod certificates;
mod compare;
mod grow_shrink;
mod host;
mod migration;
mod postcopy;
mod progress;
mod resize;
mod show;
mod snapshot;

use std::env;
use std::path::{Path, PathBuf};

use anyhow::ensure;

use crate::migration::Links;
use crate::process::find_daemon;
pub use certificates::make as make_certificates;
pub use show::parse_size;

const ADDR: u64 = 4 << 30;
const CELLS: u64 = 64;
const MIB: u64 = 1 << 20;

/// What the demonstration is asked for.
#[derive(Clone, Debug)]
pub struct DemoOptions {
    /// The daemon; beside this program unless given.
    pub daemon: Option<PathBuf>,
    /// How much the guest may grow by, bytes.
    pub region_size: u64,
    /// Whether the guest migrates over TCP instead of a Unix socket.
    pub tcp: bool,
    /// Channels for the pages of the guest that migrates; 0 to have them on the main one.
    pub channels: usize,
    /// Level of zstd, 1 to 20, with which they are compressed there; not without.
    pub compress: Option<u8>,
    /// Whether it migrates over TLS, and where the certificates are; made for the demonstration without.
    pub tls: Option<Option<PathBuf>>,
    /// Show only this, where it is asked for.
    pub parts: Parts,
}

/// Parts that are shown when they are asked for, instead of the usual ones.
#[derive(Clone, Copy, Debug, Default)]
pub struct Parts {
    /// A guest that moves before its memory does.
    pub postcopy: bool,
    /// The same over a channel that breaks.
    pub break_channel: bool,
    /// A guest that is saved while it runs, and goes on from the file at once.
    pub snapshot: bool,
    /// A guest that grows and shrinks while it moves; with `postcopy`, before it goes before its memory does.
    pub resize: bool,
}

/// Runs the demonstration; true when every number was right.
///
/// # Errors
///
/// When it cannot go on.
pub fn run(options: &DemoOptions) -> anyhow::Result<bool> {
    check(options)?;
    let region_size = options.region_size;
    ensure!(
        region_size >= 64 * MIB && region_size.is_multiple_of(64 * MIB),
        "--region-size {region_size}: not a multiple of 64M"
    );
    let daemon = match &options.daemon {
        Some(path) => path.clone(),
        None => find_daemon(&env::current_exe()?)?,
    };
    let wrong = run_parts(&daemon, options)?;
    for line in &wrong {
        eprintln!("wrong: {line}");
    }
    Ok(wrong.is_empty())
}

/// Refuses what would be asked for in vain: TLS above all, since all would go in the clear.
fn check(options: &DemoOptions) -> anyhow::Result<()> {
    let Parts { postcopy, break_channel, snapshot, resize } = options.parts;
    if resize {
        ensure!(
            !break_channel && !snapshot,
            "--resize goes with --tcp, --channels, --tls, --compress and --postcopy only"
        );
        return Ok(());
    }
    let has_links = options.channels != 0 || options.compress.is_some() || options.tls.is_some();
    ensure!(
        !has_links || !(postcopy || break_channel || snapshot),
        "--channels, --compress, --tls and --tls-dir go with the usual parts and with --resize only: --postcopy, \
         --break-channel and --snapshot show a guest without them"
    );
    Ok(())
}

/// Everything that was wrong.
fn run_parts(daemon: &Path, options: &DemoOptions) -> anyhow::Result<Vec<String>> {
    let DemoOptions { region_size, tcp, parts, channels, compress, .. } = *options;
    let made;
    let tls_dir = match &options.tls {
        None => None,
        Some(Some(dir)) => Some(dir.clone()),
        Some(None) => {
            made = certificates::make()?;
            Some(made.path().to_owned())
        }
    };
    let links = Links { channels, tls_dir, zstd: compress };
    if parts.resize {
        return resize::run(daemon, region_size, tcp, &links, parts.postcopy);
    }
    let mut wrong = Vec::new();
    if parts.postcopy || parts.break_channel {
        wrong.extend(postcopy::run(daemon, region_size, tcp, parts.break_channel)?);
    }
    if parts.snapshot {
        if parts.postcopy || parts.break_channel {
            println!();
        }
        wrong.extend(snapshot::run(daemon, region_size)?);
    } else if !parts.postcopy && !parts.break_channel {
        wrong.extend(grow_shrink::run(daemon, region_size)?);
        println!();
        wrong.extend(migration::run(daemon, region_size, tcp, &links)?);
    }
    Ok(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_part_does_not_show_is_refused_rather_than_left_out() {
        let usual = DemoOptions {
            daemon: None,
            region_size: 64 * MIB,
            tcp: true,
            channels: 0,
            compress: None,
            tls: None,
            parts: Parts::default(),
        };
        let tls = DemoOptions { tls: Some(None), ..usual.clone() };
        let channels = DemoOptions { channels: 4, ..usual.clone() };
        let postcopy = Parts { postcopy: true, ..Parts::default() };
        let snapshot = Parts { snapshot: true, ..Parts::default() };
        let break_channel = Parts { break_channel: true, ..Parts::default() };
        for parts in [postcopy, snapshot, break_channel] {
            check(&DemoOptions { parts, ..usual.clone() }).unwrap();
            for links in [&tls, &channels] {
                let refused = check(&DemoOptions { parts, ..links.clone() }).unwrap_err();
                assert!(refused.to_string().contains("with --resize only"), "{refused}");
            }
        }
        let resize = Parts { resize: true, ..postcopy };
        for links in [&usual, &tls, &channels] {
            check(links).unwrap();
            check(&DemoOptions { parts: resize, ..links.clone() }).unwrap();
        }
        assert!(
            check(&DemoOptions { parts: Parts { snapshot: true, ..resize }, ..usual }).is_err()
        );
    }
}
