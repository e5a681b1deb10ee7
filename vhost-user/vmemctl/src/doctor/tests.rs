//! The doctor on hosts that are made of files.

use std::fs;
use std::path::Path;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use tempfile::TempDir;

use super::host::{Host, Mount, Pool};
use super::{Check, Plan, Region, State, examine};

const GIB: u64 = 1 << 30;

/// A host on which all is well.
fn host() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (path, text) in [
        (
            "proc/meminfo",
            "MemTotal: 16777216 kB\nSwapTotal: 0 kB\nCommitLimit: 8388608 kB\nCommitted_AS: 1048576 kB\n",
        ),
        ("proc/cpuinfo", "processor : 0\naddress sizes\t: 46 bits physical, 48 bits virtual\n"),
        ("proc/self/maps", ""),
        ("proc/self/pagemap", ""),
        ("proc/self/status", "Name:\tx\nCapEff:\t0000000000000000\n"),
        (
            "proc/self/limits",
            "Limit  Soft Limit  Hard Limit  Units\nMax open files            1048576  1048576  files\nMax locked memory         8388608  8388608  bytes\n",
        ),
        ("proc/self/mountinfo", "30 1 0:26 / /dev/shm rw,nosuid - tmpfs tmpfs rw,size=16777216k\n"),
        ("proc/sys/kernel/osrelease", "6.18.2-generic"),
        ("proc/sys/vm/overcommit_memory", "0\n"),
        ("proc/sys/vm/unprivileged_userfaultfd", "1\n"),
        ("sys/kernel/mm/transparent_hugepage/hpage_pmd_size", "2097152\n"),
        (
            "sys/kernel/mm/transparent_hugepage/shmem_enabled",
            "always within_size [advise] never deny force\n",
        ),
        ("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "100\n"),
        ("sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages", "36\n"),
    ] {
        write(dir.path(), path, text);
    }
    dir
}

