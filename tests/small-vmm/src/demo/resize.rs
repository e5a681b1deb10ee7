//! A guest grows and shrinks while it moves to another host.
//!
//! Memory is sent slowly at first, so that nothing but the first pages has gone by the time that the guest has been
//! resized: whatever was plugged, written and unplugged until then can never be sent. Then it is sent as usual.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::host::{Host, Sizes, TIMEOUT};
use super::show::{human, print_rows};
use super::{compare, host, progress};
use crate::guest::Command;
use crate::machine::Machine;
use crate::memory::PAGE_SIZE;
use crate::migration::{Links, MigrateOptions, MigrationReport, PostcopyOptions, When};
use crate::process::Vmm;

/// How often the guest grows, writes what came, and shrinks again.
const TIMES: u64 = 3;

/// What the guest was asked for while it moved.
#[derive(Clone, Copy, Debug, Default)]
struct Meanwhile {
    resizes: u64,
    /// Requests that the device did, and those that it was too busy for.
    served: u64,
    busy: u64,
    /// Bytes that the host held for blocks which were plugged and unplugged again.
    gone: u64,
    /// Bytes that had been sent by then.
    sent: u64,
}

/// Runs it; everything that was wrong.
pub(super) fn run(
    daemon: &Path,
    region: u64,
    tcp: bool,
    links: &Links,
    postcopy: bool,
) -> anyhow::Result<Vec<String>> {
    let start = Instant::now();
    let sizes = Sizes::of_region(region);
    println!(
        "A guest of {} with {} plugged and {} written grows and shrinks while it moves to another host over {}{}{}.\n",
        human(region),
        human(sizes.plugged),
        human(sizes.touched),
        if tcp { "TCP" } else { "a Unix socket" },
        if links.tls_dir.is_some() { ", by TLS 1.3" } else { "" },
        if postcopy { "; then it goes before its memory does" } else { "" },
    );
    let mut from = Host::with_guest(daemon, sizes)?;
    let mut to = match postcopy {
        true => Host::waiting_in_postcopy(daemon, sizes)?,
        false => Host::waiting(daemon, sizes, true)?,
    };
    if postcopy {
        to.vmm.tell(Command::ReadOnly { on: true })?;
    }
    let listen = match tcp {
        true => "tcp:127.0.0.1:0".to_owned(),
        false => format!("unix:{}", to.daemon.socket().with_file_name("migrate.sock").display()),
    };
    let incoming =
        Command::Incoming { from: listen, discard_aware: true, postcopy, links: links.clone() };
    let address = to.vmm.tell(incoming)?.listening.context("it does not listen")?;
    from.vmm.tell(Command::Migrate(MigrateOptions {
        to: address,
        max_bandwidth: Some(sizes.touched / 100),
        downtime_limit: Some(100),
        discard_aware: true,
        elastic: true,
        postcopy: postcopy.then_some(PostcopyOptions { when: When::Told, recover: None }),
        links: links.clone(),
    }))?;
    let mut meanwhile = None;
    let Host { vmm, daemon: device } = &mut from;
    let sent = progress::follow(vmm, "resize", |vmm, report| {
        let frozen = device.api().device()?["migration_active"] == true;
        if meanwhile.is_none() && report.status == "active" && !frozen {
            let mut resizes = Resizes {
                vmm,
                sizes,
                meanwhile: Meanwhile::default(),
                resize: &mut |bytes| {
                    ensure!(
                        device.api().resize(bytes)?.is_success(),
                        "the daemon refuses to resize"
                    );
                    Ok(())
                },
            };
            meanwhile = Some(resizes.run()?);
            if postcopy {
                vmm.tell(Command::StartPostcopy)?;
            }
            vmm.tell(Command::Bandwidth { max: sizes.touched * 2 / 3 })?;
        }
        Ok(())
    })?;
    ensure!(sent.status == "completed", "the migration {}: {:?}", sent.status, sent.error_desc);
    let meanwhile = meanwhile.context("block state could not be changed while the guest moved")?;
    let loaded = to.vmm.wait_migration(TIMEOUT)?;
    ensure!(loaded.status == "completed", "the destination: {:?}", loaded.error_desc);

    let used = if postcopy { Machine::queue_memory() } else { 0..0 };
    let (compared, mut wrong) = compare::memory_beside(&mut from.vmm, &mut to.vmm, used)?;
    wrong.extend(compare::devices(&from.daemon.api(), &to.daemon.api())?);
    let resident = [from.resident()?, to.resident()?];
    if !postcopy {
        to.vmm.tell(Command::Cont)?;
    }
    to.go_on(sizes)?;
    check(sizes, &meanwhile, &sent, resident, &mut wrong);
    print_table(&meanwhile, &sent, resident);
    println!(
        "\nOf {} that came, were written and went before their turn, nothing was sent. Memory ({} that either side \
         holds), block state and configuration are the same bit by bit. The vCPUs went on and found no wrong page \
         ({:.1} s).",
        human(meanwhile.gone),
        human(compared),
        start.elapsed().as_secs_f64()
    );
    for host in [from, to] {
        wrong.extend(host.end()?);
    }
    Ok(wrong.into_iter().map(|line| format!("resize: {line}")).collect())
}

