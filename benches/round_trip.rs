//! What a guest request costs from the driver's kick to its interrupt, through a real ring, real
//! eventfds and a real vhost-user socket, against a back-end on the same crates that does nothing
//! but answer; and what the daemon holds for a region of 1 TiB.
//!
//! What the peer need not do, and the daemon must:
//!
//! | request | system calls besides the peer's | why |
//! | --- | --- | --- |
//! | STATE | none | |
//! | PLUG | a hole punched where nothing is | seals and the like may have come: refused before anything changes |
//! | UNPLUG | the same, and the hole | whether the host holds anything is known only to a call as dear, and not for long |
//! | either, with a state file | three writes | slot, words of the bitmap, and the mark that it was answered, after the interrupt |
//!
//! In a batch there are no system calls on either side. An access to guest memory more than the
//! peer's seven (the request itself is read), two readings of the clock, the gate and the metrics
//! are left. More than half of the time goes into the crates' accesses to guest memory, each of
//! which counts references to the dirty log.

#[expect(dead_code, reason = "each bench uses its part")]
mod common;
#[path = "round_trip/echo.rs"]
mod echo;
#[path = "common/guest.rs"]
mod guest;

use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use common::{head, report};
use guest::{ADDR, BLOCK, Guest, on_cpus, ram, samples, start, stay_on};
use small_vmm::daemon::DaemonOptions;
use small_vmm::driver::{MemRequest, RequestType, ResponseType};
use small_vmm::memory::GuestRam;
use tempfile::TempDir;

/// With this argument and a path, the bench is the peer.
const ECHO: &str = "--echo-back-end";

const REGION: u64 = 1 << 30;

/// Rounds, of which the median is told; ours and the peer take turns within each.
const ROUNDS: usize = 11;
/// Requests, or pairs of them, in a round.
const SAMPLES: usize = 1000;
/// Requests for one kick. Each takes two of the ring's 128 descriptors.
const BATCH: usize = 64;

fn state(guest: &mut Guest) {
    guest.execute(RequestType::State);
}

fn batch(guest: &mut Guest) {
    let request = MemRequest::new(RequestType::State, ADDR, 1);
    let responses = guest.driver.execute_batch(&[request; BATCH]).unwrap();
    assert_eq!(responses.len(), BATCH);
}

/// The peer, a process of its own as the daemon is.
struct Peer {
    child: Child,
    dir: TempDir,
}

impl Peer {
    fn start() -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let mut command = Command::new(std::env::current_exe()?);
        let child = command.arg(ECHO).arg(dir.path().join("socket")).spawn()?;
        Ok(Self { child, dir })
    }

    fn guest(&self, ram: &Arc<GuestRam>) -> anyhow::Result<Guest> {
        Guest::connect(&self.dir.path().join("socket"), ram)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ours and the peer in turn: p50 and p99 of `work`.
fn latency(what: &str, ours: &mut Guest, peer: &mut Guest, work: fn(&mut Guest)) {
    let (mut p50, mut p99) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let ours = samples(SAMPLES, || work(ours));
        let peer = samples(SAMPLES, || work(peer));
        // The first round warms up.
        if round != 0 {
            p50.push((ours[SAMPLES / 2], peer[SAMPLES / 2]));
            p99.push((ours[SAMPLES * 99 / 100], peer[SAMPLES * 99 / 100]));
        }
    }
    report(&format!("{what}, p50"), &p50);
    report(&format!("{what}, p99"), &p99);
}

/// Ours and the peer in turn: many requests for one kick.
fn throughput(ours: &mut Guest, peer: &mut Guest) {
    let goes = SAMPLES / BATCH * 4;
    let each = |guest: &mut Guest| {
        let times = samples(goes, || batch(guest));
        times.iter().sum::<Duration>() / u32::try_from(goes * BATCH).expect("few")
    };
    let rounds: Vec<_> = (0..=ROUNDS).map(|_| (each(ours), each(peer))).skip(1).collect();
    report(&format!("STATE, {BATCH} requests a kick, each"), &rounds);
    let rate = |times: Vec<Duration>| {
        let mut rates: Vec<_> = times.iter().map(|time| 1.0 / time.as_secs_f64()).collect();
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    };
    println!(
        "{:<58} {:>10.0} {:>10.0}",
        "requests a second",
        rate(rounds.iter().map(|round| round.0).collect()),
        rate(rounds.iter().map(|round| round.1).collect()),
    );
}

/// A line of /proc/PID/status, KiB.
fn status(pid: u32, name: &str) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = value.and_then(|value| value.split_whitespace().next());
    Ok(number.with_context(|| format!("no {name}"))?.parse()?)
}

fn resident() -> anyhow::Result<()> {
    const TERABYTE: u64 = 1 << 40;
    println!(
        "\nResident memory of the daemon, region of 1 TiB, blocks of 2 MiB (target: < 16 MiB)"
    );
    println!("{:<58} {:>10} {:>10}", "", "VmRSS", "RssAnon");
    let daemon = start(DaemonOptions::new(ADDR, TERABYTE).requested_size(TERABYTE))?;
    let tell = |when: &str| -> anyhow::Result<()> {
        let mib = |name| status(daemon.pid(), name).map(|kib| kib as f64 / 1024.0);
        println!("{when:<58} {:>6.1} MiB {:>6.1} MiB", mib("VmRSS")?, mib("RssAnon")?);
        Ok(())
    };
    tell("no front-end is connected")?;
    let mut guest = Guest::connect(&daemon.socket(), &ram(TERABYTE)?)?;
    tell("a front-end shares its memory")?;
    for first in (0..TERABYTE / BLOCK).step_by(0x8000) {
        let plug = MemRequest::new(RequestType::Plug, ADDR + first * BLOCK, 0x8000);
        assert_eq!(guest.driver.execute(plug)?.kind(), ResponseType::Ack);
    }
    tell("all of it is plugged")
}

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args_os().skip(1);
    if args.next().is_some_and(|arg| arg == ECHO) {
        let socket = args.next().context("no socket")?;
        return echo::serve(Path::new(&socket));
    }
    on_cpus(|name, driver, back_end| {
        requests(&format!("Guest requests, {name}"), driver, back_end)
    })?;
    resident()
}

/// The table of requests, with the driver and the back-ends each on the given CPU.
fn requests(title: &str, driver: usize, back_end: usize) -> anyhow::Result<()> {
    stay_on(back_end)?;
    let options = DaemonOptions::new(ADDR, REGION).requested_size(REGION);
    let daemon = start(options.clone())?;
    let lasting = start(options.state_file())?;
    let peer = Peer::start()?;
    stay_on(driver)?;
    let mut ours = Guest::connect(&daemon.socket(), &ram(REGION)?)?;
    let mut durable = Guest::connect(&lasting.socket(), &ram(REGION)?)?;
    let mut echo = peer.guest(&ram(REGION)?)?;
    head(title, "echo");
    latency("STATE", &mut ours, &mut echo, state);
    latency("PLUG then UNPLUG", &mut ours, &mut echo, Guest::plug_and_unplug);
    let what = "PLUG then UNPLUG, with a state file";
    latency(what, &mut durable, &mut echo, Guest::plug_and_unplug);
    throughput(&mut ours, &mut echo);
    Ok(())
}