fn write(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn plan(addr: u64, size: u64) -> Plan {
    Plan {
        region: Some(Region { addr, size, block_size: Some(2 << 20) }),
        guest_phys_bits: None,
        guest_memory_block: 128 << 20,
        memory_file: None,
    }
}

fn usual() -> Plan {
    plan(5 * GIB, 8 * GIB)
}

fn find(checks: &[Check], name: &str) -> Check {
    checks.iter().find(|check| check.name == name).unwrap().clone()
}

/// What is found of one thing on a host of which this file is another.
fn with(path: &str, text: &str, plan: &Plan, name: &str) -> (State, String) {
    let dir = host();
    write(dir.path(), path, text);
    let check = find(&examine(&Host::at(dir.path()), plan), name);
    assert_eq!(check.advice.is_some(), check.status != State::Ok, "{check:?}");
    (check.status, check.found)
}

#[test]
fn a_host_on_which_all_is_well_passes() {
    let dir = host();
    let checks = examine(&Host::at(dir.path()), &usual());
    let names: Vec<_> = checks.iter().map(|check| check.name).collect();
    let expected = [
        "address",
        "alignment",
        "block size",
        "memory",
        "overcommit",
        "huge pages",
        "/dev/shm",
        "hugetlb",
        "/proc",
        "userfaultfd",
        "pagemap",
        "memlock",
        "files",
    ];
    assert_eq!(names, expected);
    for check in &checks {
        assert_eq!((check.status, &check.advice), (State::Ok, &None), "{check:?}");
    }
    assert_eq!(find(&checks, "hugetlb").found, "pages: 64 free of 2 MiB");
}

#[test]
fn a_host_without_anything_is_told_what_to_mount_and_nothing_panics() {
    let dir = tempfile::tempdir().unwrap();
    let checks = examine(&Host::at(dir.path()), &usual());
    for name in ["memory", "/proc"] {
        assert_eq!(find(&checks, name).status, State::Problem, "{name}");
    }
    for name in ["overcommit", "userfaultfd", "pagemap", "memlock", "files", "huge pages"] {
        assert_eq!(find(&checks, name).status, State::Warning, "{name}");
    }
}

#[test]
fn addresses_beyond_the_cpus_of_host_and_guest_are_told_apart() {
    let dir = host();
    let address = |plan: &Plan| find(&examine(&Host::at(dir.path()), plan), "address");
    let at = |addr: u64, bits: Option<u32>| {
        address(&Plan { guest_phys_bits: bits, ..plan(addr, GIB) }).status
    };
    assert_eq!(at((1 << 46) - GIB, Some(46)), State::Ok, "it ends where the addresses do");
    assert_eq!(at(1 << 46, Some(52)), State::Problem, "beyond the host's");
    assert_eq!(at(1 << 40, Some(40)), State::Problem, "beyond the guest's");
    assert_eq!(at(1 << 40, None), State::Warning, "beyond the usual guest's");
    assert_eq!(at((1 << 40) - GIB, None), State::Ok);
    assert_eq!(at(u64::MAX - 4095, None), State::Problem, "it wraps");
    let told = address(&Plan { guest_phys_bits: Some(40), ..plan(1 << 40, GIB) });
    assert_eq!(told.found, "the region ends at 0x10040000000; the guest's CPU addresses 40 bits");
    assert!(told.advice.unwrap().contains("host-phys-bits=on"));
}

#[test]
fn what_the_guests_memory_blocks_leave_out_is_named() {
    let dir = host();
    let alignment = |plan: &Plan| find(&examine(&Host::at(dir.path()), plan), "alignment");
    let part = alignment(&plan(4 * GIB + (2 << 20), GIB));
    assert_eq!(part.status, State::Warning);
    assert_eq!(part.found, "with memory blocks of 128 MiB, the guest can use 896 MiB of 1 GiB");
    assert_eq!(alignment(&plan(4 * GIB + (2 << 20), 128 << 20)).status, State::Problem);
    let large = Plan { guest_memory_block: 2 * GIB, ..plan(5 * GIB, 2 * GIB) };
    assert_eq!(alignment(&large).status, State::Problem);
}

#[test]
fn blocks_are_judged_by_huge_pages_and_by_the_guests_blocks() {
    let dir = host();
    let block = |size: u64| {
        let mut plan = usual();
        plan.region.as_mut().unwrap().block_size = Some(size);
        find(&examine(&Host::at(dir.path()), &plan), "block size").status
    };
    assert_eq!((block(2 << 20), block(128 << 20)), (State::Ok, State::Ok));
    assert_eq!((block(1 << 20), block(256 << 20)), (State::Warning, State::Warning));
    assert_eq!((block(3 << 20), block(2 * GIB)), (State::Problem, State::Problem));
    assert_eq!(block(0), State::Problem);
}

#[test]
fn memory_and_how_it_is_handed_out() {
    let large = plan(5 * GIB, 32 * GIB);
    let meminfo = "MemTotal: 1048576 kB\nSwapTotal: 1048576 kB\nCommitLimit: 16777216 kB\nCommitted_AS: 0 kB\n";
    let (state, found) = with("proc/meminfo", meminfo, &usual(), "memory");
    assert_eq!((state, found.contains("1 GiB of swap")), (State::Warning, true), "{found}");
    let mode = "proc/sys/vm/overcommit_memory";
    assert_eq!(with(mode, "2", &usual(), "overcommit").0, State::Problem, "7 GiB are left");
    assert_eq!(with(mode, "2", &plan(5 * GIB, GIB), "overcommit").0, State::Warning);
    assert_eq!(with(mode, "1", &large, "overcommit").0, State::Ok);
    let shmem = "sys/kernel/mm/transparent_hugepage/shmem_enabled";
    assert_eq!(with(shmem, "always [never]", &usual(), "huge pages").0, State::Warning);
    let mounts = "proc/self/mountinfo";
    let shm = |options: &str| {
        let line = format!("30 1 0:26 / /dev/shm rw - tmpfs tmpfs {options}\n");
        with(mounts, &line, &plan(5 * GIB, 9 * GIB), "/dev/shm").0
    };
    assert_eq!((shm("rw"), shm("rw,size=9437184k")), (State::Warning, State::Ok));
    assert_eq!((shm("rw,size=8g"), shm("rw,size=0")), (State::Warning, State::Ok));
    assert_eq!(with(mounts, "garbage\n", &large, "/dev/shm").0, State::Ok);
}

#[test]
fn rights_come_by_capability_device_or_sysctl() {
    let (sysctl, status) = ("proc/sys/vm/unprivileged_userfaultfd", "proc/self/status");
    assert_eq!(with(sysctl, "0", &usual(), "userfaultfd").0, State::Warning);
    let dir = host();
    write(dir.path(), sysctl, "0");
    let found =
        |dir: &TempDir| find(&examine(&Host::at(dir.path()), &usual()), "userfaultfd").found;
    write(dir.path(), "dev/userfaultfd", "");
    assert_eq!(found(&dir), "permitted, by /dev/userfaultfd");
    write(dir.path(), status, "CapEff:\t0000000000080000\n");
    assert_eq!(found(&dir), "permitted, by CAP_SYS_PTRACE");
    let release = "proc/sys/kernel/osrelease";
    assert_eq!(with(release, "6.6.99", &usual(), "pagemap").0, State::Warning);
    assert_eq!(with(release, "7.0", &usual(), "pagemap").0, State::Ok);
    let limits = "proc/self/limits";
    let (state, found) = with(limits, "Max open files 256 256 files\n", &usual(), "files");
    assert_eq!((state, found.as_str()), (State::Warning, "256 may be open"));
    let unlimited = "Max locked memory         unlimited unlimited bytes\n";
    assert_eq!(with(limits, unlimited, &usual(), "memlock").1, "not limited");
}

#[test]
fn the_file_behind_the_region_is_looked_at_itself() {
    let dir = host();
    let of = |path: &Path| {
        let plan = Plan { memory_file: Some(path.to_owned()), ..usual() };
        find(&examine(&Host::at(dir.path()), &plan), "memory file")
    };
    let memory = |flags| {
        let file = memfd_create("doctor", MemfdFlags::CLOEXEC | flags).unwrap();
        ftruncate(&file, 8 * GIB).unwrap();
        file
    };
    let path_of = |file: &std::os::fd::OwnedFd| {
        use std::os::fd::AsRawFd;
        format!("/proc/self/fd/{}", file.as_raw_fd())
    };
    let good = memory(MemfdFlags::empty());
    assert_eq!(of(Path::new(&path_of(&good))).status, State::Ok);
    let sealed = memory(MemfdFlags::ALLOW_SEALING);
    fcntl_add_seals(&sealed, SealFlags::FUTURE_WRITE).unwrap();
    let check = of(Path::new(&path_of(&sealed)));
    assert_eq!(check.status, State::Problem);
    assert!(check.found.ends_with("sealed against writes"), "{check:?}");
    assert_eq!(of(Path::new("/proc/self/status")).status, State::Problem, "not in memory");
    assert_eq!(of(&dir.path().join("none")).status, State::Problem);
}

#[test]
fn files_of_the_host_are_read_as_the_kernel_writes_them() {
    let dir = host();
    let host = Host::at(dir.path());
    assert_eq!((host.phys_bits(), host.kernel()), (Some(46), Some((6, 18))));
    assert_eq!(host.memory("MemTotal"), Some(16 * GIB));
    assert_eq!(host.pools(), [Pool { page_size: 2 << 20, free: 64 }]);
    let mount = Mount { kind: "tmpfs".into(), options: "rw,size=16777216k".into() };
    assert_eq!(host.mount("/dev/shm"), Some(mount));
    assert_eq!(host.mount("/dev"), None);
    assert_eq!(host.limit("Max locked memory"), Some(Some(8 << 20)));
    for garbage in ["", ":", "address sizes", "address sizes : x", "99999999999999999999 kB"] {
        for path in ["proc/meminfo", "proc/cpuinfo", "proc/self/limits", "proc/self/mountinfo"] {
            write(dir.path(), path, garbage);
        }
        examine(&host, &usual());
    }
}
