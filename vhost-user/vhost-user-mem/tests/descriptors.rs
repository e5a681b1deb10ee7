//! A daemon without file descriptors left: an error ends the connection, and nothing hangs.

mod common;

use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{ADDR, BOOT, REGION, RING, gpa, options, ram};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use small_vmm::api::EventStream;
use small_vmm::backend_channel::{BackendChannel, Behaviour};
use small_vmm::connection::{Connection, Error};
use small_vmm::daemon::Daemon;
use small_vmm::driver::{MemDriver, ResponseType};
use small_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use small_vmm::memory::{GuestRam, Layout};

/// Sets how many descriptors the daemon may have; `None` for as many as the system lets it.
fn limit(daemon: &Daemon, count: Option<u64>) {
    let pid = i32::try_from(daemon.pid()).ok().and_then(Pid::from_raw);
    let before = rustix::process::getrlimit(Resource::Nofile);
    let limit = Rlimit { current: count.or(before.maximum), maximum: before.maximum };
    prlimit(pid, Resource::Nofile, limit).unwrap();
}

/// The lowest number that no descriptor has. With that as the limit, none is left, whatever numbers the
/// others have.
fn first_free(daemon: &Daemon) -> u64 {
    let is_free =
        |number: &u64| fs::symlink_metadata(format!("/proc/{}/fd/{number}", daemon.pid())).is_err();
    (0..).find(is_free).unwrap()
}

fn descriptors(daemon: &Daemon) -> u64 {
    fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count() as u64
}

/// How many descriptors are open once nothing that has ended is still being closed.
fn settled(daemon: &Daemon) -> u64 {
    let deadline = Instant::now() + common::PATIENCE;
    let (mut count, mut same) = (descriptors(daemon), 0);
    while same < 25 {
        assert!(Instant::now() < deadline, "its descriptors come and go");
        std::thread::sleep(Duration::from_millis(10));
        let now = descriptors(daemon);
        same = if now == count { same + 1 } else { 0 };
        count = now;
    }
    count
}

/// Waits until as many are open as before.
fn wait_for(daemon: &Daemon, used: u64) {
    let deadline = Instant::now() + common::PATIENCE;
    while descriptors(daemon) != used {
        assert!(Instant::now() < deadline, "{} instead of {used}", descriptors(daemon));
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Connects, asks for nothing, and waits for the end of the connection.
fn assert_refused(daemon: &Daemon, socket: &Path) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
    let read = stream.read(&mut [0]);
    // Reset, where what was sent was not read.
    let ended = matches!(&read, Ok(0))
        || read.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset);
    assert!(ended, "{}: {read:?} {}", socket.display(), daemon.stderr());
}

