//! The pager of Firecracker as a program, which is killed: a worker, of which a supervisor starts another, or the
//! whole, which a service manager starts again.

#[path = "common/service_manager.rs"]
mod service_manager;

use std::fs::File;
use std::io::{BufRead, BufReader, Lines};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::Duration;

use ram_discard::ByteRange;
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use service_manager::ServiceManager;
use small_vmm::firecracker::{PAGE, Vm};

const PAGES: u64 = 64;
const PAGER: &str = env!("CARGO_BIN_EXE_vmem-pager");
/// Little comes that is not asked for, but what a killed worker has placed and not taken note of does.
const SLOW: [&str; 2] = ["--bandwidth", "16K"];
const SUPERVISED: [&str; 3] = ["--supervise", "--bandwidth", "16K"];
/// Tells a test that it is the VMM, which is to connect to this socket.
const SOCKET: &str = "VMEM_PAGER_TEST_SOCKET";

fn content(page: u64) -> u8 {
    page as u8 + 1
}

/// A snapshot of [`PAGES`] pages with data.
fn snapshot(dir: &Path) {
    let file = File::create(dir.join("memory")).unwrap();
    file.set_len(PAGES * PAGE).unwrap();
    for page in 0..PAGES {
        file.write_all_at(&[content(page); PAGE as usize], page * PAGE).unwrap();
    }
    std::fs::write(dir.join("state"), [1; 64]).unwrap();
}

