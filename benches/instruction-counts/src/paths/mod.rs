//! The hot paths. Each uses the library as its users do, and does enough work that what is not
//! work does not matter.

mod mask;
mod receive;
mod region;
mod replay;
mod request;
mod send;
mod zero_scan;

use anyhow::Result;
use ram_discard::MemoryState;

use crate::paths::send::Dirty;
use crate::paths::zero_scan::Page;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Something that is done once for every page, range or request.
pub struct HotPath {
    /// What it is called in the baseline.
    pub name: &'static str,
    /// What a unit of its work is.
    pub per: &'static str,
    /// Does the work, and tells how many units it was.
    pub run: fn() -> Result<u64>,
}

/// All of them.
pub const PATHS: &[HotPath] = &[
    path("mask/every-other-2MiB", "range", || mask::clear(2 * MIB)),
    path("mask/every-other-128KiB", "range", || mask::clear(128 * KIB)),
    path("mask/setup-every-other-2MiB", "range", || mask::setup(2 * MIB)),
    path("mask/again-every-other-2MiB", "range", || mask::again(2 * MIB)),
    path("receive/contiguous", "page", || receive::pages(Dirty::All)),
    path("receive/every-other-page", "page", || receive::pages(Dirty::EveryOther)),
    path("receive/zeros", "page", || receive::pages(Dirty::Zeros)),
    path("replay/discarded-every-other", "range", || replay::every_other(MemoryState::Discarded)),
    path("replay/populated-every-other", "range", || replay::every_other(MemoryState::Populated)),
    path("replay/populated-long-runs", "range", replay::long_runs),
    path("request/plug-and-unplug", "request", request::plug_and_unplug),
    path("request/state", "request", request::state),
    path("runs/every-other-page", "run", || send::runs(2)),
    path("runs/far-apart", "run", || send::runs(1 << 14)),
    path("send/contiguous", "page", || send::pages(Dirty::All)),
    path("send/every-other-page", "page", || send::pages(Dirty::EveryOther)),
    path("send/zeros", "page", || send::pages(Dirty::Zeros)),
    path("zero-scan/early", "page", || zero_scan::scan(Page::Early)),
    path("zero-scan/late", "page", || zero_scan::scan(Page::Late)),
    path("zero-scan/zeros", "page", || zero_scan::scan(Page::Zeros)),
];

const fn path(name: &'static str, per: &'static str, run: fn() -> Result<u64>) -> HotPath {
    HotPath { name, per, run }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_works_and_has_a_name_of_its_own() {
        for (at, path) in PATHS.iter().enumerate() {
            assert!(PATHS[..at].iter().all(|other| other.name != path.name), "{}", path.name);
            let units = (path.run)().unwrap_or_else(|error| panic!("{}: {error:#}", path.name));
            assert!(units >= 100, "{}: only {units}", path.name);
        }
    }
}
