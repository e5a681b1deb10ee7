//! A guest moves to another host before its memory does, also over a channel that breaks.
//!
//! Its vCPUs only look at their memory over there until it was compared, which asks for it just
//! as well. The daemon waits for the pages that it misses (vhost-user's PAGEFAULT), so that the
//! device answers the guest before all memory is there.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::host::{Host, Sizes, TIMEOUT};
use super::show::{human, latency, print_rows};
use super::{compare, progress};
use crate::guest::{Command, State};
use crate::machine::Machine;
use crate::memory::PAGE_SIZE;
use crate::migration::{Links, MigrateOptions, MigrationReport, PostcopyOptions, When};
use crate::process::Vmm;
use crate::relay::Relay;

/// Runs it; everything that was wrong.
pub(super) fn run(
    daemon: &Path,
    region: u64,
    tcp: bool,
    break_channel: bool,
) -> anyhow::Result<Vec<String>> {
    let start = Instant::now();
    let sizes = Sizes::of_region(region);
    println!(
        "A guest of {} with {} plugged and {} written moves to another host over {}; after a third \
         of its memory the guest goes first{}.\n",
        human(region),
        human(sizes.plugged),
        human(sizes.touched),
        if tcp { "TCP" } else { "a Unix socket" },
        if break_channel { ", and then the channel breaks" } else { "" },
    );
    let mut from = Host::with_guest(daemon, sizes)?;
    let mut to = Host::waiting_in_postcopy(daemon, sizes)?;
    let before = from.resident()?;
    to.vmm.tell(Command::ReadOnly { on: true })?;

    let socket = |name: &str| match tcp {
        true => "tcp:127.0.0.1:0".to_owned(),
        false => format!("unix:{}", to.daemon.socket().with_file_name(name).display()),
    };
    let (listen, between) = (socket("migrate.sock"), socket("relay.sock"));
    let address = to.vmm.wait_for_guest_in_postcopy(&listen)?;
    let relay = break_channel.then(|| Relay::start(&between, &address)).transpose()?;
    from.vmm.tell(Command::Migrate(MigrateOptions {
        to: relay.as_ref().map_or(address.as_str(), Relay::address).to_owned(),
        max_bandwidth: Some(sizes.touched * 2 / 3),
        downtime_limit: None,
        discard_aware: true,
        elastic: true,
        postcopy: Some(PostcopyOptions { when: When::Told, recover: Some(address.clone()) }),
        links: Links::default(),
    }))?;
    let mut story = Story { sizes, relay, to: &mut to.vmm, told: false, looked: false };
    let sent =
        progress::follow(&mut from.vmm, "postcopy", |from, report| story.go_on(from, report))?;
    ensure!(sent.status == "completed", "the migration {}: {:?}", sent.status, sent.error_desc);
    // Of a small guest all may have come before it was seen to run there.
    story.look(&sent)?;
    let loaded = to.vmm.wait_migration(TIMEOUT)?;
    ensure!(loaded.status == "completed", "the destination: {:?}", loaded.error_desc);
    to.vmm.verify(2 * sizes.touched / PAGE_SIZE, TIMEOUT).context("the guest over there")?;

    // The device has answered over there.
    let (compared, mut wrong) =
        compare::memory_beside(&mut from.vmm, &mut to.vmm, Machine::queue_memory())?;
    wrong.extend(compare::devices(&from.daemon.api(), &to.daemon.api())?);
    let resident = [before, from.resident()?, to.resident()?];
    to.go_on(sizes)?;
    check(sizes, &sent, &loaded, resident, break_channel, &mut wrong);
    print_table(&sent, &loaded, resident);
    println!(
        "\nMemory ({} that either side holds), block state and configuration are the same bit by \
         bit. The vCPUs went on and found no wrong page ({:.1} s).",
        human(compared),
        start.elapsed().as_secs_f64()
    );
    for host in [from, to] {
        wrong.extend(host.end()?);
    }
    Ok(wrong.into_iter().map(|line| format!("postcopy: {line}")).collect())
}

/// What happens while the guest moves.
struct Story<'a> {
    sizes: Sizes,
    /// Between both sides, when it is to break.
    relay: Option<Relay>,
    to: &'a mut Vmm,
    told: bool,
    looked: bool,
}

