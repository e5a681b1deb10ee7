//! A host: a daemon that comes and goes, and what it promises of its ends and starts.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::Signal;
use serde_json::Value;

use super::journal::Journal;
use super::random::Random;
use crate::api::{ApiClient, ApiResponse};
use crate::daemon::{Daemon, DaemonOptions, LogReader};

/// Guest-physical address of the region.
pub(super) const ADDR: u64 = 4 << 30;
/// Size of the region, bytes.
pub(super) const REGION: u64 = 512 << 20;
/// Size of its blocks.
pub(super) const BLOCK: u64 = 2 << 20;

/// How long SIGTERM may take: 2 s are promised, the rest is for a busy machine.
const TERM_BOUND: Duration = Duration::from_secs(6);

/// What must be the same after a restart.
const KEPT: [&str; 7] = [
    "addr",
    "region_size",
    "block_size",
    "node_id",
    "usable_region_size",
    "plugged_size",
    "requested_size",
];

pub(super) struct Host {
    pub(super) name: &'static str,
    daemon: Mutex<Daemon>,
    api: ApiClient,
    /// Discard clients of this host.
    clients: AtomicU64,
    /// Odd while the daemon is about to end, or not there.
    starts: AtomicU64,
}

/// Counted among the clients of a host.
pub(super) struct Client<'a>(&'a Host);

