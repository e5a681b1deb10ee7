//! What this user may do.

use program::size::format_size;

use super::host::Host;
use super::{Check, Plan};

const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_PTRACE: u32 = 19;

/// Descriptors of a front-end with all of its memory slots, and what else is open.
const DESCRIPTORS: u64 = 1024;

pub(super) fn checks(host: &Host, plan: &Plan) -> Vec<Check> {
    vec![proc(host), userfaultfd(host), pagemap(host), memlock(host, plan), files(host)]
}

/// The daemon reads it to survive memory that its owner takes away.
fn proc(host: &Host) -> Check {
    let name = "/proc";
    if host.opens("proc/self/maps", false) {
        Check::ok(name, "mounted")
    } else {
        Check::problem(name, "/proc/self/maps cannot be read", "mount /proc where the daemon runs")
    }
}

fn userfaultfd(host: &Host) -> Check {
    let (name, sysctl) = ("userfaultfd", "proc/sys/vm/unprivileged_userfaultfd");
    if host.has_capability(CAP_SYS_PTRACE) {
        return Check::ok(name, "permitted, by CAP_SYS_PTRACE");
    }
    if host.opens("dev/userfaultfd", true) {
        return Check::ok(name, "permitted, by /dev/userfaultfd");
    }
    match host.number(sysctl) {
        Some(1) => Check::ok(name, "permitted, by vm.unprivileged_userfaultfd"),
        None => Check::warning(
            name,
            "this kernel has none",
            "no postcopy, lazy restore or background snapshot without it: CONFIG_USERFAULTFD",
        ),
        Some(_) => Check::warning(
            name,
            "not permitted",
            "needed for postcopy, lazy restore and background snapshots only: give this user \
             /dev/userfaultfd, or set vm.unprivileged_userfaultfd to 1",
        ),
    }
}

/// How writes to memory are found without KVM.
fn pagemap(host: &Host) -> Check {
    let name = "pagemap";
    if !host.opens("proc/self/pagemap", false) {
        let advice = "dirty pages are found by KVM's log or the vhost-user log only: mount /proc";
        return Check::warning(name, "/proc/self/pagemap cannot be read", advice);
    }
    match host.kernel() {
        Some(version) if version >= (6, 7) => Check::ok(name, "PAGEMAP_SCAN is there"),
        Some((major, minor)) => Check::warning(
            name,
            format!("Linux {major}.{minor} has no PAGEMAP_SCAN (6.7 has)"),
            "dirty pages are found by KVM's log or the vhost-user log only",
        ),
        None => Check::warning(name, "the kernel's version is not known", "mount /proc"),
    }
}

fn memlock(host: &Host, plan: &Plan) -> Check {
    let name = "memlock";
    let size = plan.region.as_ref().map_or(0, |region| region.size);
    if host.has_capability(CAP_IPC_LOCK) {
        return Check::ok(name, "not limited, by CAP_IPC_LOCK");
    }
    match host.limit("Max locked memory") {
        None => Check::warning(name, "the limit is not known", "mount /proc"),
        Some(None) => Check::ok(name, "not limited"),
        Some(Some(limit)) if limit >= size => {
            Check::ok(name, format!("{} may be locked", format_size(limit)))
        }
        // Of no interest without them, which is the rule.
        Some(Some(limit)) => Check::ok(
            name,
            format!(
                "{} may be locked: enough without assigned devices (VFIO), which lock all that is \
                 plugged",
                format_size(limit)
            ),
        ),
    }
}

fn files(host: &Host) -> Check {
    let name = "files";
    match host.limit("Max open files") {
        Some(Some(limit)) if limit < DESCRIPTORS => Check::warning(
            name,
            format!("{limit} may be open"),
            format!("a front-end with many memory regions needs {DESCRIPTORS}: raise LimitNOFILE"),
        ),
        Some(Some(limit)) => Check::ok(name, format!("{limit} may be open")),
        Some(None) => Check::ok(name, "not limited"),
        None => Check::warning(name, "the limit is not known", "mount /proc"),
    }
}
