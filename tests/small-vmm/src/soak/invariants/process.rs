//! The daemons as processes: what they use has bounds, whatever is asked of them.

use std::collections::BTreeMap;
use std::fs;

use crate::soak::host::Host;
use crate::soak::world::World;

/// Memory of its own, bytes; guest memory is shared and not counted.
const MEMORY: u64 = 128 << 20;
const DESCRIPTORS: u64 = 512;
const THREADS: u64 = 128;

/// What a process uses.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Usage {
    pub(super) memory: u64,
    pub(super) threads: u64,
    pub(super) descriptors: u64,
}

impl Usage {
    /// None when there is no such process.
    pub(super) fn of(host: &Host) -> Option<Self> {
        let pid = host.pid();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let number = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        };
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count() as u64;
        let (memory, threads) = (number("RssAnon:")? * 1024, number("Threads:")?);
        Some(Self { memory, threads, descriptors })
    }
}

/// The names of a daemon's threads, each with how many have it.
pub(super) fn thread_names(host: &Host) -> BTreeMap<String, usize> {
    let mut names = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{}/task", host.pid())).into_iter().flatten().flatten() {
        // One that has ended meanwhile has none.
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        *names.entry(name.trim().to_owned()).or_default() += 1;
    }
    names
}

pub(super) fn look(world: &World) {
    for host in &world.hosts {
        let Some(usage) = Usage::of(host) else { continue };
        let Usage { memory, threads, descriptors } = usage;
        if memory > MEMORY || threads > THREADS || descriptors > DESCRIPTORS {
            let names = thread_names(host);
            let detail = format!("the daemon of host {}: {usage:?}, {names:?}", host.name);
            world.journal.violated("no process grows without bound", detail);
        }
    }
}
