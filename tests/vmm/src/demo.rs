//! The demonstration: a daemon, a small VMM and an administrator, three processes over real
//! sockets.
//!
//! The administrator is this process: it resizes the guest through the management API, and prints
//! after each step what was requested, what the guest has plugged, what the daemon says the host
//! holds and what the host really holds. Every number is checked; the first that is off makes the
//! run fail at its end.

use std::env;
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command as Process, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::api::ApiClient;
use crate::daemon::{Daemon, DaemonOptions};
use crate::guest::{Cell, Command, Report};

const ADDR: u64 = 4 << 30;
const CELLS: u64 = 64;
const MIB: u64 = 1 << 20;

/// What happens in a step, in bytes.
enum Action {
    Nothing,
    Resize(u64),
    Write { offset: u64, size: u64 },
}

struct Step {
    title: String,
    action: Action,
    /// What is to be plugged and held afterwards.
    plugged: u64,
    held: u64,
}

/// Runs the demonstration; true when every number was right.
pub fn run(daemon: Option<PathBuf>, region_size: u64) -> anyhow::Result<bool> {
    ensure!(
        region_size >= 64 * MIB && region_size.is_multiple_of(64 * MIB),
        "--region-size {region_size}: not a multiple of 64M"
    );
    let binary = match daemon {
        Some(path) => path,
        None => find_daemon()?,
    };
    let start = Instant::now();
    let mut daemon = Daemon::start(&binary, DaemonOptions::new(ADDR, region_size))?;
    let mut guest = Guest::start(&daemon.socket(), region_size)?;
    println!(
        "The guest may grow by {}. One character is {}: · discarded  ░ plugged  █ plugged and populated\n",
        human(region_size),
        human(region_size / CELLS)
    );
    println!(
        "{:<15}{:>10}{:>10}{:>11}{:>10}  map",
        "step", "requested", "plugged", "populated", "held"
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
            device.populated.map_or(String::from("?"), human),
            human(report.held),
            paint(&report.map)
        );
        for (name, found, expected) in [
            ("requested", device.requested, requested),
            ("plugged", device.plugged, step.plugged),
            ("plugged as the guest sees it", report.plugged, step.plugged),
            ("populated", device.populated.unwrap_or(u64::MAX), step.held),
            ("held", report.held, step.held),
        ] {
            if found != expected {
                wrong.push(format!("{}: {name} is {found}, not {expected}", step.title));
            }
        }
        if report.map.contains(&Cell::Leaked) {
            wrong.push(format!("{}: the host holds memory that is unplugged", step.title));
        }
        peak = peak.max(report.held);
        end = report.held;
    }

    let verified = guest.tell(Command::Quit)?.verified;
    guest.wait()?;
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
    for line in &wrong {
        eprintln!("wrong: {line}");
    }
    Ok(wrong.is_empty())
}

/// The story, for a region of 8 GiB in the sizes of everyday, for others in proportion.
fn steps(region_size: u64) -> Vec<Step> {
    let unit = region_size / 8;
    let step = |title: String, action, plugged, held| Step { title, action, plugged, held };
    let resize =
        |bytes, held| step(format!("resize {}", human(bytes)), Action::Resize(bytes), bytes, held);
    let write = |offset, size, plugged, held| {
        step(format!("write {}", human(size)), Action::Write { offset, size }, plugged, held)
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
    populated: Option<u64>,
}

fn device(api: &ApiClient) -> anyhow::Result<Device> {
    let device = api.device()?;
    let size = |name: &str| device[name].as_u64().with_context(|| format!("no {name} in {device}"));
    Ok(Device {
        requested: size("requested_size")?,
        plugged: size("plugged_size")?,
        populated: device.get("populated_size").and_then(Value::as_u64),
    })
}

/// The VMM process.
struct Guest {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Guest {
    fn start(socket: &Path, region_size: u64) -> anyhow::Result<Self> {
        let mut child = Process::new(env::current_exe()?)
            .args(["guest", "--addr", &ADDR.to_string(), "--region-size", &region_size.to_string()])
            .arg("--socket")
            .arg(socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the VMM process")?;
        let commands = child.stdin.take().context("no pipe to the VMM process")?;
        let answers = child.stdout.take().context("no pipe from the VMM process")?;
        Ok(Self { child, commands, answers: BufReader::new(answers) })
    }

    fn tell(&mut self, command: Command) -> anyhow::Result<Report> {
        serde_json::to_writer(&mut self.commands, &command)?;
        writeln!(self.commands)?;
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("the VMM process ended at {command:?}");
        }
        Ok(serde_json::from_str(&line)?)
    }

    fn wait(&mut self) -> anyhow::Result<()> {
        let status = self.child.wait()?;
        ensure!(status.success(), "the VMM process ended with {status}");
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The daemon beside this executable, built first when it is not there.
fn find_daemon() -> anyhow::Result<PathBuf> {
    let own = env::current_exe()?;
    let dir = own.parent().context("this executable is in no directory")?;
    let binary = dir.join("vhost-user-mem");
    if !binary.exists() {
        let mut build = Process::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        build.args(["build", "-p", "vhost-user-mem"]);
        if dir.ends_with("release") {
            build.arg("--release");
        }
        // Cargo tells this executable where it comes from; without that, it is looked for from
        // here.
        if let Some(package) = env::var_os("CARGO_MANIFEST_DIR") {
            build.current_dir(package);
        }
        let status = build.status().context("cannot run cargo to build the daemon")?;
        ensure!(
            status.success() && binary.exists(),
            "no daemon at {}: use --daemon",
            binary.display()
        );
    }
    Ok(binary)
}

fn human(bytes: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")];
    match UNITS.iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) if bytes.is_multiple_of(*unit) => format!("{}{name}", bytes / unit),
        Some((unit, name)) => format!("{:.1}{name}", bytes as f64 / *unit as f64),
        None => bytes.to_string(),
    }
}

fn paint(map: &[Cell]) -> String {
    let coloured = std::io::stdout().is_terminal() && env::var_os("NO_COLOR").is_none();
    let mut text = String::new();
    for run in map.chunk_by(|left, right| left == right) {
        let (symbol, colour) = match run[0] {
            Cell::Discarded => ("·", 90),
            Cell::Untouched => ("░", 36),
            Cell::Populated => ("█", 32),
            Cell::Leaked => ("!", 31),
        };
        let symbols = symbol.repeat(run.len());
        if coloured {
            text += &format!("\x1b[{colour}m{symbols}\x1b[0m");
        } else {
            text += &symbols;
        }
    }
    text
}

/// Reads a size: plain, hexadecimal with 0x, or with K, M, G or T.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size such as 4096, 0x1000, 512M or 8G");
    if let Some(digits) = text.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).map_err(|_| wrong());
    }
    let (digits, shift) = match text.chars().last() {
        Some('K') => (&text[..text.len() - 1], 10),
        Some('M') => (&text[..text.len() - 1], 20),
        Some('G') => (&text[..text.len() - 1], 30),
        Some('T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written_in_the_same_units() {
        for text in ["0", "512K", "256M", "8G"] {
            assert_eq!(human(parse_size(text).unwrap()), text);
        }
        assert_eq!(parse_size("0x1000"), Ok(4096));
        for text in ["", "G", "-1", "8X", "99999999999T", "1.5G"] {
            assert!(parse_size(text).is_err(), "{text:?}");
        }
    }

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
