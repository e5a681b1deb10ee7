//! Address and sizes of the region, against host and guest.

use program::size::format_size;

use super::host::Host;
use super::{Check, Plan, Region};

/// What QEMU's CPUs have unless they are told to take the host's.
const USUAL_GUEST_BITS: u32 = 40;

/// The host's transparent huge page size.
pub(super) const HUGE_PAGE: &str = "sys/kernel/mm/transparent_hugepage/hpage_pmd_size";

pub(super) fn checks(host: &Host, plan: &Plan, region: &Region) -> Vec<Check> {
    vec![address(host, plan, region), alignment(plan, region), block(host, plan, region)]
}

/// The region must end below what the CPUs can address, of host and guest.
fn address(host: &Host, plan: &Plan, region: &Region) -> Check {
    let name = "address";
    let Some(end) = region.addr.checked_add(region.size) else {
        let found = format!("a region of {} at {:#x} wraps", format_size(region.size), region.addr);
        return Check::problem(name, found, "choose a lower --addr");
    };
    let fits = |bits: u32| bits >= 64 || end <= 1 << bits;
    let found = |whose: &str, bits: u32| {
        format!("the region ends at {end:#x}; {whose} CPU addresses {bits} bits")
    };
    if let Some(bits) = host.phys_bits().filter(|bits| !fits(*bits)) {
        return Check::problem(name, found("the host's", bits), "choose a lower --addr");
    }
    match plan.guest_phys_bits {
        Some(bits) if !fits(bits) => Check::problem(
            name,
            found("the guest's", bits),
            "choose a lower --addr, or give the guest more bits (QEMU: -cpu host,host-phys-bits=on)",
        ),
        Some(bits) => Check::ok(name, found("the guest's", bits)),
        None if !fits(USUAL_GUEST_BITS) => Check::warning(
            name,
            format!("the region ends at {end:#x}; many guest CPUs address {USUAL_GUEST_BITS} bits"),
            "give the guest the host's bits (QEMU: host-phys-bits=on) and say --guest-phys-bits here",
        ),
        None => match host.phys_bits() {
            Some(bits) => Check::ok(name, found("the host's", bits)),
            None => Check::ok(name, format!("the region ends at {end:#x}")),
        },
    }
}

/// Linux uses whole memory blocks only.
fn alignment(plan: &Plan, region: &Region) -> Check {
    let (name, block) = ("alignment", plan.guest_memory_block.max(1));
    let end = region.addr.saturating_add(region.size);
    let start = region.addr.checked_next_multiple_of(block).unwrap_or(u64::MAX);
    let reach = (end / block * block).saturating_sub(start);
    let found = format!(
        "with memory blocks of {}, the guest can use {} of {}",
        format_size(block),
        format_size(reach),
        format_size(region.size)
    );
    let advice = format!("have the region start and end at multiples of {}", format_size(block));
    if reach == 0 {
        Check::problem(name, found, advice)
    } else if reach < region.size {
        Check::warning(name, found, advice)
    } else {
        Check::ok(name, found)
    }
}

/// The device's block against huge pages of the host and memory blocks of the guest.
fn block(host: &Host, plan: &Plan, region: &Region) -> Check {
    let name = "block size";
    let huge = host.number(HUGE_PAGE);
    let block = region.block_size.or(huge).unwrap_or(2 << 20);
    let found = format_size(block).to_string();
    if !block.is_power_of_two() {
        return Check::problem(name, found, "choose a power of two");
    }
    if !region.addr.is_multiple_of(block) || !region.size.is_multiple_of(block) {
        let found = format!("{found}; address or size of the region is not a multiple of it");
        return Check::problem(name, found, "align the region, or choose smaller blocks");
    }
    if let Some(huge) = huge.filter(|huge| block < *huge) {
        return Check::warning(
            name,
            format!("{found}; huge pages of the host have {}", format_size(huge)),
            "each unplug of a smaller block splits a huge page, which frees it late or never: \
             choose at least the huge page size",
        );
    }
    if block > plan.guest_memory_block {
        let guests = format_size(plan.guest_memory_block);
        return Check::warning(
            name,
            format!("{found}; memory blocks of the guest have {guests}"),
            "Linux then unplugs blocks as a whole only, and one page in use keeps all of one: \
             choose smaller blocks",
        );
    }
    Check::ok(name, found)
}