fn spawn(command: &mut Command, dir: &Path, options: &[&str]) -> Child {
    command
        .args(["restore", "--vmm", "firecracker", "--json"])
        .args(options)
        .arg("--socket")
        .arg(dir.join("uffd.sock"))
        .arg("--image")
        .arg(dir.join("state"))
        .arg("--memory-file")
        .arg(dir.join("memory"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

struct Pager {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Pager {
    /// Starts it with the snapshot in `dir`.
    fn start(dir: &Path, options: &[&str]) -> Self {
        Self::of(spawn(&mut Command::new(PAGER), dir, options))
    }

    /// Has `manager` start it.
    fn service(manager: &ServiceManager, dir: &Path, options: &[&str]) -> Self {
        Self::of(manager.start(PAGER, |command| spawn(command, dir, options)))
    }

    fn of(mut child: Child) -> Self {
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    /// Has a supervisor, which listens when this returns, and workers that place so many bytes a second.
    fn supervised(dir: &Path, rate: &str) -> Self {
        let options = ["--supervise", "--bandwidth", rate];
        let mut pager = Self::start(dir, &options);
        pager.wait_for("listening");
        pager
    }

    /// The next line about an event.
    fn wait_for(&mut self, event: &str) -> serde_json::Value {
        loop {
            let line = self.lines.next().expect("the pager goes on").unwrap();
            let line: serde_json::Value = serde_json::from_str(&line).unwrap();
            if line["event"] == event {
                return line;
            }
        }
    }

    fn worker(&mut self) -> Pid {
        let pid = self.wait_for("worker")["pid"].as_i64().unwrap();
        Pid::from_raw(pid.try_into().unwrap()).unwrap()
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Its exit status, and what it complained of.
    fn end(self) -> (Option<i32>, String) {
        let output = self.child.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }
}

#[test]
fn a_guest_whose_pager_is_killed_again_and_again_has_its_memory() {
    let dir = tempfile::tempdir().unwrap();
    snapshot(dir.path());
    let mut supervisor = Pager::supervised(dir.path(), "16K");
    let vm = Vm::new(&[(PAGES, PAGE)]);
    vm.load(&dir.path().join("uffd.sock"));
    let mut worker = supervisor.worker();
    vm.discard(ByteRange::new(40 * PAGE, 8 * PAGE).unwrap());
    assert_eq!((vm.read(1), vm.read(40)), (content(1), 0));
    vm.write(1, 200);
    vm.write(40, 201);
    for round in 0..3 {
        // Some wait while the worker is killed, and one discards.
        let readers: Vec<_> = (0..4)
            .map(|reader| {
                let (vm, page) = (vm.clone(), 4 + round * 8 + reader);
                thread::spawn(move || assert_eq!(vm.read(page), content(page), "{page}"))
            })
            .collect();
        let discarder = {
            let vm = vm.clone();
            let range = ByteRange::new((50 + round) * PAGE, PAGE).unwrap();
            thread::spawn(move || vm.discard(range))
        };
        thread::sleep(Duration::from_millis(round * 2));
        kill_process(worker, Signal::KILL).unwrap();
        worker = supervisor.worker();
        readers.into_iter().chain([discarder]).for_each(|thread| thread.join().unwrap());
        // What was written and what was discarded before is as it was.
        assert_eq!((vm.read(1), vm.read(40), vm.read(41)), (200, 201, 0));
        assert_eq!(vm.read(50 + round), 0);
    }
    for page in 0..PAGES {
        let expected = match page {
            1 => 200,
            40 => 201,
            41..48 | 50..53 => 0,
            _ => content(page),
        };
        assert_eq!(vm.read(page), expected, "{page}");
    }
    supervisor.wait_for("completed");
    assert_eq!(supervisor.end().0, Some(0));
}

/// Has a process of its own run the test `name` as the VMM.
fn vmm(name: &str, dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(SOCKET, dir.join("uffd.sock"))
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// In that process: a VMM that has its pager, and waits for its end.
fn wait_as_vmm() {
    if let Some(socket) = std::env::var_os(SOCKET) {
        let vm = Vm::new(&[(PAGES, PAGE)]);
        vm.load(socket.as_ref());
        loop {
            thread::park();
        }
    }
}

#[test]
fn a_vmm_whose_workers_die_six_times_without_a_page_in_between_is_ended() {
    wait_as_vmm();
    let dir = tempfile::tempdir().unwrap();
    snapshot(dir.path());
    let mut supervisor = Pager::supervised(dir.path(), "1");
    let name = "a_vmm_whose_workers_die_six_times_without_a_page_in_between_is_ended";
    let mut vmm = vmm(name, dir.path());
    for _ in 0..6 {
        kill_process(supervisor.worker(), Signal::KILL).unwrap();
    }
    let (status, complaints) = supervisor.end();
    assert_eq!(status, Some(1), "{complaints}");
    assert!(complaints.contains("6 workers died, the last by signal 9"), "{complaints}");
    assert!(complaints.contains("was ended"), "{complaints}");
    assert_eq!(vmm.wait().unwrap().signal(), Some(9));
}

#[test]
fn workers_may_die_more_often_with_pages_in_between() {
    let dir = tempfile::tempdir().unwrap();
    snapshot(dir.path());
    let mut supervisor = Pager::supervised(dir.path(), "16K");
    let vm = Vm::new(&[(PAGES, PAGE)]);
    vm.load(&dir.path().join("uffd.sock"));
    for round in 0..3 {
        for _ in 0..4 {
            kill_process(supervisor.worker(), Signal::KILL).unwrap();
        }
        // Once a second page has come, the first is known to have.
        for page in [2 * round, 2 * round + 1] {
            assert_eq!(vm.read(page), content(page));
        }
    }
    (0..PAGES).for_each(|page| assert_eq!(vm.read(page), content(page)));
    assert_eq!(supervisor.end().0, Some(0));
}

#[test]
fn a_guest_whose_pager_is_killed_is_continued_with_what_the_service_manager_kept() {
    let dir = tempfile::tempdir().unwrap();
    snapshot(dir.path());
    let mut manager = ServiceManager::default();
    let mut pager = Pager::service(&manager, dir.path(), &SLOW);
    manager.wait(|manager| manager.told.contains(&"READY=1\n".to_owned()));
    let vm = Vm::new(&[(PAGES, PAGE)]);
    vm.load(&dir.path().join("uffd.sock"));
    assert_eq!(vm.read(1), content(1));
    let stored = "FDSTORE=1\nFDNAME=vmem-pager-firecracker\nFDPOLL=0\n".to_owned();
    manager.wait(|manager| manager.told.contains(&stored) && manager.kept.len() == 3);
    vm.write(1, 200);
    for round in 0..3 {
        let gone = 40 + round * 4;
        vm.discard(ByteRange::new(gone * PAGE, 2 * PAGE).unwrap());
        pager.kill();
        // They wait for the next pager: nothing of the kernel's own, zeros, comes in between.
        let waits = {
            let vm = vm.clone();
            thread::spawn(move || (vm.read(2 + round), vm.read(gone), vm.read(gone + 2)))
        };
        pager = Pager::service(&manager, dir.path(), &SLOW);
        let continued = pager.wait_for("continued");
        assert_eq!(continued["pid"], std::process::id());
        assert_eq!(waits.join().unwrap(), (content(2 + round), 0, content(gone + 2)));
        assert_eq!(vm.read(1), 200);
    }
    for page in 0..PAGES {
        let expected = match page {
            1 => 200,
            40 | 41 | 44 | 45 | 48 | 49 => 0,
            _ => content(page),
        };
        assert_eq!(vm.read(page), expected, "{page}");
    }
    pager.wait_for("completed");
    assert_eq!(pager.end().0, Some(0));
    // The next one is for another guest.
    manager.wait(|manager| manager.kept.is_empty());
    let mut pager = Pager::service(&manager, dir.path(), &SLOW);
    pager.wait_for("listening");
    pager.kill();
}

#[test]
fn a_worker_that_outlives_its_supervisor_is_waited_for_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    snapshot(dir.path());
    let mut manager = ServiceManager::default();
    let mut first = Pager::service(&manager, dir.path(), &SUPERVISED);
    first.wait_for("listening");
    let vm = Vm::new(&[(PAGES, PAGE)]);
    vm.load(&dir.path().join("uffd.sock"));
    let worker = first.worker();
    manager.wait(|manager| manager.kept.len() == 3);
    first.kill();
    let mut second = Pager::service(&manager, dir.path(), &SUPERVISED);
    second.wait_for("continued");
    let waits = second.worker();
    assert_eq!(vm.read(1), content(1));
    vm.discard(ByteRange::new(8 * PAGE, PAGE).unwrap());
    kill_process(worker, Signal::KILL).unwrap();
    assert_eq!((vm.read(2), vm.read(8)), (content(2), 0));
    // The one that had waited served these.
    kill_process(waits, Signal::KILL).unwrap();
    for page in 0..PAGES {
        assert_eq!(vm.read(page), if page == 8 { 0 } else { content(page) }, "{page}");
    }
    assert_eq!(second.end().0, Some(0));
    manager.wait(|manager| manager.kept.is_empty());
}

#[test]
fn a_vmm_whose_memory_is_gone_when_its_pager_comes_back_is_ended() {
    wait_as_vmm();
    let dir = tempfile::tempdir().unwrap();
    let name = "a_vmm_whose_memory_is_gone_when_its_pager_comes_back_is_ended";
    for shorter in [true, false] {
        snapshot(dir.path());
        let mut manager = ServiceManager::default();
        let mut pager = Pager::service(&manager, dir.path(), &SLOW);
        pager.wait_for("listening");
        let mut vmm = vmm(name, dir.path());
        manager.wait(|manager| manager.kept.len() == 3);
        pager.kill();
        let memory = dir.path().join("memory");
        if shorter {
            File::options().write(true).open(memory).unwrap().set_len(PAGE).unwrap();
        } else {
            std::fs::remove_file(memory).unwrap();
        }
        let (status, complaints) = Pager::service(&manager, dir.path(), &SLOW).end();
        assert_ne!(status, Some(0));
        assert!(complaints.contains("was ended"), "{complaints}");
        assert_eq!(vmm.wait().unwrap().signal(), Some(9));
        manager.wait(|manager| manager.kept.is_empty());
    }
}

#[test]
fn a_vmm_that_ended_while_it_had_no_pager_is_noticed() {
    wait_as_vmm();
    let dir = tempfile::tempdir().unwrap();
    snapshot(dir.path());
    let mut manager = ServiceManager::default();
    let mut pager = Pager::service(&manager, dir.path(), &SLOW);
    pager.wait_for("listening");
    let mut vmm = vmm("a_vmm_that_ended_while_it_had_no_pager_is_noticed", dir.path());
    manager.wait(|manager| manager.kept.len() == 3);
    pager.kill();
    vmm.kill().unwrap();
    vmm.wait().unwrap();
    let (status, complaints) = Pager::service(&manager, dir.path(), &SLOW).end();
    assert_eq!(status, Some(1), "{complaints}");
    assert!(complaints.contains("ended before it had all of its memory"), "{complaints}");
    manager.wait(|manager| manager.kept.is_empty());
}

/// Descriptors that are left when the VMM connects: for the connection and its process; for the userfaultfd as well; and
/// for the states of pages.
#[test]
fn a_vmm_whose_pager_has_too_few_descriptors_is_ended() {
    wait_as_vmm();
    let dir = tempfile::tempdir().unwrap();
    snapshot(dir.path());
    let name = "a_vmm_whose_pager_has_too_few_descriptors_is_ended";
    for left in 2..=4 {
        let mut pager = Pager::start(dir.path(), &SLOW);
        pager.wait_for("listening");
        let id = pager.child.id();
        let reserved = std::fs::read_dir(format!("/proc/{id}/fd")).unwrap().filter_map(|entry| {
            let path = entry.unwrap().path();
            let is_reserved =
                std::fs::read_link(&path).ok()? == Path::new("/memfd:spare (deleted)");
            let number: u64 = path.file_name()?.to_str()?.parse().ok()?;
            Some(number).filter(|number| is_reserved && *number > 2)
        });
        let first = reserved.min().unwrap();
        let pid = Pid::from_raw(id.try_into().unwrap()).unwrap();
        let limit = Rlimit { current: Some(first + left), maximum: Some(first + left) };
        prlimit(Some(pid), Resource::Nofile, limit).unwrap();
        let mut vmm = vmm(name, dir.path());
        let (status, complaints) = pager.end();
        assert_eq!(status, Some(1), "{left}: {complaints}");
        assert!(complaints.contains("was ended"), "{left}: {complaints}");
        assert_eq!(vmm.wait().unwrap().signal(), Some(9), "{left}: {complaints}");
    }
}

#[test]
fn too_few_descriptors_are_noticed_before_a_vmm_is_met() {
    let dir = tempfile::tempdir().unwrap();
    snapshot(dir.path());
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 16; exec \"$@\"", "sh", PAGER]);
    let pager = Pager::of(spawn(&mut command, dir.path(), &[]));
    let (status, complaints) = pager.end();
    assert_eq!(status, Some(1), "{complaints}");
    assert!(complaints.contains("ulimit -n"), "{complaints}");
    assert!(!dir.path().join("uffd.sock").exists());
}
