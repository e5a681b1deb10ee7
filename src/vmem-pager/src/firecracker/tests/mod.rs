//! A VMM that behaves as Firecracker does, and others that do not.

mod crossing;
mod model;
mod processes;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use clap::Parser;
use ram_discard::ByteRange;

use super::RestoreMetrics;
use super::message::{Region, parse};
use crate::cli::args::{Args, Command, RestoreArgs};
use crate::cli::report::Report;
use crate::error::PagerError;
use crate::run::Run;
use small_vmm::firecracker::{self as vm, HUGE, PAGE, Trap, Vm};

/// Waits for what another thread or process does. Fails when that does not come, as when it has failed.
#[track_caller]
fn wait_until(what: impl Fn() -> bool) {
    let begun = Instant::now();
    while !what() {
        assert!(begun.elapsed() < Duration::from_secs(60), "what is waited for does not come");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A snapshot in a folder, and the pager for it.
struct Snapshot {
    dir: tempfile::TempDir,
    files: Vec<PathBuf>,
    len: u64,
}

impl Snapshot {
    /// A memory file of `len` bytes, of which the pages in `data` begin with their number.
    fn new(len: u64, data: &[u64]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("state"), [1; 64]).unwrap();
        let mut snapshot = Self { dir, files: Vec::new(), len };
        snapshot.layer(data, 0);
        snapshot
    }

    /// Adds a file, in which a page begins with its number and `add`.
    fn layer(&mut self, data: &[u64], add: u8) {
        let path = self.dir.path().join(format!("memory{}", self.files.len()));
        let file = File::create(&path).unwrap();
        file.set_len(self.len).unwrap();
        for page in data {
            file.write_all_at(&[content(*page) + add; PAGE as usize], page * PAGE).unwrap();
        }
        self.files.push(path);
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("uffd.sock")
    }

    fn args(&self, more: &str) -> RestoreArgs {
        let dir = self.dir.path().display();
        let mut words = format!("vmem-pager restore --vmm firecracker --socket {dir}/uffd.sock");
        words.push_str(&format!(" --image {dir}/state {more}"));
        for file in &self.files {
            words.push_str(&format!(" --memory-file {}", file.display()));
        }
        let args = Args::try_parse_from(words.split_whitespace()).unwrap();
        let Command::Restore(args) = args.command else { panic!("not a restore") };
        args
    }

    /// Starts the pager, which waits for a VMM when this returns.
    fn restore(&self, more: &str) -> Restore {
        self.restore_in(more, Run::new(self.args(more).common.timeout))
    }

    fn restore_in(&self, more: &str, run: Arc<Run>) -> Restore {
        let (args, of_run) = (self.args(more), Arc::clone(&run));
        let restore = move || super::run(&args, &of_run, &Report::silent(), &RestoreMetrics::new());
        let thread = thread::spawn(restore);
        wait_until(|| self.socket().exists() || thread.is_finished());
        Restore { run, thread }
    }
}

/// A pager at work.
struct Restore {
    run: Arc<Run>,
    thread: JoinHandle<Result<(), PagerError>>,
}

impl Restore {
    fn end(self) -> Result<(), PagerError> {
        self.thread.join().unwrap()
    }
}

/// The bytes of a page with data.
fn content(page: u64) -> u8 {
    (page % 100) as u8 + 1
}

fn pages(from: u64, to: u64) -> ByteRange {
    ByteRange::from_bounds(from * PAGE, to * PAGE).unwrap()
}

#[test]
fn memory_is_served_and_the_pager_ends_when_all_is_with_the_vmm() {
    let data = [0, 1, 2, 9, 17, 40, 63];
    let snapshot = Snapshot::new(64 * PAGE, &data);
    let restore = snapshot.restore("");
    let vm = Vm::new(&[(16, PAGE), (48, PAGE)]);
    vm.load(&snapshot.socket());
    for page in [17, 3, 63, 0, 15, 16] {
        assert_eq!(vm.read(page), if data.contains(&page) { content(page) } else { 0 }, "{page}");
    }
    restore.end().unwrap();
    assert!(!snapshot.socket().exists());
    // Nothing is registered any more: no one is needed for what the VMM does from here on.
    vm.discard(pages(0, 2));
    let expected = |page| if data.contains(&page) && page > 1 { content(page) } else { 0 };
    (0..64).for_each(|page| assert_eq!(vm.read(page), expected(page), "{page}"));
}

#[test]
fn diffs_cover_their_base_and_an_eager_restore_needs_no_fault() {
    let mut snapshot = Snapshot::new(4096 * PAGE, &(0..3000).collect::<Vec<_>>());
    snapshot.layer(&[5, 6, 3500], 50);
    snapshot.layer(&[6], 100);
    let restore = snapshot.restore("--eager");
    let vm = Vm::new(&[(4096, PAGE)]);
    vm.load(&snapshot.socket());
    restore.end().unwrap();
    let added = |page| {
        if page == 6 {
            100
        } else if [5, 3500].contains(&page) {
            50
        } else {
            0
        }
    };
    for page in 0..4096 {
        let expected = if page < 3000 || page == 3500 { content(page) + added(page) } else { 0 };
        assert_eq!(vm.read(page), expected, "{page}");
    }
}

#[test]
fn what_the_vmm_discards_is_zeros_and_never_the_files_again() {
    let snapshot = Snapshot::new(64 * PAGE, &(0..64).collect::<Vec<_>>());
    let restore = snapshot.restore("--bandwidth 8K");
    let vm = Vm::new(&[(64, PAGE)]);
    vm.load(&snapshot.socket());
    assert_eq!(vm.read(40), content(40));
    // Of pages that were touched, and of pages that were not.
    vm.discard(pages(38, 50));
    for page in [40, 41, 49] {
        assert_eq!(vm.read(page), 0, "{page}");
    }
    vm.write(41, 7);
    assert_eq!((vm.read(41), vm.read(42)), (7, 0));
    vm.discard(pages(41, 42));
    assert_eq!(vm.read(41), 0);
    for page in 0..64 {
        vm.read(page);
    }
    restore.end().unwrap();
    for page in 0..64 {
        assert_eq!(vm.read(page), if (38..50).contains(&page) { 0 } else { content(page) });
    }
}

#[test]
fn a_flood_of_discards_keeps_no_vcpu_from_its_page() {
    let snapshot = Snapshot::new(2048 * PAGE, &(0..2048).collect::<Vec<_>>());
    let restore = snapshot.restore("--bandwidth 64K");
    let vm = Vm::new(&[(2048, PAGE)]);
    vm.load(&snapshot.socket());
    let balloons: Vec<_> = (0..3u64)
        .map(|balloon| {
            let vm = vm.clone();
            thread::spawn(move || {
                for page in (1024 + balloon * 300..).step_by(2).take(150) {
                    vm.discard(pages(page, page + 2));
                }
            })
        })
        .collect();
    let vcpus: Vec<_> = (0..4u64)
        .map(|vcpu| {
            let vm = vm.clone();
            thread::spawn(move || {
                // Each page is read by two of them.
                for page in (vcpu / 2 * 256..).take(256) {
                    assert_eq!(vm.read(page), content(page), "{page}");
                }
            })
        })
        .collect();
    vcpus.into_iter().chain(balloons).for_each(|thread| thread.join().unwrap());
    (0..2048).for_each(|page| assert!(vm.read(page) <= 100));
    restore.end().unwrap();
    for page in 0..2048 {
        let discarded = (1024..1924).contains(&page);
        assert_eq!(vm.read(page), if discarded { 0 } else { content(page) }, "{page}");
    }
}

#[test]
fn huge_pages_are_served_whole_and_discarded_whole() {
    let pool = crate::huge_page_pool::Pool::with_free(HUGE, 4).expect("a pool of huge pages");
    let each = HUGE / PAGE;
    // The second page has a hole in it, the third is one.
    let snapshot = Snapshot::new(4 * HUGE, &[0, each, 3 * each + 7]);
    let restore = snapshot.restore("--bandwidth 1M");
    let vm = Vm::new(&[(each, HUGE), (3 * each, HUGE)]);
    vm.load(&snapshot.socket());
    assert_eq!(vm.read(each), content(each));
    assert_eq!(vm.read(each + 1), 0);
    assert_eq!(vm.read(2 * each), 0);
    vm.discard(pages(each, 2 * each));
    assert_eq!(vm.read(each), 0);
    assert_eq!(vm.read(3 * each + 7), content(3 * each + 7));
    assert_eq!(vm.read(0), content(0));
    restore.end().unwrap();
    drop((vm, pool));
}

#[test]
fn what_releases_and_dialects_send_is_served() {
    for trap in Trap::SERVED {
        let snapshot = Snapshot::new(8 * PAGE, &[1]);
        let restore = snapshot.restore("");
        let vm = Vm::new(&[(1, PAGE), (7, PAGE)]);
        vm.load_with(&snapshot.socket(), trap);
        assert_eq!((vm.read(1), vm.read(2)), (content(1), 0), "{trap:?}");
        let ended = restore.end();
        assert!(ended.is_ok(), "{trap:?}: {ended:?}");
    }
}

#[test]
fn what_is_touched_is_recorded_in_its_order_and_replayed_first() {
    let snapshot = Snapshot::new(256 * PAGE, &(0..256).collect::<Vec<_>>());
    let file = snapshot.dir.path().join("set");
    let restore = snapshot.restore(&format!("--record {}", file.display()));
    let vm = Vm::new(&[(128, PAGE), (128, PAGE)]);
    vm.load(&snapshot.socket());
    for page in [200, 201, 7, 130, 6] {
        vm.read(page);
    }
    restore.end().unwrap();
    let blocks = [("firecracker".to_owned(), 256)];
    let set = crate::working_set::WorkingSet::load_of(&file, &blocks).unwrap().unwrap();
    let runs: Vec<_> = set.runs().map(|(_, pages)| pages).collect();
    assert_eq!(runs, [200..202, 7..8, 130..131, 6..7]);

    // At a rate at which nothing else comes, it comes without a fault.
    let restore = snapshot.restore(&format!("--replay {} --bandwidth 40K", file.display()));
    let vm = Vm::new(&[(128, PAGE), (128, PAGE)]);
    vm.load(&snapshot.socket());
    wait_until(|| vm.is_resident(6));
    assert!([200, 201, 7, 130].iter().all(|page| vm.is_resident(*page)));
    assert!(!vm.is_resident(255) && !vm.is_resident(120));
    (0..256).for_each(|page| assert_eq!(vm.read(page), content(page)));
    restore.end().unwrap();
}

#[test]
fn what_is_not_a_message_is_refused_and_a_look_at_the_socket_is_not_minded() {
    let snapshot = Snapshot::new(8 * PAGE, &[1]);
    for text in ["{}", "[1]", "[]", "[{\"size\": 1}]", "garbage", "[[[]"] {
        let restore = snapshot.restore("");
        drop(vm::connect(&snapshot.socket()));
        let socket = vm::connect(&snapshot.socket());
        vm::send(&socket, text.as_bytes(), &[]);
        rustix::net::shutdown(&socket, rustix::net::Shutdown::Write).unwrap();
        let error = restore.end().unwrap_err();
        assert_eq!(error.exit_status(), 1, "{text}");
        assert!(error.to_string().contains("is refused"), "{text}: {error}");
    }
}

#[test]
fn a_message_without_a_userfaultfd_is_refused_and_ends_no_vmm() {
    for trap in Trap::REFUSED.into_iter().filter(|trap| !trap.brings_userfaultfd()) {
        let snapshot = Snapshot::new(8 * PAGE, &[1]);
        let restore = snapshot.restore("");
        let vm = Vm::new(&[(1, PAGE), (7, PAGE)]);
        // This process would be ended.
        vm.load_with(&snapshot.socket(), trap);
        let error = restore.end().unwrap_err();
        assert!(error.to_string().contains("none is a userfaultfd"), "{trap:?}: {error}");
    }
}

#[test]
fn no_vmm_and_a_silent_one_are_timeouts() {
    let snapshot = Snapshot::new(8 * PAGE, &[1]);
    let error = snapshot.restore("--timeout 0").end().unwrap_err();
    assert_eq!(error.exit_status(), 3);
    assert!(error.to_string().contains("no VMM has connected"), "{error}");

    let run = Run::with_silence(None, Duration::from_millis(30));
    let restore = snapshot.restore_in("", run);
    let _silent = vm::connect(&snapshot.socket());
    let error = restore.end().unwrap_err();
    assert_eq!(error.exit_status(), 3);
    assert!(error.to_string().contains("has connected, and not sent"), "{error}");

    let restore = snapshot.restore("");
    restore.run.interrupt();
    assert!(matches!(restore.end(), Err(PagerError::Interrupted)));
}

#[test]
fn wrong_words_and_files_are_refused_before_a_vmm_is_met() {
    let mut snapshot = Snapshot::new(8 * PAGE, &[1]);
    let refused = |args: &RestoreArgs| {
        let run = Run::new(None);
        super::run(args, &run, &Report::silent(), &RestoreMetrics::new()).unwrap_err()
    };
    let mut args = snapshot.args("");
    args.common.socket = "tcp:localhost:1".parse().unwrap();
    assert_eq!(refused(&args).exit_status(), 2);
    args = snapshot.args("--recover");
    assert_eq!(refused(&args).exit_status(), 2);
    args = snapshot.args("--qmp q");
    assert_eq!(refused(&args).exit_status(), 2);
    args = snapshot.args("");
    args.memory_file.clear();
    assert_eq!(refused(&args).exit_status(), 2);
    args = snapshot.args("");
    args.common.image = Path::new("/dev/null").to_owned();
    assert!(refused(&args).to_string().contains("not a state file"));
    snapshot.files.push(snapshot.dir.path().join("none"));
    assert!(refused(&snapshot.args("")).to_string().contains("none"));
    assert!(!snapshot.socket().exists());
}

#[test]
fn regions_are_checked_against_the_memory_file_and_each_other() {
    let region = |base: u64, size: u64, offset: u64, page: &str| {
        format!("{{\"base_host_virt_addr\":{base},\"size\":{size},\"offset\":{offset}{page}}}")
    };
    let parse = |regions: &[String]| parse(format!("[{}]", regions.join(",")).as_bytes(), 4 * HUGE);
    let (small, huge) = (",\"page_size\":4096", ",\"page_size_kib\":2097152");
    let good = parse(&[
        region(8 * HUGE, HUGE, 3 * HUGE, huge),
        region(0x1000, 3 * HUGE, 0, ",\"page_size\":4096,\"page_size_kib\":1"),
    ]);
    let low = Region { base: 0x1000, size: 3 * HUGE, offset: 0, page_size: PAGE };
    let high = Region { base: 8 * HUGE, size: HUGE, offset: 3 * HUGE, page_size: HUGE };
    assert_eq!(good, Ok(Some(vec![low, high])));
    for (what, regions) in [
        ("4096 bytes", vec![region(1, 4 * HUGE, 0, small)]),
        ("2097152 bytes", vec![region(PAGE, 4 * HUGE, 0, huge)]),
        ("pages of 4", vec![region(PAGE, 4 * HUGE, 0, ",\"page_size_kib\":4")]),
        ("whole pages", vec![region(PAGE, 0, 0, small)]),
        ("whole pages", vec![region(u64::MAX - 4095, 4 * HUGE, 0, small)]),
        ("leave the memory file", vec![region(PAGE, 4 * HUGE, PAGE, small)]),
        ("leave the memory file", vec![region(PAGE, PAGE, u64::MAX - 4095, small)]),
        ("regions of", vec![region(PAGE, 3 * HUGE, 0, small)]),
        (
            "overlap",
            vec![region(PAGE, 2 * HUGE, 0, small), region(HUGE, 2 * HUGE, 2 * HUGE, small)],
        ),
        ("was expected", vec![region(PAGE, HUGE, 0, small), region(4 * HUGE, HUGE, 0, small)]),
        ("0 regions", vec![]),
    ] {
        let error = parse(&regions).unwrap_err();
        assert!(error.contains(what), "{what}: {error}");
    }
    let cut = &format!("[{}", region(PAGE, 4 * HUGE, 0, small));
    assert_eq!(super::message::parse(cut.as_bytes(), 4 * HUGE), Ok(None));
    let more = format!("{cut}] x");
    assert!(super::message::parse(more.as_bytes(), 4 * HUGE).unwrap_err().contains("follow"));
}
