//! A guest that does not do what it is asked for: the daemon and its client say why.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use program::size::format_size;

use crate::api::Device;
use crate::machine::Machine;
use crate::report::Report;
use crate::sizes::{GIB, MIB, human};
use crate::wait;

const STEP: u64 = 128 * MIB;

/// Kernel memory, which stays where it is: files without content.
const PINNING: &str = "i=0; while [ $i -lt 8000 ]; do : > /fill/pin$i; i=$((i+1)); done";

/// The driver is missing; then its memory is not online; then it grows in steps; at last it cannot unplug what
/// the kernel itself uses.
pub fn run(machine: &mut Machine, report: &mut Report) -> Result<()> {
    without_a_driver(machine, report)?;
    not_online(machine, report)?;
    in_steps(machine, report)?;
    pinned(machine, report)
}

fn without_a_driver(machine: &mut Machine, report: &mut Report) -> Result<()> {
    let output = machine.client(&["resize", "1536M", "--wait", "--timeout", "2s"]).output()?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let device = machine.daemon.api.device()?;
    let mut claims = Claims::of(&device);
    claims.stands_still(&device, "driver-absent", "has no virtio_mem module");
    claims.claim("the client ends with status 3", output.status.code() == Some(3));
    let last = said.lines().last().unwrap_or_default();
    let expected = "timed out after 2 s: plugged 0 B of the requested 1.5 GiB; stands still since";
    claims.claim(format!("{last:?} has {expected:?}"), last.contains(expected));
    claims.claim("it names the driver", last.contains("has no virtio_mem module"));
    claims.add(report, "no driver");
    Ok(())
}

fn not_online(machine: &mut Machine, report: &mut Report) -> Result<()> {
    machine.guest.run(
        "echo offline > /sys/devices/system/memory/auto_online_blocks; \
         insmod /virtio_mem.ko dyndbg=+p",
    )?;
    let client = Client::start(machine, &["resize", "1536M", "--wait", "--timeout", "10m"])?;
    let said = client.says("auto_online_blocks")?;
    let device = machine.daemon.api.device()?;
    let mut claims = Claims::of(&device);
    claims.stands_still(&device, "not-online", "where Linux stops while that much is not online");
    claims.claim("as much is plugged as may be offline", device.plugged_size == GIB);
    claims.claim(format!("{said:?} has 512 MiB to plug"), said.contains("512 MiB to plug"));
    claims.add(report, "memory is plugged and not online");

    // As memory of the kernel's.
    machine.guest.run(
        "echo online_kernel > /sys/devices/system/memory/auto_online_blocks; \
         for state in /sys/devices/system/memory/memory*/state; do \
         if grep -q offline $state; then echo online_kernel > $state; fi; done",
    )?;
    client.ends(0)?;
    report.saw("after it is online", machine.settle(1536 * MIB)?);
    Ok(())
}

fn in_steps(machine: &mut Machine, report: &mut Report) -> Result<()> {
    let words = ["resize", "2G", "--wait", "--timeout", "10m", "--step", "128M"];
    let paced = [&words[..], &["--max-rate", "256M"]].concat();
    let mut client = Client::start(machine, &paced)?;
    let mut asked = vec![1536 * MIB];
    loop {
        let ended = client.child.try_wait()?.is_some();
        let size = machine.daemon.api.device()?.requested_size;
        if asked.last() != Some(&size) {
            asked.push(size);
        }
        if ended {
            break;
        }
        // Each step but the last, after which the client may end, takes half a second at least.
        thread::sleep(Duration::from_millis(20));
    }
    client.ends(0)?;
    let steps: Vec<u64> = (0..=4).map(|step| 1536 * MIB + step * STEP).collect();
    let mut seen = machine.settle(2 * GIB)?;
    seen.api_note = format!(
        "asked for {}",
        asked.iter().map(|size| human(*size)).collect::<Vec<_>>().join(" ")
    );
    seen.claim("each step was asked for", asked == steps);
    report.saw("1536M -> 2G in steps", seen);
    Ok(())
}

fn pinned(machine: &mut Machine, report: &mut Report) -> Result<()> {
    machine.guest.run(PINNING)?;
    let client = Client::start(machine, &["resize", "0", "--wait", "--timeout", "10m"])?;
    let said = client.says("more than requested since")?;
    let device = machine.daemon.api.device()?;
    let mut claims = Claims::of(&device);
    claims.stands_still(&device, "unmovable", "more than requested since");
    let left = device.plugged_size;
    claims.claim("some is left, and some is not", left > 0 && left < 2 * GIB);
    claims.claim("what is left remains to be unplugged", device.resize.remaining_size == left);
    let since = device.resize.since.clone().unwrap_or_default();
    let expected = format!("keeps {} more than requested since {since}", format_size(left));
    let told = device.resize.reason.as_ref().map_or("", |reason| reason.text.as_str());
    claims.claim(format!("{told:?} has {expected:?}"), told.contains(&expected));
    claims.claim(format!("{said:?} has {expected:?}"), said.contains(&expected));
    claims.add(report, "2G -> 0, in use by the kernel");
    Ok(())
}

/// `vmemctl`, and what it says.
struct Client {
    child: Child,
    lines: Receiver<String>,
}

impl Client {
    fn start(machine: &Machine, words: &[&str]) -> Result<Self> {
        let mut command = machine.client(words);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let said = BufReader::new(child.stderr.take().context("the client has no stderr")?);
        let (say, lines) = channel();
        thread::spawn(move || {
            for line in said.lines().map_while(Result::ok) {
                if say.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, lines })
    }

    /// The first line that says that the guest stands still, with this text.
    fn says(&self, text: &str) -> Result<String> {
        wait::until(&format!("vmemctl to say {text:?}"), wait::LONG, || {
            let line = self
                .lines
                .try_iter()
                .find(|line| line.starts_with("stands still") && line.contains(text));
            Ok(line)
        })
    }

    fn ends(mut self, status: i32) -> Result<()> {
        let ended = wait::until("vmemctl to end", wait::LONG, || Ok(self.child.try_wait()?))?;
        let said: Vec<String> = self.lines.try_iter().collect();
        ensure!(ended.code() == Some(status), "vmemctl ended with {ended}: {said:?}");
        Ok(())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is to hold of a guest that stands still.
struct Claims {
    api: String,
    problems: Vec<String>,
}

impl Claims {
    fn of(device: &Device) -> Self {
        let (plugged, requested) = (human(device.plugged_size), human(device.requested_size));
        let reason = device.resize.reason.as_ref().map_or("none", |reason| reason.kind.as_str());
        let api =
            format!("plugged {plugged}, requested {requested}, {}: {reason}", device.resize.state);
        Self { api, problems: Vec::new() }
    }

    fn claim(&mut self, claim: impl std::fmt::Display, holds: bool) {
        if !holds {
            self.problems.push(format!("not so: {claim}"));
        }
    }

    fn stands_still(&mut self, device: &Device, kind: &str, text: &str) {
        let reason = device.resize.reason.as_ref();
        self.claim("it stands still", device.resize.state == "stalled");
        self.claim(format!("for {kind}"), reason.is_some_and(|reason| reason.kind == kind));
        let told = reason.map_or("", |reason| reason.text.as_str());
        self.claim(format!("{told:?} has {text:?}"), told.contains(text));
    }

    fn add(self, report: &mut Report, stage: &str) {
        report.add(stage, "-".to_owned(), self.api, "-".to_owned(), self.problems);
    }
}