/// All that a front-end does, as far as it gets; its requests are answered, or the connection ends.
fn visit(daemon: &Daemon, ram: &Arc<GuestRam>) -> Result<(), Error> {
    let mut connection = Connection::connect(&daemon.socket(), common::PATIENCE)?;
    connection.set_timeout(Duration::from_secs(30));
    let frontend = Frontend::new(connection);
    frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES)?;
    let _channel = BackendChannel::open(&frontend, Behaviour::AckAtOnce)?;
    frontend.set_mem_table(ram)?;
    let mut driver = MemDriver::at(ram, RING, 128, true).unwrap();
    frontend.start_ring(0, driver.ring())?;
    frontend.set_mem_table(ram)?;
    assert_eq!(driver.plug(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
    assert_eq!(driver.unplug(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
    frontend.get_vring_base(0)?;
    small_vmm::device_state::save(&frontend)?;
    Ok(())
}

#[test]
fn with_any_number_of_descriptors_left_a_front_end_is_served_or_refused_and_the_next_is_served() {
    let mut daemon = common::daemon(options());
    let ram = ram();
    visit(&daemon, &ram).unwrap();
    let (used, free) = (settled(&daemon), first_free(&daemon));
    let mut served = 0;
    for left in 0..40 {
        limit(&daemon, Some(free + left));
        let outcome = visit(&daemon, &ram);
        limit(&daemon, None);
        if let Err(Error::Timeout(..)) = outcome {
            panic!("with {left} descriptors left: {outcome:?} {}", daemon.stderr());
        }
        served += u32::from(outcome.is_ok());
        wait_for(&daemon, used);
        let next = visit(&daemon, &ram);
        assert!(next.is_ok(), "after {left} descriptors: {next:?} {}", daemon.stderr());
        wait_for(&daemon, used);
    }
    assert!(0 < served && served < 40, "{served}");
    assert!(daemon.is_running());
    // Found before a descriptor was passed on, and not by waiting for an answer.
    let stderr = daemon.stderr();
    assert!(stderr.contains("not enough file descriptors for what the front-end sent"), "{stderr}");
    assert!(!stderr.contains("did not answer"), "{stderr}");
}

/// The limit is at the first number that is free, or below it.
#[test]
fn without_a_descriptor_left_connections_to_all_sockets_are_refused_at_once_and_served_later() {
    let mut daemon = common::daemon(options().discard_socket());
    let ram = ram();
    visit(&daemon, &ram).unwrap();
    let sockets = [daemon.socket(), daemon.discard_socket(), daemon.api_socket()];
    // Which take the numbers that are free below those of the sockets.
    let held: Vec<EventStream> = (0..4).map(|_| daemon.api().events().unwrap()).collect();
    let (used, free) = (settled(&daemon), first_free(&daemon));
    for below in [0, 3] {
        limit(&daemon, Some(free - below));
        for round in 0..3 {
            for socket in &sockets {
                assert_refused(&daemon, socket);
            }
            assert_eq!(settled(&daemon), used, "{below} {round}");
        }
        limit(&daemon, None);
        visit(&daemon, &ram).unwrap();
        assert_eq!(daemon.api().device().unwrap()["plugged_size"], 0);
        let mut channel = UnixStream::connect(daemon.discard_socket()).unwrap();
        channel.set_read_timeout(Some(common::PATIENCE)).unwrap();
        rustix::net::shutdown(&channel, rustix::net::Shutdown::Write).unwrap();
        // Which it says before it ends.
        channel.read_to_end(&mut Vec::new()).unwrap();
        wait_for(&daemon, used);
    }
    assert!(daemon.stderr().contains("refused a connection: no file descriptor is left"));
    limit(&daemon, Some(free));
    sockets.iter().for_each(|socket| assert_refused(&daemon, socket));
    assert!(daemon.terminate(common::PATIENCE).unwrap().success(), "{}", daemon.stderr());
    assert!(sockets.iter().all(|socket| !socket.exists()));
    drop(held);
}

#[test]
fn as_many_regions_as_there_are_descriptors_for_are_offered_and_can_be_had() {
    // It is started with fewer than it may have.
    let before = rustix::process::getrlimit(Resource::Nofile);
    let fewer = Rlimit { current: Some(600), ..before };
    rustix::process::setrlimit(Resource::Nofile, fewer).unwrap();
    let daemon = common::daemon(options());
    rustix::process::setrlimit(Resource::Nofile, before).unwrap();
    let before = before.maximum;
    let status = fs::read_to_string(format!("/proc/{}/limits", daemon.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let soft = line.split_whitespace().nth(3).unwrap();
    assert_eq!(soft.parse::<u64>().ok(), before, "the soft limit is raised to the hard one");
    limit(&daemon, Some(1024));
    let layout = Layout::boot_and_device(BOOT, ADDR, REGION).unwrap().split(ADDR, 512).unwrap();
    let ram = Arc::new(GuestRam::new(layout).unwrap());
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
    let slots = frontend.get_max_mem_slots().unwrap();
    assert_eq!(slots, 384);
    for region in &ram.regions()[..slots as usize] {
        frontend.add_mem_region(&ram, region).unwrap();
    }
    let mut driver = MemDriver::at(&ram, RING, 128, true).unwrap();
    frontend.start_ring(0, driver.ring()).unwrap();
    let last = slots - 2;
    assert_eq!(driver.plug(gpa(last), 1).unwrap().kind(), ResponseType::Ack);
    assert_eq!(driver.plug(gpa(last + 1), 1).unwrap().kind(), ResponseType::Busy);
    // One for the mapping and one for the device, and no more with each change.
    assert!(descriptors(&daemon) < 2 * slots + 40, "{}", descriptors(&daemon));
}
