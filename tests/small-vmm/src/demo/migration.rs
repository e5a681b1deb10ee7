//! The second part: a guest moves to another host while its vCPUs keep writing, once by a VMM that
//! asks what is discarded and once by one that does not.

use std::env;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::show::human;
use super::{ADDR, MIB, compare, host, progress};
use crate::daemon::{Daemon, DaemonOptions};
use crate::guest::Command;
use crate::machine::BOOT_SIZE;
use crate::memory::PAGE_SIZE;
use crate::migration::{Links, MigrateOptions, MigrationReport};
use crate::process::{Vmm, VmmOptions};

const TIMEOUT: Duration = Duration::from_secs(60);
/// How long the guest may stand still, milliseconds.
const DOWNTIME_LIMIT: u64 = 100;

/// So many times smaller is the region where all of it is read, to spare the host's memory.
const PART: u64 = 4;

/// What there is to move, bytes.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    region: u64,
    plugged: u64,
    touched: u64,
}

/// What came of one migration.
struct Outcome {
    sizes: Sizes,
    report: MigrationReport,
    /// What was resident of the region: at the source before and after, at the destination.
    resident: [u64; 3],
    compared: u64,
    wrong: Vec<String>,
}

/// Runs it; everything that was wrong.
pub(super) fn run(
    daemon: &Path,
    region: u64,
    tcp: bool,
    links: &Links,
) -> anyhow::Result<Vec<String>> {
    let start = Instant::now();
    let unit = region / 8;
    let touched = (unit * 3 / 10).next_multiple_of(2 * MIB);
    let sizes = Sizes { region, plugged: unit, touched };
    println!(
        "A guest of {} with {} plugged and {} written moves to another host over {}, while its \
         vCPUs keep writing.\n",
        human(region),
        human(sizes.plugged),
        human(touched),
        over(tcp, links),
    );
    let aware = migrate(daemon, sizes, tcp, links, true)?;
    let part = region / PART;
    let unaware = migrate(daemon, Sizes { region: part, ..sizes }, tcp, links, false)?;
    print_table(&aware, &unaware);
    println!(
        "\nThe second region is only {}: without asking what is discarded, all of it is read, \
         and the source comes to hold all of it.",
        human(part)
    );
    println!(
        "Memory ({} and {} that either side holds), block state and configuration are the same bit \
         by bit. The vCPUs went on and found no wrong page ({:.1} s).",
        human(aware.compared),
        human(unaware.compared),
        start.elapsed().as_secs_f64()
    );
    let name = |wrong: &[String], name: &str| -> Vec<String> {
        wrong.iter().map(|line| format!("{name}: {line}")).collect()
    };
    let mut wrong = name(&aware.wrong, "discard-aware migration");
    wrong.extend(name(&unaware.wrong, "migration that is not discard-aware"));
    Ok(wrong)
}

/// What it goes over, in words.
fn over(tcp: bool, links: &Links) -> String {
    let mut over = if tcp { "TCP" } else { "a Unix socket" }.to_owned();
    if links.channels != 0 {
        over = format!("{over} and {} channels for its pages", links.channels);
    }
    if let Some(level) = links.zstd {
        over = format!("{over}, compressed with zstd at level {level}");
    }
    if links.tls_dir.is_some() {
        over.push_str(", by TLS 1.3");
    }
    over
}

/// One migration between two daemons and two VMMs.
fn migrate(
    daemon: &Path,
    sizes: Sizes,
    tcp: bool,
    links: &Links,
    discard_aware: bool,
) -> anyhow::Result<Outcome> {
    let Sizes { region, plugged, touched } = sizes;
    let vmm = env::current_exe()?;
    let daemon_options = DaemonOptions::new(ADDR, region).discard_socket();
    let options = |incoming| VmmOptions {
        addr: ADDR,
        region_size: region,
        incoming,
        paused: incoming,
        compat_level: None,
    };
    let mut from_daemon = Daemon::start(daemon, daemon_options.clone().requested_size(plugged))?;
    let mut from = Vmm::start(&vmm, &from_daemon, &options(false))?;
    from.tell(Command::Settle { requested: plugged })?;
    // At both ends of what is plugged, with memory between that was never touched.
    let first = (touched / 3 * 2).next_multiple_of(PAGE_SIZE);
    for (offset, size) in [(0, first), (plugged - (touched - first), touched - first)] {
        from.tell(Command::Touch { offset, size })?;
    }
    // A guest that writes a quarter of its memory a second.
    from.tell(Command::Pace { pages: Some(touched / PAGE_SIZE / 4) })?;
    let before = from.report()?.resident;

    let mut to_daemon = Daemon::start(daemon, daemon_options)?;
    let mut to = Vmm::start(&vmm, &to_daemon, &options(true))?;
    let unix = format!("unix:{}", to_daemon.socket().with_file_name("migrate.sock").display());
    let address = if tcp { "tcp:127.0.0.1:0" } else { &unix };
    let address = to.wait_over(address, discard_aware, links)?;
    from.tell(Command::Migrate(MigrateOptions {
        to: address,
        // Slow enough to be seen.
        max_bandwidth: Some(touched * 2 / 3),
        downtime_limit: Some(DOWNTIME_LIMIT),
        discard_aware,
        elastic: true,
        postcopy: None,
        links: links.clone(),
    }))?;
    let name = if discard_aware { "discard-aware" } else { "not aware" };
    let report = progress::follow(&mut from, name, |_, _| Ok(()))?;
    ensure!(
        report.status == "completed",
        "the migration {}: {}",
        report.status,
        report.error_desc.unwrap_or_default()
    );
    let loaded = to.wait_migration(TIMEOUT)?;
    ensure!(loaded.status == "completed", "the destination: {:?}", loaded.error_desc);

    // The guest waits over there, so that nothing changes while it is compared.
    let (compared, mut wrong) = compare::memory(&mut from, &mut to)?;
    wrong.extend(compare::devices(&from_daemon.api(), &to_daemon.api())?);
    let resident = [before, from.report()?.resident, to.report()?.resident];
    to.tell(Command::Cont)?;
    to.verify(2 * touched / PAGE_SIZE, TIMEOUT).context("the guest at the destination")?;
    let more = plugged + host::step(plugged);
    ensure!(to_daemon.api().resize(more)?.is_success(), "the second daemon refuses to resize");
    to.tell(Command::Settle { requested: more }).context("the device at the destination")?;
    from.quit()?;
    to.quit()?;
    for daemon in [&mut from_daemon, &mut to_daemon] {
        let status = daemon.terminate(Duration::from_secs(2))?;
        if !status.success() {
            wrong.push(format!("a daemon ended with {status}: {}", daemon.stderr()));
        }
    }
    let mut outcome = Outcome { sizes, report, resident, compared, wrong };
    outcome.check(discard_aware, links.zstd.is_some());
    Ok(outcome)
}