impl Drop for Client<'_> {
    fn drop(&mut self) {
        self.0.clients.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Host {
    pub(super) fn start(name: &'static str, binary: &Path) -> anyhow::Result<Self> {
        let options = DaemonOptions::new(ADDR, REGION).block_size(BLOCK);
        let daemon = Daemon::start(binary, options.discard_socket().state_file())?;
        let api = daemon.api();
        Ok(Self {
            name,
            daemon: Mutex::new(daemon),
            api,
            clients: AtomicU64::new(0),
            starts: AtomicU64::new(0),
        })
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.daemon().socket()
    }

    pub(super) fn discard_socket(&self) -> PathBuf {
        self.daemon().discard_socket()
    }

    pub(super) fn api_socket(&self) -> PathBuf {
        self.daemon().api_socket()
    }

    pub(super) fn pid(&self) -> u32 {
        self.daemon().pid()
    }

    /// A discard client of this host, until it is dropped.
    pub(super) fn client(&self) -> Client<'_> {
        self.clients.fetch_add(1, Ordering::SeqCst);
        Client(self)
    }

    pub(super) fn has_clients(&self) -> bool {
        self.clients.load(Ordering::SeqCst) != 0
    }

    /// Tells one daemon from the next, and from none.
    pub(super) fn starts(&self) -> u64 {
        self.starts.load(Ordering::SeqCst)
    }

    /// Whether the same daemon has been there since `starts` was read.
    pub(super) fn is_same(&self, starts: u64) -> bool {
        starts.is_multiple_of(2) && self.starts() == starts
    }

    /// A request to the API. None when the daemon had to go meanwhile; without an answer in time
    /// otherwise an invariant is violated. 503 is told by a daemon that has too much to do, and
    /// asked again.
    pub(super) fn ask(
        &self,
        journal: &Journal,
        request: impl Fn(&ApiClient) -> std::io::Result<ApiResponse>,
    ) -> Option<ApiResponse> {
        let since = Instant::now();
        loop {
            let starts = self.starts();
            match request(&self.api) {
                Ok(answer) if answer.status == 503 && since.elapsed() < Duration::from_secs(20) => {
                    journal.count("API requests answered 503", 1);
                    thread::sleep(Duration::from_millis(20));
                }
                Ok(answer) => return Some(answer),
                Err(_) if !self.is_same(starts) => return None,
                Err(error) => {
                    let detail = format!("host {}, API request: {error}", self.name);
                    journal.violated("every request is answered within a bound", detail);
                    return None;
                }
            }
        }
    }

    pub(super) fn device(&self, journal: &Journal) -> Option<Value> {
        self.ask(journal, |api| api.get("/v1/device")).map(|answer| answer.json())
    }

    /// Kills the daemon, or has it end; it is not there until [`restart`](Self::restart).
    pub(super) fn end(&self, journal: &Journal, random: &mut Random) -> anyhow::Result<()> {
        let kill = random.percent(70);
        let mut daemon = self.daemon();
        self.starts.fetch_or(1, Ordering::SeqCst);
        if kill {
            daemon.kill()?;
            journal.did("daemon killed", self.name);
        } else {
            if let Err(error) = daemon.terminate(TERM_BOUND) {
                journal.violated("the daemon ends on SIGTERM", error);
            }
            journal.did("daemon ended by SIGTERM", self.name);
        }
        Ok(())
    }

    pub(super) fn restart(&self) -> anyhow::Result<()> {
        let mut daemon = self.daemon();
        if !self.starts().is_multiple_of(2) {
            daemon.restart().with_context(|| format!("the daemon of host {}", self.name))?;
            self.starts.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Ends and restarts the daemon while neither guest nor API ask for anything: it must be as it
    /// was.
    pub(super) fn restart_and_compare(
        &self,
        journal: &Journal,
        random: &mut Random,
    ) -> anyhow::Result<()> {
        let before = (self.device(journal), self.blocks(journal));
        self.end(journal, random)?;
        self.restart()?;
        let after = (self.device(journal), self.blocks(journal));
        let (Some(old), Some(new)) = (before.0, after.0) else { return Ok(()) };
        for key in KEPT {
            if old[key] != new[key] {
                let detail = format!("host {}: {key} was {}, is {}", self.name, old[key], new[key]);
                journal.violated("state after a restart equals state before", detail);
            }
        }
        if before.1 != after.1 {
            let detail = format!("host {}: blocks {:?}, then {:?}", self.name, before.1, after.1);
            journal.violated("state after a restart equals state before", detail);
        }
        Ok(())
    }

    /// The plugged ranges, bytes from the start of the region.
    pub(super) fn blocks(&self, journal: &Journal) -> Option<Vec<std::ops::Range<u64>>> {
        let blocks = self.ask(journal, |api| api.get("/v1/device/blocks"))?.json();
        let number = |range: &Value, name: &str| range[name].as_u64();
        let ranges = blocks["plugged"].as_array()?.iter().map(|range| {
            let (offset, size) = (number(range, "offset")?, number(range, "size")?);
            Some(offset..offset + size)
        });
        ranges.collect()
    }

    /// Stops the daemon for a while.
    pub(super) fn pause(&self, time: Duration) -> anyhow::Result<()> {
        let daemon = self.daemon();
        daemon.signal(Signal::STOP)?;
        thread::sleep(time);
        daemon.signal(Signal::CONT)?;
        Ok(())
    }

    pub(super) fn set_log_reader(&self, reader: LogReader) {
        self.daemon().set_log_reader(reader);
    }

    /// Ends the daemon for good.
    pub(super) fn close(&self, journal: &Journal) {
        self.starts.fetch_or(1, Ordering::SeqCst);
        match self.daemon().terminate(TERM_BOUND) {
            Ok(status) if status.success() => {}
            Ok(status) => {
                let log = self.daemon().stderr();
                let tail: Vec<_> = log.lines().rev().take(5).collect();
                journal.violated("the daemon ends on SIGTERM", format!("{status}: {tail:?}"));
            }
            Err(error) => journal.violated("the daemon ends on SIGTERM", error),
        }
    }

    /// The end of what the daemon logged.
    pub(super) fn log(&self) -> String {
        let log = self.daemon().stderr();
        let lines: Vec<_> = log.lines().collect();
        let from = lines.len().saturating_sub(400);
        lines[from..].iter().map(|line| format!("  {}: {line}\n", self.name)).collect()
    }

    fn daemon(&self) -> MutexGuard<'_, Daemon> {
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
