//! What the host has of memory, and how it hands it out.

use program::size::format_size;

use super::host::Host;
use super::{Check, Plan};

pub(super) fn checks(host: &Host, plan: &Plan) -> Vec<Check> {
    let size = plan.region.as_ref().map_or(0, |region| region.size);
    let mut checks = vec![memory(host, size), overcommit(host, size), huge_pages(host)];
    checks.push(shm(host, size));
    checks.push(hugetlb(host));
    checks
}

fn memory(host: &Host, size: u64) -> Check {
    let name = "memory";
    let Some(total) = host.memory("MemTotal") else {
        return Check::problem(name, "/proc/meminfo cannot be read", "mount /proc");
    };
    let swap = host.memory("SwapTotal").unwrap_or(0);
    let found = format!("the host has {}, and {} of swap", format_size(total), format_size(swap));
    if size > total.saturating_add(swap) {
        let advice = "a guest that plugs and uses all of its region runs the host out of memory: \
                      bound the requested size";
        Check::warning(name, format!("{found}; the region has {}", format_size(size)), advice)
    } else {
        Check::ok(name, found)
    }
}

fn overcommit(host: &Host, size: u64) -> Check {
    let name = "overcommit";
    let Some(mode) = host.number("proc/sys/vm/overcommit_memory") else {
        return Check::warning(name, "vm.overcommit_memory is not known", "mount /proc");
    };
    if mode != 2 {
        return Check::ok(name, format!("vm.overcommit_memory is {mode}"));
    }
    let amount = |line| host.memory(line).unwrap_or(0);
    let left = amount("CommitLimit").saturating_sub(amount("Committed_AS"));
    let found = format!("vm.overcommit_memory is 2, with {} left", format_size(left));
    let advice = "the whole region counts when the VMM makes its memory: set vm.overcommit_memory \
                  to 0, or raise vm.overcommit_ratio";
    if size > left {
        Check::problem(name, found, advice)
    } else {
        Check::warning(name, found, advice)
    }
}

fn huge_pages(host: &Host) -> Check {
    let (name, base) = ("huge pages", "sys/kernel/mm/transparent_hugepage");
    let choice = |file: &str| host.choice(&format!("{base}/{file}"));
    let Some(shmem) = choice("shmem_enabled") else {
        let advice = "a guest is slower on pages of 4 KiB: a kernel with transparent huge pages, or \
                      hugetlb";
        return Check::warning(name, "no transparent huge pages for shared memory", advice);
    };
    let found = format!("transparent huge pages of shared memory: {shmem}");
    match shmem.as_str() {
        "never" | "deny" => Check::warning(
            name,
            found,
            format!(
                "echo advise > /{base}/shmem_enabled, and have the VMM ask for them, or use hugetlb"
            ),
        ),
        _ => Check::ok(name, found),
    }
}

/// Memory on /dev/shm is bounded by its size; a guest that plugs more dies of SIGBUS.
fn shm(host: &Host, size: u64) -> Check {
    let name = "/dev/shm";
    let Some(mount) = host.mount("/dev/shm") else {
        return Check::ok(name, "not mounted; memory in a memfd does not need it");
    };
    // Without the option it is half of the memory.
    let option = mount.options.split(',').find_map(|option| option.strip_prefix("size="));
    let room = match option {
        Some(text) => tmpfs_size(text, host.memory("MemTotal")),
        None => host.memory("MemTotal").map(|total| total / 2),
    };
    let Some(room) = room else { return Check::ok(name, "mounted; its size is not known") };
    let found = format!("takes {}", format_size(room));
    if size > room {
        let advice = "with guest memory there (mem-path=/dev/shm/...), a guest that uses more ends by \
                      SIGBUS: mount -o remount,size=... /dev/shm, or use a memfd";
        Check::warning(name, format!("{found}; the region has {}", format_size(size)), advice)
    } else {
        Check::ok(name, found)
    }
}

/// A size as tmpfs shows or takes it: 0 is no limit.
fn tmpfs_size(text: &str, total: Option<u64>) -> Option<u64> {
    let (digits, unit) =
        text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let number: u64 = digits.parse().ok()?;
    let size = match unit {
        "" => number,
        "k" | "K" => number.checked_mul(1 << 10)?,
        "m" | "M" => number.checked_mul(1 << 20)?,
        "g" | "G" => number.checked_mul(1 << 30)?,
        "%" => (total? / 100).checked_mul(number)?,
        _ => return None,
    };
    Some(if size == 0 { u64::MAX } else { size })
}

fn hugetlb(host: &Host) -> Check {
    let pools: Vec<_> = host
        .pools()
        .iter()
        .map(|pool| format!("{} free of {}", pool.free, format_size(pool.page_size)))
        .collect();
    if pools.is_empty() {
        return Check::ok("hugetlb", "no pools");
    }
    Check::ok("hugetlb", format!("pages: {}", pools.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::tmpfs_size;

    #[test]
    fn sizes_of_tmpfs_are_read_as_the_kernel_writes_them() {
        assert_eq!(tmpfs_size("65536k", None), Some(64 << 20));
        assert_eq!(tmpfs_size("1g", None), Some(1 << 30));
        assert_eq!(tmpfs_size("50%", Some(1000)), Some(500));
        assert_eq!(tmpfs_size("0", None), Some(u64::MAX));
        assert_eq!(tmpfs_size("99999999999999999999", None), None);
        assert_eq!(tmpfs_size("17179869184g", None), None);
        assert_eq!(tmpfs_size("1x", None), None);
    }
}