impl Outcome {
    /// Checks what must be so, whatever the guest was doing.
    fn check(&mut self, discard_aware: bool, compressed: bool) {
        let Sizes { region, plugged, touched } = self.sizes;
        let ram = self.report.ram;
        let pages = |bytes: u64| bytes / PAGE_SIZE;
        let boot = pages(BOOT_SIZE);
        let mut wrong = Vec::new();
        let mut is = |what: &str, found: u64, low: u64, high: u64| {
            if found < low || found > high {
                wrong.push(format!("{what}: {found}, not {low} to {high}"));
            }
        };
        let all = pages(region) + boot;
        let known = pages(ram.total) + ram.discarded + ram.holes;
        is("pages to send, discarded and holes", known, all, all);
        is("pages sent", ram.normal, pages(touched), u64::MAX);
        // A page costs 8 bytes more than itself, a zero page 9; what vCPUs know is 24 bytes a page.
        let least = ram.normal * PAGE_SIZE + 8 * (ram.normal + ram.duplicate);
        let most = least + ram.duplicate + 32 * pages(touched) + MIB;
        // What vCPUs write here shrinks to next to nothing.
        is("bytes sent", ram.transferred, if compressed { 1 } else { least }, most);
        is("pages written although discarded", ram.dirty_while_discarded, 0, 0);
        is("rounds", ram.dirty_sync_count, 2, u64::MAX);
        let downtime = self.report.downtime.unwrap_or(f64::MAX);
        is("downtime (ms)", downtime as u64, 0, 30_000);
        let [before, after, arrived] = self.resident;
        is("resident at the source before", before, touched, touched);
        is("resident at the destination", arrived, touched, touched);
        if discard_aware {
            is("discarded", ram.discarded, pages(region - plugged), pages(region - plugged));
            let untouched = pages(plugged - touched);
            is("holes", ram.holes, untouched, untouched + boot);
            is("zero", ram.duplicate, 0, boot);
            is("resident at the source after", after, touched, touched);
        } else {
            is("discarded", ram.discarded, 0, 0);
            is("holes", ram.holes, 0, boot);
            is("zero", ram.duplicate, pages(region - touched), u64::MAX);
            is("resident at the source after", after, region, region);
        }
        self.wrong.append(&mut wrong);
    }
}

fn print_table(aware: &Outcome, unaware: &Outcome) {
    type Column = fn(&Outcome) -> String;
    let rows: [(&str, Column); 12] = [
        ("region", |o| human(o.sizes.region)),
        ("bytes sent", |o| human(o.report.ram.transferred)),
        ("pages discarded, not sent", |o| o.report.ram.discarded.to_string()),
        ("pages never touched, not sent", |o| o.report.ram.holes.to_string()),
        ("pages sent as zeros", |o| o.report.ram.duplicate.to_string()),
        ("pages sent", |o| o.report.ram.normal.to_string()),
        ("rounds", |o| o.report.ram.dirty_sync_count.to_string()),
        ("total time", |o| format!("{:.2} s", o.report.total_time / 1000.0)),
        ("downtime", |o| format!("{:.0} ms", o.report.downtime.unwrap_or_default())),
        ("source resident before", |o| human(o.resident[0])),
        ("source resident after", |o| human(o.resident[1])),
        ("destination resident", |o| human(o.resident[2])),
    ];
    println!("{:<32}{:>15}{:>15}", "migration", "discard-aware", "not aware");
    for (name, column) in rows {
        println!("{name:<32}{:>15}{:>15}", column(aware), column(unaware));
    }
}
