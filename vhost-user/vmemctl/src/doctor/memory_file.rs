//! The file behind the region.

use std::path::Path;

use program::size::format_size;
use rustix::fs::{SealFlags, fcntl_get_seals, fstat, fstatfs};

use super::host::Host;
use super::{Check, Plan};

/// Magic numbers of file systems.
const TMPFS: u64 = 0x0102_1994;
const HUGETLBFS: u64 = 0x9584_58f6;

pub(super) fn check(path: &Path, host: &Host, plan: &Plan) -> Check {
    let name = "memory file";
    let region = plan.region.as_ref();
    let size = region.map_or(0, |region| region.size);
    let found = |what: &str| format!("{}: {what}", path.display());
    let opened = Host::open(path).and_then(|file| Ok((fstat(&file)?, fstatfs(&file)?, file)));
    let (stat, system, file) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            let advice = "name the file that the VMM has, or the directory where it is to be";
            return Check::problem(name, found(&error.to_string()), advice);
        }
    };
    // The type has other widths elsewhere.
    let magic = u64::try_from(system.f_type).unwrap_or(0);
    let block = u64::try_from(system.f_bsize).unwrap_or(0);
    let free = system.f_bavail.saturating_mul(block);
    if let Ok(seals) = fcntl_get_seals(&file)
        && seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE)
    {
        let advice = "nothing can be discarded in it, and the daemon refuses it: make the memory \
                      without F_SEAL_WRITE and F_SEAL_FUTURE_WRITE";
        return Check::problem(name, found("sealed against writes"), advice);
    }
    if magic == HUGETLBFS {
        let device_block = region.and_then(|region| region.block_size);
        if device_block.is_some_and(|device_block| device_block < block) {
            return Check::problem(
                name,
                found(&format!("huge pages of {}", format_size(block))),
                "larger than the device's blocks, which the daemon refuses: choose --block-size at \
                 least as large",
            );
        }
        let pool = host.pools().into_iter().find(|pool| pool.page_size == block);
        let free = pool.map_or(free, |pool| pool.free.saturating_mul(pool.page_size));
        let what =
            found(&format!("huge pages of {}, {} free", format_size(block), format_size(free)));
        if free < size {
            let advice = "a guest that plugs more is told BUSY: enlarge the pool (nr_hugepages)";
            return Check::warning(name, what, advice);
        }
        return Check::ok(name, what);
    }
    if magic != TMPFS {
        return Check::problem(
            name,
            found("not in memory (memfd, tmpfs or hugetlbfs)"),
            "the daemon refuses it unless started with --allow-file-memory",
        );
    }
    // Files of the kernel's own mount (memfd) are not bounded.
    let bounded = system.f_blocks != 0;
    let held = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
    if bounded && free.saturating_add(held) < size {
        let what =
            found(&format!("tmpfs with room for {}", format_size(free.saturating_add(held))));
        let advice = "a guest that uses more ends by SIGBUS: remount it with a larger size=, or use a \
                      memfd";
        return Check::problem(name, what, advice);
    }
    Check::ok(name, found("in memory"))
}
