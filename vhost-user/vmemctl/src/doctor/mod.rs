//! `vmemctl doctor`: what of a host, or of a plan, would keep a guest from its memory.

mod device;
mod host;
mod memory_file;
mod rights;
mod system;
#[cfg(test)]
mod tests;

use std::fmt::Write;
use std::path::{Path, PathBuf};

use management_api::{DeviceInfo, ResizeState};
use serde::Serialize;

use super::{Console, Failure, status};
use host::Host;

/// The region that is, or is to be.
#[derive(Clone, Debug)]
pub(super) struct Region {
    pub(super) addr: u64,
    pub(super) size: u64,
    /// The host's transparent huge page size, as the daemon takes it, unless it is given.
    pub(super) block_size: Option<u64>,
}

/// What is known of the guest and its memory.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) region: Option<Region>,
    /// Bits of a physical address of the guest's CPU.
    pub(super) guest_phys_bits: Option<u32>,
    /// Size of a memory block of the guest.
    pub(super) guest_memory_block: u64,
    /// The file behind the region.
    pub(super) memory_file: Option<PathBuf>,
}

/// How something was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum State {
    Ok,
    Warning,
    Problem,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    name: &'static str,
    status: State,
    found: String,
    /// What to change.
    advice: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, status: State::Ok, found: found.into(), advice: None }
    }

    fn warning(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        let (found, advice) = (found.into(), Some(advice.into()));
        Self { name, status: State::Warning, found, advice }
    }

    fn problem(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { status: State::Problem, ..Self::warning(name, found, advice) }
    }
}

/// Looks at everything and prints it.
///
/// # Errors
///
/// [`Failure::Unfit`] when there is a problem.
pub(super) fn run(
    mut plan: Plan,
    daemon: Option<&DeviceInfo>,
    root: Option<&Path>,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    if let Some(device) = daemon {
        let (addr, size) = (device.addr, device.region_size);
        plan.region = Some(Region { addr, size, block_size: Some(device.block_size) });
    }
    let host = Host::at(root.unwrap_or(Path::new("/")));
    let mut checks = examine(&host, &plan);
    checks.extend(daemon.map(running));
    let count = |state| checks.iter().filter(|check| check.status == state).count();
    let (problems, warnings) = (count(State::Problem), count(State::Warning));
    let report = serde_json::json!({
        "checks": checks, "problems": problems, "warnings": warnings,
    });
    console.show(&report, || table(&checks))?;
    if problems == 0 { Ok(()) } else { Err(Failure::Unfit { problems, warnings }) }
}

fn examine(host: &Host, plan: &Plan) -> Vec<Check> {
    let mut checks = Vec::new();
    if let Some(region) = &plan.region {
        checks.extend(device::checks(host, plan, region));
    }
    checks.extend(system::checks(host, plan));
    checks.extend(rights::checks(host, plan));
    checks.extend(plan.memory_file.as_deref().map(|path| memory_file::check(path, host, plan)));
    checks
}

/// What a running daemon says of its guest.
fn running(device: &DeviceInfo) -> Check {
    let name = "guest";
    match &device.resize {
        Some(resize) if resize.state == ResizeState::Stalled => {
            let advice = "see the reason; vmemctl watch tells of each change of it";
            Check::problem(name, status::resize(resize), advice)
        }
        Some(resize) => Check::ok(name, status::resize(resize)),
        None => Check::ok(name, status::sizes(device).trim_end()),
    }
}

fn table(checks: &[Check]) -> String {
    let mut table = String::new();
    for Check { name, status, found, advice } in checks {
        let status = match status {
            State::Ok => "OK",
            State::Warning => "warning",
            State::Problem => "PROBLEM",
        };
        let _ = writeln!(table, "{status:<8} {name:<12} {found}");
        if let Some(advice) = advice {
            let _ = writeln!(table, "{:<21} -> {advice}", "");
        }
    }
    table
}
