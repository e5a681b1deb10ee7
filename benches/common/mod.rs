//! Two things measured in turn in one run, told as a ratio: on a shared machine single times are
//! noise, and the ratio of neighbours is not.

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use migration::Guest;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::time::{ClockId, clock_gettime};

/// Measures `ours` and `peer` in turn, `runs` times each after one round that is not counted, and
/// prints the line of [`report`].
pub fn compare(
    what: &str,
    runs: usize,
    mut ours: impl FnMut() -> Duration,
    mut peer: impl FnMut() -> Duration,
) {
    // The first round warms up.
    let rounds: Vec<_> = (0..=runs).map(|_| (ours(), peer())).skip(1).collect();
    report(what, &rounds);
}

/// Prints the median times of ours and the peer, and the median ratio with its spread.
pub fn report(what: &str, rounds: &[(Duration, Duration)]) {
    let (mut a, mut b, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for (ours, peer) in rounds {
        a.push(ours.as_secs_f64());
        b.push(peer.as_secs_f64());
        ratios.push(peer.as_secs_f64() / ours.as_secs_f64());
    }
    for values in [&mut a, &mut b, &mut ratios] {
        values.sort_by(f64::total_cmp);
    }
    let middle = |values: &[f64]| values[values.len() / 2];
    println!(
        "{what:<58} {:>10} {:>10}   {:>8.2}x ({:.2}-{:.2})",
        human(middle(&a)),
        human(middle(&b)),
        middle(&ratios),
        ratios[0],
        ratios[ratios.len() - 1],
    );
}

/// Prints the head of a table of [`compare`] lines.
pub fn head(title: &str, peer: &str) {
    println!("\n{title}");
    println!("{:<58} {:>10} {:>10}   {:>8}", "", "ours", peer, "peer/ours");
}

/// How long `work` takes, from `times` goes.
pub fn time(times: u32, mut work: impl FnMut()) -> Duration {
    let start = Instant::now();
    for _ in 0..times {
        work();
    }
    start.elapsed() / times
}

/// How long `work` keeps this thread busy. For work that does not wait: what others on the machine
/// take of the CPU meanwhile does not count.
pub fn busy(work: impl FnOnce()) -> Duration {
    let start = thread_time();
    work();
    thread_time() - start
}

fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).expect("time goes on")
}

/// xorshift64: the same numbers in every run.
pub fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Memory of so many bytes, of which nothing is there yet.
pub fn memfd(size: u64) -> File {
    let file = memfd_create("bench", MemfdFlags::CLOEXEC).expect("memory");
    let file = File::from(file);
    file.set_len(size).expect("a size");
    file
}

fn human(seconds: f64) -> String {
    match seconds {
        s if s < 1e-6 => format!("{:.1} ns", s * 1e9),
        s if s < 1e-3 => format!("{:.2} us", s * 1e6),
        s if s < 1.0 => format!("{:.2} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}

/// What a connection goes over.
#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    Unix,
    Tcp,
}

/// Both ends of a connection.
pub fn pair(kind: Kind) -> (OwnedFd, OwnedFd) {
    match kind {
        Kind::Unix => {
            let (a, b) = UnixStream::pair().unwrap();
            (a.into(), b.into())
        }
        Kind::Tcp => {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (far, _) = listener.accept().unwrap();
            near.set_nodelay(true).unwrap();
            (near.into(), far.into())
        }
    }
}

/// A guest that does nothing.
pub struct Idle;

impl Guest for Idle {
    fn stop(&self) -> Result<(), String> {
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        Ok(())
    }
}