impl Story<'_> {
    fn go_on(&mut self, from: &mut Vmm, report: &MigrationReport) -> anyhow::Result<()> {
        let third = self.sizes.touched / 3;
        if !self.told && report.ram.transferred >= third {
            // What is under way in precopy and the devices are much less than that, so that it is
            // memory of postcopy that is held back.
            if let Some(relay) = &self.relay {
                relay.hold_after(third);
            }
            from.tell(Command::StartPostcopy)?;
            self.told = true;
        }
        if report.status != "postcopy-active" {
            return Ok(());
        }
        self.look(report)?;
        if self.relay.as_ref().is_some_and(Relay::is_holding) {
            println!("the channel breaks with {} left", human(report.ram.remaining));
            self.relay = None;
        }
        Ok(())
    }

    /// Has the guest over there look at the gap, and ask its device, once.
    fn look(&mut self, report: &MigrationReport) -> anyhow::Result<()> {
        if self.looked {
            return Ok(());
        }
        let (offset, size) = self.sizes.gap();
        self.to.tell(Command::Look { offset, size })?;
        // The source knows that the guest is taken before it runs.
        let start = Instant::now();
        while !self.to.report()?.running {
            ensure!(start.elapsed() < TIMEOUT, "the guest does not run over there");
            thread::sleep(Duration::from_millis(1));
        }
        let (offset, size) = (0, self.sizes.plugged);
        let answered = self.to.tell(Command::AskState { offset, size })?.state;
        ensure!(answered == Some(State::Plugged), "the device says {answered:?} of all of it");
        println!("the device over there answers with {} left", human(report.ram.remaining));
        self.looked = true;
        Ok(())
    }
}

/// Checks what must be so, whatever the guest was doing.
fn check(
    sizes: Sizes,
    sent: &MigrationReport,
    loaded: &MigrationReport,
    resident: [u64; 3],
    break_channel: bool,
    wrong: &mut Vec<String>,
) {
    let Sizes { region, plugged, touched } = sizes;
    let faults = loaded.faults.unwrap_or_default();
    let breaks = u64::from(break_channel);
    let mut is = |what: &str, found: u64, low: u64, high: u64| {
        if found < low || found > high {
            wrong.push(format!("{what}: {found}, not {low} to {high}"));
        }
    };
    is("times recovered at the source", sent.recoveries, breaks, breaks);
    is("times recovered at the destination", loaded.recoveries, breaks, breaks);
    let discarded = (region - plugged) / PAGE_SIZE;
    is("discarded", sent.ram.discarded, discarded, discarded);
    is("pages sent", sent.ram.normal, touched / PAGE_SIZE, u64::MAX);
    is("pages written although discarded", sent.ram.dirty_while_discarded, 0, 0);
    is("pages of zeros", faults.zero, 0, Sizes::GAP / PAGE_SIZE);
    let [before, after, arrived] = resident;
    is("resident at the source before", before, touched, touched);
    is("resident at the source after", after, touched, touched);
    // The guest has looked at the gap there, which takes memory.
    is("resident at the destination", arrived, touched + Sizes::GAP, touched + Sizes::GAP);
}

fn print_table(sent: &MigrationReport, loaded: &MigrationReport, resident: [u64; 3]) {
    let faults = loaded.faults.unwrap_or_default();
    print_rows(
        "postcopy",
        &[
            ("status", sent.status.clone()),
            ("bytes sent", human(sent.ram.transferred)),
            ("pages discarded, not sent", sent.ram.discarded.to_string()),
            ("pages never touched, not sent", sent.ram.holes.to_string()),
            ("pages sent", sent.ram.normal.to_string()),
            ("pages asked for by faults", faults.asked.to_string()),
            ("pages of zeros on the spot", faults.zero.to_string()),
            ("a fault takes, half of them", latency(faults.p50)),
            ("a fault takes, 99 of 100", latency(faults.p99)),
            ("recovered over a new channel", sent.recoveries.to_string()),
            ("total time", format!("{:.2} s", sent.total_time / 1000.0)),
            ("downtime", format!("{:.0} ms", sent.downtime.unwrap_or_default())),
            ("source resident before", human(resident[0])),
            ("source resident after", human(resident[1])),
            ("destination resident", human(resident[2])),
        ],
    );
}
