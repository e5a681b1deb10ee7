//! The first part: a guest grows and shrinks.
//!
//! The administrator resizes it through the management API, and prints after each step what was
//! requested, what the guest has plugged, what the daemon says the host holds and what the host
//! really holds.

use std::env;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;

use super::show::{human, paint};
use super::{ADDR, CELLS};
use crate::api::ApiClient;
use crate::daemon::{Daemon, DaemonOptions};
use crate::guest::{Cell, Command};
use crate::process::{Vmm, VmmOptions};

/// What happens in a step, in bytes.
enum Action {
    Nothing,
    Resize(u64),
    Write { offset: u64, size: u64 },
}

struct Step {
    title: String,
    action: Action,
    /// What is to be plugged and resident afterwards.
    plugged: u64,
    resident: u64,
}

/// Runs it; everything that was wrong.
pub(super) fn run(daemon: &Path, region_size: u64) -> anyhow::Result<Vec<String>> {
    let start = Instant::now();
    let mut daemon = Daemon::start(daemon, DaemonOptions::new(ADDR, region_size))?;
    let options =
        VmmOptions { addr: ADDR, region_size, incoming: false, paused: false, compat_level: None };
    let mut guest = Vmm::start(&env::current_exe()?, &daemon, &options)?;
    println!(
        "The guest may grow by {}. One character is {}: · discarded  ░ plugged  █ plugged and resident\n",
        human(region_size),
        human(region_size / CELLS)
    );
    println!(
        "{:<15}{:>10}{:>10}{:>11}{:>10}  map",
        "step", "requested", "plugged", "resident", "measured"
    );

    let (mut wrong, mut peak, mut end, mut requested) = (Vec::new(), 0, 0, 0);
    for step in steps(region_size) {
        match step.action {
            Action::Nothing => {}
            Action::Resize(bytes) => {
                requested = bytes;
                let response = daemon.api().resize(bytes)?;
                ensure!(
                    response.is_success(),
                    "the daemon refused {}: {}",
                    step.title,
                    response.text
                );
                guest.tell(Command::Settle { requested })?;
            }
            Action::Write { offset, size } => {
                guest.tell(Command::Touch { offset, size })?;
            }
        }
        let report = guest.tell(Command::Report { cells: CELLS })?;
        let device = device(&daemon.api())?;
        println!(
            "{:<15}{:>10}{:>10}{:>11}{:>10}  {}",
            step.title,
            human(device.requested),
            human(device.plugged),
            device.resident.map_or(String::from("?"), human),
            human(report.resident),
            paint(&report.map)
        );
        for (name, found, expected) in [
            ("requested", device.requested, requested),
            ("plugged", device.plugged, step.plugged),
            ("plugged as the guest sees it", report.plugged, step.plugged),
            ("resident", device.resident.unwrap_or(u64::MAX), step.resident),
            ("measured", report.resident, step.resident),
        ] {
            if found != expected {
                wrong.push(format!("{}: {name} is {found}, not {expected}", step.title));
            }
        }
        if report.map.contains(&Cell::Leaked) {
            wrong.push(format!("{}: the host holds memory that is unplugged", step.title));
        }
        peak = peak.max(report.resident);
        end = report.resident;
    }

    let verified = guest.quit()?.verified;
    let status = daemon.terminate(Duration::from_secs(2))?;
    if !status.success() {
        wrong.push(format!("the daemon ended with {status}: {}", daemon.stderr()));
    }
    println!(
        "\nA region of {}: the host held {} at most and {} at the end. \
         The vCPUs verified {verified} pages, none was wrong ({:.1} s).",
        human(region_size),
        human(peak),
        human(end),
        start.elapsed().as_secs_f64()
    );
    Ok(wrong)
}

/// The story, for a region of 8 GiB in the sizes of everyday, for others in proportion.
fn steps(region_size: u64) -> Vec<Step> {
    let unit = region_size / 8;
    let step = |title: String, action, plugged, resident| Step { title, action, plugged, resident };
    let resize = |bytes, resident| {
        step(format!("resize {}", human(bytes)), Action::Resize(bytes), bytes, resident)
    };
    let write = |offset, size, plugged, resident| {
        step(format!("write {}", human(size)), Action::Write { offset, size }, plugged, resident)
    };
    vec![
        step(String::from("start"), Action::Nothing, 0, 0),
        resize(unit, 0),
        write(0, unit / 4, unit, unit / 4),
        resize(2 * unit, unit / 4),
        // In what was plugged last, which goes first when the guest shrinks.
        write(unit, unit / 4, 2 * unit, unit / 2),
        resize(unit / 2, unit / 4),
        resize(0, 0),
    ]
}

struct Device {
    requested: u64,
    plugged: u64,
    resident: Option<u64>,
}

fn device(api: &ApiClient) -> anyhow::Result<Device> {
    let device = api.device()?;
    let size = |name: &str| device[name].as_u64().with_context(|| format!("no {name} in {device}"));
    Ok(Device {
        requested: size("requested_size")?,
        plugged: size("plugged_size")?,
        resident: device.get("resident_size").and_then(Value::as_u64),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn story_has_the_sizes_of_the_readme_for_8g() {
        let titles: Vec<_> = steps(8 << 30).into_iter().map(|step| step.title).collect();
        assert_eq!(
            titles,
            [
                "start",
                "resize 1G",
                "write 256M",
                "resize 2G",
                "write 256M",
                "resize 512M",
                "resize 0"
            ]
        );
    }
}
