//! A front-end that takes back memory it shared ends its own connection, never the daemon.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use small_vmm::daemon::Daemon;
use small_vmm::driver::{MemRequest, RequestType, ResponseType, Shape};
use small_vmm::memory::{GuestRam, memfd};
use small_vmm::split_ring::Segment;

use common::{BOOT, REGION, connect, gpa, options, ram};

/// Whatever the front-end takes away, its connection ends and the next one is served.
#[test]
fn memory_that_the_front_end_takes_away_ends_its_connection_only() {
    let mut daemon = common::daemon(options());
    let truncations: [fn(&Daemon, &Arc<GuestRam>); 4] = [
        // The worker finds nothing where the ring was.
        |daemon, ram| {
            let (frontend, _channel, driver) = connect(daemon, ram);
            ram.region(0).unwrap().file.set_len(0).unwrap();
            driver.ring().force_kick().unwrap();
            frontend.connection().wait_closed().unwrap();
        },
        // It finds the ring, but not the buffers.
        |daemon, ram| {
            let (frontend, _channel, mut driver) = connect(daemon, ram);
            let chain = [Segment::readable(BOOT - 64, 24), Segment::writable(BOOT - 32, 10)];
            driver.ring_mut().add(&chain).unwrap();
            ram.region(0).unwrap().file.set_len(BOOT / 2).unwrap();
            driver.ring().force_kick().unwrap();
            frontend.connection().wait_closed().unwrap();
        },
        // The thread that serves messages reads the used index.
        |daemon, ram| {
            let (frontend, _channel, driver) = connect(daemon, ram);
            frontend.get_vring_base(0).unwrap();
            ram.region(0).unwrap().file.set_len(0).unwrap();
            let _ = frontend.set_vring_addr(0, driver.ring(), None);
            frontend.connection().wait_closed().unwrap();
        },
        // An answer is marked in a log that is gone.
        |daemon, ram| {
            let (frontend, _channel, mut driver) = connect(daemon, ram);
            let size = (common::ADDR + REGION) / 4096 / 8;
            let log = memfd("log", size, rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            frontend.set_log_base(&log, size, 0).unwrap();
            log.set_len(0).unwrap();
            let request = MemRequest::new(RequestType::State, gpa(0), 1).to_bytes();
            driver.submit(&request, &Shape::default()).unwrap();
            driver.ring().force_kick().unwrap();
            frontend.connection().wait_closed().unwrap();
        },
    ];
    for (index, truncate) in truncations.iter().enumerate() {
        truncate(&daemon, &ram());
        assert!(daemon.is_running(), "case {index}: {}", daemon.stderr());
        // Said once the connection has been cleared away.
        let deadline = Instant::now() + common::PATIENCE;
        while daemon.stderr().matches("the front-end shared is gone").count() != index + 1 {
            assert!(Instant::now() < deadline, "case {index}: {}", daemon.stderr());
            std::thread::sleep(Duration::from_millis(2));
        }
        let (_frontend, _channel, mut driver) = connect(&daemon, &ram());
        assert_eq!(driver.state(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
    }
}

/// Only what a front-end shares is mended; any other SIGBUS ends the daemon as ever.
#[test]
fn a_bus_error_of_another_origin_still_ends_the_daemon() {
    let mut daemon = common::daemon(options());
    daemon.signal(rustix::process::Signal::BUS).unwrap();
    let deadline = Instant::now() + common::PATIENCE;
    while daemon.is_running() {
        assert!(Instant::now() < deadline, "it ignores SIGBUS");
        std::thread::sleep(Duration::from_millis(2));
    }
}
