use std::fs;
use std::net::TcpStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Output};
use std::thread;

use clap::Parser;
use rustix::process::{Signal, getppid, kill_process};
use sandbox::RUNTIME;

use super::*;
use crate::args::Args;

/// Says what a process of this test is to try.
const TRY: &str = "VHOST_USER_MEM_TRY";

#[test]
fn each_call_of_the_lists_exists() {
    let mut lists = [&PROCESS[..], &POSTCOPY[..]].concat();
    lists.extend(THREADS.iter().map(|thread| thread.calls));
    assert_eq!(sandbox::unknown(&lists), Vec::<&str>::new());
}

#[test]
fn no_thread_may_do_what_the_process_may_not() {
    let process = [PROCESS.concat(), POSTCOPY.concat(), RUNTIME.to_vec()].concat();
    for thread in THREADS {
        let more = thread.calls.iter().filter(|call| !process.contains(call));
        assert_eq!(more.collect::<Vec<_>>(), Vec::<&&str>::new(), "{}", thread.name);
    }
}

#[test]
fn folders_of_sockets_are_within_reach_while_there_is_something_to_remove() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api");
    let words = "vhost-user-mem --fd 3 --addr 4G --region-size 1G --api-socket";
    let words = words.split(' ').map(std::ffi::OsString::from).chain([path.clone().into()]);
    let config = Config::try_from(Args::try_parse_from(words).unwrap()).unwrap();
    let folder = format!("{:?}", dir.path());
    let reached = || format!("{:?}", reach(&config).unwrap()).contains(&folder);
    assert!(!reached(), "bound by the service manager");
    let (_listener, file) = listener::bind(&path).unwrap();
    assert!(reached());
    drop(file);
    assert!(!reached());
}

/// Confines this process as the daemon confines itself.
fn confine(options: &str) {
    let words = "vhost-user-mem --socket-path s --addr 4G --region-size 1G --state-file state";
    let words = words.split(' ').chain(options.split(' ').filter(|word| !word.is_empty()));
    let config = Config::try_from(Args::try_parse_from(words).unwrap()).unwrap();
    let confined = sandbox::begin(&config.sandbox, &policy(&config), false).unwrap();
    confined.enter(&reach(&config).unwrap()).unwrap();
}

fn in_thread(name: &'static str, act: impl FnOnce() + Send + 'static) {
    let confined = move || {
        sandbox::confine_thread(name);
        act();
    };
    thread::Builder::new().name(name.to_owned()).spawn(confined).unwrap().join().unwrap();
}

fn refused<T>(done: io::Result<T>) {
    let error = done.err().expect("it was let through");
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
}

/// Does what the daemon may not. What is refused with an error returns.
fn attempt(what: &str) {
    confine(if what.starts_with("postcopy") { "--postcopy" } else { "" });
    match what {
        "files" | "postcopy files" => {
            refused(fs::read("/etc/passwd"));
            refused(fs::read("../elsewhere/secret"));
            refused(fs::write("../elsewhere/new", ""));
            refused(fs::remove_file("../elsewhere/secret"));
            refused(fs::rename("../elsewhere/secret", "secret"));
            refused(fs::write("/proc/self/oom_score_adj", "0"));
            // What it needs.
            fs::read("/proc/self/maps").unwrap();
            fs::write("state.new", "x").unwrap();
            fs::rename("state.new", "state").unwrap();
        }
        "files of the worker" => in_thread(WORKER, || refused(fs::read("/proc/self/maps"))),
        "tcp" => drop(TcpStream::connect("127.0.0.1:1")),
        "execute" | "postcopy execute" => refused::<()>(Err(Command::new("/bin/true").exec())),
        "fork" => drop(Command::new("/bin/true").spawn()),
        "signal" => drop(kill_process(getppid().unwrap(), Signal::CONT)),
        "folder" => drop(fs::create_dir("folder")),
        "link" => drop(std::os::unix::fs::symlink("state", "link")),
        "socket of the worker" => {
            in_thread(WORKER, || drop(std::os::unix::net::UnixStream::pair()));
        }
        "name of the worker" => in_thread(WORKER, || drop(fs::remove_file("state"))),
        "rename of the management" => {
            in_thread(MANAGEMENT, || drop(fs::rename("state", "other")));
        }
        other => panic!("{other}"),
    }
}

/// In a process of its own, which has itself confined for good.
fn in_process(what: &str) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let (own, elsewhere) = (dir.path().join("own"), dir.path().join("elsewhere"));
    fs::create_dir(&own).unwrap();
    fs::create_dir(&elsewhere).unwrap();
    fs::write(own.join("state"), "").unwrap();
    fs::write(elsewhere.join("secret"), "secret").unwrap();
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "confinement::tests::what_is_not_listed_is_refused", "--nocapture"])
        .env(TRY, what)
        .current_dir(own)
        .output()
        .unwrap()
}

#[test]
fn what_is_not_listed_is_refused() {
    if let Some(what) = std::env::var_os(TRY) {
        attempt(what.to_str().unwrap());
        return;
    }
    for what in ["files", "files of the worker", "postcopy files", "postcopy execute"] {
        let output = in_process(what);
        assert!(output.status.success(), "{what}: {output:?}");
    }
    // With all signals blocked, as processes are made, nothing can be said.
    assert_eq!(in_process("fork").status.signal(), Some(libc::SIGSYS));
    for (what, call, thread) in [
        ("tcp", "socket", ""),
        ("execute", "execve", ""),
        ("signal", "kill", ""),
        ("folder", "mkdir", ""),
        ("link", "symlink", ""),
        ("socket of the worker", "socketpair", WORKER),
        ("name of the worker", "unlink", WORKER),
        ("rename of the management", "rename", MANAGEMENT),
    ] {
        let output = in_process(what);
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{what}: {output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        // Of some calls there is a form with a folder, which begins alike.
        let call = format!("vhost-user-mem: the sandbox refused the system call {call}");
        let by = format!(" of the thread {thread}");
        assert!(said.contains(&call) && said.contains(&by), "{what}: {said}");
    }
}