/// The administrator resizes the guest, which does it.
struct Resizes<'a> {
    vmm: &'a mut Vmm,
    sizes: Sizes,
    meanwhile: Meanwhile,
    resize: &'a mut dyn FnMut(u64) -> anyhow::Result<()>,
}

impl Resizes<'_> {
    fn run(&mut self) -> anyhow::Result<Meanwhile> {
        let plugged = self.sizes.plugged;
        let step = host::step(plugged);
        let before = self.vmm.report()?;
        for _ in 0..TIMES {
            self.to(plugged + step)?;
            let held = self.vmm.report()?.resident;
            // The lower half; nothing else that is written takes more memory.
            self.vmm.tell(Command::Pace { pages: None })?;
            self.vmm.tell(Command::Touch { offset: plugged, size: step / 2 })?;
            self.wait_resident(held + step / 2)?;
            let pages = self.sizes.touched / PAGE_SIZE / 4;
            self.vmm.tell(Command::Pace { pages: Some(pages) })?;
            self.to(plugged)?;
            let left = self.vmm.report()?.resident;
            self.meanwhile.gone += held + step / 2 - left;
        }
        let report = self.vmm.report()?;
        self.meanwhile.sent = report.migration.context("no migration")?.ram.transferred;
        // What had been written goes as well; what comes in its place holds nothing.
        self.to(plugged - step)?;
        self.to(plugged + step)?;
        let after = self.vmm.report()?;
        self.meanwhile.served = after.served - before.served;
        self.meanwhile.busy = after.busy - before.busy;
        Ok(self.meanwhile)
    }

    fn to(&mut self, requested: u64) -> anyhow::Result<()> {
        (self.resize)(requested)?;
        self.vmm.tell(Command::Settle { requested }).context("a resize while the guest moves")?;
        self.meanwhile.resizes += 1;
        Ok(())
    }

    fn wait_resident(&mut self, wanted: u64) -> anyhow::Result<()> {
        let start = Instant::now();
        loop {
            let resident = self.vmm.report()?.resident;
            if resident >= wanted {
                return Ok(());
            }
            ensure!(start.elapsed() < TIMEOUT, "{resident} bytes are resident, not {wanted}");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Checks what must be so, whatever the guest was doing.
fn check(
    sizes: Sizes,
    meanwhile: &Meanwhile,
    sent: &MigrationReport,
    resident: [u64; 2],
    wrong: &mut Vec<String>,
) {
    let mut is = |what: &str, found: u64, low: u64, high: u64| {
        if found < low || found > high {
            wrong.push(format!("{what}: {found}, not {low} to {high}"));
        }
    };
    let step = host::step(sizes.plugged);
    is("resizes", meanwhile.resizes, 2 * TIMES + 2, 2 * TIMES + 2);
    is("requests served", meanwhile.served, 2 * TIMES + 2, u64::MAX);
    is("what came and went", meanwhile.gone, TIMES * step / 2, TIMES * step / 2);
    // The blocks that came and went are behind all that had been written before.
    is("bytes sent by then", meanwhile.sent, 1, sizes.touched * 3 / 4);
    is("pages written although discarded", sent.ram.dirty_while_discarded, 0, 0);
    is("times that block state was frozen", u64::from(sent.busy_time.is_some()), 1, 1);
    let [here, there] = resident;
    is("resident at the destination", there, here, here);
}

fn print_table(meanwhile: &Meanwhile, sent: &MigrationReport, resident: [u64; 2]) {
    let milliseconds = |time: Option<f64>| format!("{:.0} ms", time.unwrap_or_default());
    print_rows(
        "resize",
        &[
            ("status", sent.status.clone()),
            ("resizes while it moved", meanwhile.resizes.to_string()),
            ("guest requests served", meanwhile.served.to_string()),
            ("answered with BUSY", meanwhile.busy.to_string()),
            ("came, was written, and went", human(meanwhile.gone)),
            ("sent by then", human(meanwhile.sent)),
            ("bytes sent", human(sent.ram.transferred)),
            ("pages sent", sent.ram.normal.to_string()),
            ("rounds", sent.ram.dirty_sync_count.to_string()),
            ("total time", format!("{:.2} s", sent.total_time / 1000.0)),
            ("block state frozen (busy_time)", milliseconds(sent.busy_time)),
            ("downtime", milliseconds(sent.downtime)),
            ("source resident", human(resident[0])),
            ("destination resident", human(resident[1])),
        ],
    );
}
