//! The pager of Firecracker as a program: a supervisor and its workers, of which some are killed.

#[path = "../src/firecracker/tests/vm.rs"]
#[allow(dead_code, reason = "the tests inside the crate need the rest")]
mod vm;

use std::fs::File;
use std::io::{BufRead, BufReader, Lines};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::Duration;

use ram_discard::ByteRange;
use rustix::process::{Pid, Signal, kill_process};
use vm::{PAGE, Vm};

const PAGES: u64 = 64;

fn content(page: u64) -> u8 {
    page as u8 + 1
}

struct Supervisor {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Supervisor {
    fn start(dir: &Path) -> Self {
        let memory = dir.join("memory");
        let file = File::create(&memory).unwrap();
        file.set_len(PAGES * PAGE).unwrap();
        for page in 0..PAGES {
            file.write_all_at(&[content(page); PAGE as usize], page * PAGE).unwrap();
        }
        std::fs::write(dir.join("state"), [1; 64]).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_vmem-pager"))
            .args(["restore", "--vmm", "firecracker", "--supervise", "--json"])
            // Little comes that is not asked for.
            .args(["--bandwidth", "1"])
            .arg("--socket")
            .arg(dir.join("uffd.sock"))
            .arg("--image")
            .arg(dir.join("state"))
            .arg("--memory-file")
            .arg(&memory)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut supervisor = Self { child, lines };
        supervisor.wait_for("listening");
        supervisor
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
}

#[test]
fn a_guest_whose_pager_is_killed_again_and_again_has_its_memory() {
    let dir = tempfile::tempdir().unwrap();
    let mut supervisor = Supervisor::start(dir.path());
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
    assert_eq!(supervisor.child.wait().unwrap().code(), Some(0));
}
