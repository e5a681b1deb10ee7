//! What the management API costs a daemon, whatever is asked of it.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use small_vmm::daemon::{Daemon, DaemonOptions};

use common::{ADDR, BLOCK, REGION, daemon_binary};

/// 16 calls at a time, 4 lists that are sent, the server and its worker.
const MOST: usize = 22;
const CLIENTS: usize = 60;
const REQUESTS: usize = 200;
const BUSY: usize = 8;
/// How long a client waits for the next bytes of an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Counts a client that has ended, in any way.
struct Done<'a>(&'a AtomicUsize);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn threads_are_bounded_however_many_calls_there_are() {
    let options = DaemonOptions::new(ADDR, REGION).block_size(BLOCK);
    let daemon = Daemon::start(daemon_binary(), options).unwrap();
    let done = AtomicUsize::new(0);
    thread::scope(|scope| {
        // On a busy machine a thread that has ended its call takes a while to be there for another.
        for _ in 0..BUSY {
            scope.spawn(|| {
                while done.load(Ordering::Relaxed) < CLIENTS {
                    std::hint::spin_loop();
                }
            });
        }
        // Made before the threads, so that one that cannot be started counts as well.
        let clients: Vec<_> = (0..CLIENTS).map(|_| Done(&done)).collect();
        for client in clients {
            let daemon = &daemon;
            scope.spawn(move || {
                let _done = client;
                let mut client = UnixStream::connect(daemon.api_socket()).unwrap();
                client.set_read_timeout(Some(PATIENCE)).unwrap();
                client.set_write_timeout(Some(PATIENCE)).unwrap();
                let requests = "GET /v1/device HTTP/1.1\r\nHost: a\r\n\r\n".repeat(REQUESTS)
                    + "GET /v1/device HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
                client.write_all(requests.as_bytes()).unwrap();
                let mut answers = String::new();
                client.read_to_string(&mut answers).unwrap();
                assert_eq!(answers.matches("HTTP/1.1 200").count(), REQUESTS + 1);
            });
        }
    });
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let names = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("comm")));
    let threads = names.filter(|name| name.as_ref().is_ok_and(|name| name.trim() == "management"));
    let threads = threads.count();
    assert!(threads <= MOST, "{threads} threads of the API");
}
