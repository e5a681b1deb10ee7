//! What `/proc` and `/sys` tell of a host.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

/// A host, by its root directory: another one than `/` in tests.
pub(super) struct Host {
    root: PathBuf,
}

/// A mounted file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) kind: String,
    /// Options of the file system itself.
    pub(super) options: String,
}

/// A pool of huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pool {
    /// Bytes of a page.
    pub(super) page_size: u64,
    /// Pages that are free and not reserved.
    pub(super) free: u64,
}

impl Host {
    pub(super) fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// A file's text without what surrounds it.
    pub(super) fn text(&self, path: &str) -> Option<String> {
        Some(fs::read_to_string(self.path(path)).ok()?.trim().to_owned())
    }

    pub(super) fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    /// The choice in brackets, as in `always [madvise] never`.
    pub(super) fn choice(&self, path: &str) -> Option<String> {
        let text = self.text(path)?;
        let (_, rest) = text.split_once('[')?;
        Some(rest.split_once(']')?.0.to_owned())
    }

    /// Whether this process may open a file so.
    pub(super) fn opens(&self, path: &str, write: bool) -> bool {
        OpenOptions::new().read(true).write(write).open(self.path(path)).is_ok()
    }

    /// Bytes of a line of `/proc/meminfo`.
    pub(super) fn memory(&self, name: &str) -> Option<u64> {
        let text = self.text("proc/meminfo")?;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?.checked_mul(1024)
    }

    /// Bits of a physical address of this CPU.
    pub(super) fn phys_bits(&self) -> Option<u32> {
        let text = self.text("proc/cpuinfo")?;
        let line = text.lines().find(|line| line.starts_with("address sizes"))?;
        line.split_once(':')?.1.trim().split(' ').next()?.parse().ok()
    }

    /// A soft limit of this process; `None` when it is not known, `Some(None)` when there is none.
    pub(super) fn limit(&self, name: &str) -> Option<Option<u64>> {
        let text = self.text("proc/self/limits")?;
        let soft = text.lines().find_map(|line| line.strip_prefix(name))?;
        let soft = soft.split_whitespace().next()?;
        if soft == "unlimited" { Some(None) } else { soft.parse().ok().map(Some) }
    }

    /// Whether this process has a capability.
    pub(super) fn has_capability(&self, bit: u32) -> bool {
        let text = self.text("proc/self/status").unwrap_or_default();
        let effective = text.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let bits = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
        bits.is_some_and(|bits| bits >> bit & 1 != 0)
    }

    /// Major and minor version of the kernel.
    pub(super) fn kernel(&self) -> Option<(u32, u32)> {
        let text = self.text("proc/sys/kernel/osrelease")?;
        let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    }

    /// What is mounted there.
    pub(super) fn mount(&self, point: &str) -> Option<Mount> {
        let text = self.text("proc/self/mountinfo")?;
        // The last one hides those before.
        text.lines().rev().find_map(|line| {
            let (place, system) = line.split_once(" - ")?;
            let mut system = system.split(' ');
            let (kind, options) = (system.next()?.to_owned(), system.nth(1)?.to_owned());
            (place.split(' ').nth(4)? == point).then_some(Mount { kind, options })
        })
    }

    /// The pools of huge pages, smallest pages first.
    pub(super) fn pools(&self) -> Vec<Pool> {
        let base = "sys/kernel/mm/hugepages";
        let names = fs::read_dir(self.path(base)).into_iter().flatten().flatten();
        let mut pools: Vec<_> = names
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
                let count = |file: &str| self.number(&format!("{base}/{name}/{file}"));
                let free = count("free_hugepages")?.saturating_sub(count("resv_hugepages")?);
                Some(Pool { page_size: kib.checked_mul(1024)?, free })
            })
            .collect();
        pools.sort_by_key(|pool| pool.page_size);
        pools
    }

    /// Opens the file that is to be the guest's memory. It is named as the user sees it.
    pub(super) fn open(path: &Path) -> std::io::Result<File> {
        // A pipe in its place is not waited for.
        rustix::fs::open(
            path,
            rustix::fs::OFlags::RDONLY
                | rustix::fs::OFlags::NONBLOCK
                | rustix::fs::OFlags::NOCTTY
                | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )
        .map(File::from)
        .map_err(Into::into)
    }
}
