//! VMMs in processes of their own, which end, or are ended.
//!
//! Such a test starts itself again as the VMM: what tells it so is the name of the socket.

use std::env;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};

use super::{Snapshot, content};
use crate::run::Run;
use small_vmm::firecracker::{PAGE, Trap, Vm};
use std::time::Duration;

const SOCKET: &str = "VMEM_PAGER_TEST_SOCKET";

/// Has a VMM run the test `name`, with the socket.
fn vmm(name: &str, snapshot: &Snapshot) -> Child {
    command(name, snapshot).spawn().unwrap()
}

fn command(name: &str, snapshot: &Snapshot) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .args(["--exact", &format!("firecracker::tests::processes::{name}"), "--nocapture"])
        .env(SOCKET, snapshot.socket())
        .stdout(Stdio::null());
    command
}

/// In that process: the VMM, loaded.
fn loaded(pages: u64) -> Option<Vm> {
    let socket = env::var_os(SOCKET)?;
    let vm = Vm::new(&[(pages, PAGE)]);
    vm.load(socket.as_ref());
    Some(vm)
}

#[test]
fn a_vmm_whose_page_cannot_be_had_is_ended() {
    if let Some(vm) = loaded(64) {
        assert_eq!(vm.read(0), content(0));
        vm.read(63);
        unreachable!("a page that is lost was read");
    }
    let snapshot = Snapshot::new(64 * PAGE, &(0..64).collect::<Vec<_>>());
    let restore = snapshot.restore("");
    let file = std::fs::File::options().write(true).open(&snapshot.files[0]).unwrap();
    file.set_len(32 * PAGE).unwrap();
    let mut vmm = vmm("a_vmm_whose_page_cannot_be_had_is_ended", &snapshot);
    let error = restore.end().unwrap_err();
    assert_eq!(vmm.wait().unwrap().signal(), Some(9));
    assert!(error.to_string().contains("was ended"), "{error}");
    assert_eq!(error.exit_status(), 1);
}

#[test]
fn a_vmm_whose_message_is_refused_is_ended_if_it_would_wait() {
    if let Some(vm) = loaded(63) {
        vm.read(0);
        unreachable!("a page without a pager was read");
    }
    let snapshot = Snapshot::new(64 * PAGE, &[1]);
    let restore = snapshot.restore("");
    let mut vmm = vmm("a_vmm_whose_message_is_refused_is_ended_if_it_would_wait", &snapshot);
    let error = restore.end().unwrap_err();
    assert_eq!(vmm.wait().unwrap().signal(), Some(9));
    assert!(error.to_string().contains("is it the snapshot's own?"), "{error}");
}

#[test]
fn a_vmm_that_would_wait_for_a_message_that_is_refused_is_ended() {
    const NAME: &str = "a_vmm_that_would_wait_for_a_message_that_is_refused_is_ended";
    const TRAP: &str = "VMEM_PAGER_TEST_TRAP";
    let traps = || Trap::REFUSED.into_iter().filter(|trap| trap.brings_userfaultfd());
    if let (Some(socket), Ok(index)) = (env::var_os(SOCKET), env::var(TRAP)) {
        let vm = Vm::new(&[(1, PAGE), (63, PAGE)]);
        vm.load_with(socket.as_ref(), traps().nth(index.parse().unwrap()).unwrap());
        vm.read(1);
        unreachable!("a page without a pager was read");
    }
    for (index, trap) in traps().enumerate() {
        let snapshot = Snapshot::new(64 * PAGE, &[1]);
        let run = Run::with_silence(None, Duration::from_millis(300));
        let restore = snapshot.restore_in("", run);
        let mut vmm = command(NAME, &snapshot).env(TRAP, index.to_string()).spawn().unwrap();
        let error = restore.end().unwrap_err();
        assert_eq!(vmm.wait().unwrap().signal(), Some(9), "{trap:?}: {error}");
        assert_eq!(error.exit_status(), 1, "{trap:?}: {error}");
        assert!(error.to_string().contains("is refused"), "{trap:?}: {error}");
    }
}

#[test]
fn a_vmm_that_ends_before_it_has_its_memory_is_noticed() {
    if let Some(vm) = loaded(64) {
        vm.read(63);
        std::process::exit(7);
    }
    let snapshot = Snapshot::new(64 * PAGE, &(0..64).collect::<Vec<_>>());
    let restore = snapshot.restore("--bandwidth 4K");
    let mut vmm = vmm("a_vmm_that_ends_before_it_has_its_memory_is_noticed", &snapshot);
    let error = restore.end().unwrap_err();
    assert_eq!(vmm.wait().unwrap().code(), Some(7));
    assert!(error.to_string().contains("ended before it had all"), "{error}");
    assert_eq!(error.exit_status(), 1);
}

#[test]
fn a_vmm_that_ends_after_it_has_its_memory_was_restored() {
    if let Some(vm) = loaded(64) {
        (0..64).for_each(|page| assert_eq!(vm.read(page), content(page)));
        std::process::exit(7);
    }
    let snapshot = Snapshot::new(64 * PAGE, &(0..64).collect::<Vec<_>>());
    let restore = snapshot.restore("");
    let mut vmm = vmm("a_vmm_that_ends_after_it_has_its_memory_was_restored", &snapshot);
    restore.end().unwrap();
    assert_eq!(vmm.wait().unwrap().code(), Some(7));
}

#[test]
fn a_restore_that_takes_too_long_or_is_interrupted_leaves_no_vmm_that_waits() {
    if let Some(vm) = loaded(64) {
        vm.read(0);
        loop {
            std::thread::park();
        }
    }
    let snapshot = Snapshot::new(64 * PAGE, &(0..64).collect::<Vec<_>>());
    let name = "a_restore_that_takes_too_long_or_is_interrupted_leaves_no_vmm_that_waits";
    for (timeout, status) in [(Some(Duration::from_secs(2)), 3), (None, 1)] {
        let restore = snapshot.restore_in("--bandwidth 4K", Run::new(timeout));
        let mut vmm = vmm(name, &snapshot);
        if timeout.is_none() {
            // The socket goes once the message has come.
            super::wait_until(|| !snapshot.socket().exists());
            restore.run.interrupt();
        }
        let error = restore.end().unwrap_err();
        assert_eq!(error.exit_status(), status, "{error}");
        // A VMM that had not connected yet finds no socket.
        let ended = vmm.wait().unwrap();
        assert!(ended.signal() == Some(9), "{ended:?}: {error}");
    }
}
