//! Destinations that stop reading, or read next to nothing.

use std::io::{Read, Write};
use std::sync::mpsc;

use serde_json::json;

use super::*;
use crate::devices::{DevicePhase, DeviceSection, Devices};
use crate::stream::{Command, ReturnMessage, SectionHeader, put_command};
use crate::test_support::{Slow, SlowReader};
use vmstate::wire::WireRead;

const MOMENT: Duration = Duration::from_millis(20);
/// Longer than any thread is kept from running.
const LONG: Duration = Duration::from_secs(60);

/// More than any socket buffers here.
const MUCH: usize = 4 << 20;

/// A device with so many bytes of state, and so long a description of it.
struct Large {
    state: usize,
    description: usize,
}

impl Devices for Large {
    fn save(&mut self, phase: DevicePhase) -> Result<Vec<DeviceSection>, MigrationError> {
        let section = DeviceSection {
            idstr: "large".to_owned(),
            instance_id: 0,
            version_id: 1,
            payload: vec![1; self.state],
            description: json!("x".repeat(self.description)),
        };
        Ok(if phase == DevicePhase::Early { Vec::new() } else { vec![section] })
    }

    fn load(
        &mut self,
        _header: &SectionHeader,
        _phase: DevicePhase,
        _reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        unreachable!("it is a source")
    }

    fn loaded(&mut self) -> Result<(), MigrationError> {
        unreachable!("it is a source")
    }
}

/// Sends a guest of a few pages and this device; `running` and `stopped` are how long writes wait.
fn send(
    near: UnixStream,
    mut device: Large,
    source: &Witness,
    running: Duration,
    stopped: Duration,
) -> Result<(), OutgoingError> {
    let from = Side::new(&[0, 1]);
    fill(&from.region, 0..10, 1);
    let progress = Arc::new(Progress::new());
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Script>::default() };
    let ram = RamSave::new(&from.blocks, ListOptions::default(), Arc::clone(&progress), tracker);
    let outgoing = Outgoing {
        parameters: Parameters { switchover_timeout: stopped, ..parameters() },
        guest: source,
        handlers: vec![Box::new(ram.unwrap())],
        devices: &mut device,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    let mut channel = Channel::new(near, progress).unwrap();
    channel.set_write_patience(running);
    outgoing.run(channel)
}

fn assert_timed_out(error: &MigrationError) {
    assert!(
        matches!(error, MigrationError::Io { source, .. } if source.kind() == io::ErrorKind::TimedOut),
        "{error}"
    );
    assert!(error.to_string().contains("taken for gone"), "{error}");
}

#[test]
fn a_destination_that_stops_reading_while_the_guest_runs_fails_and_the_guest_was_not_stopped() {
    for slow in [Slow::Nothing, Slow::Trickle] {
        let (near, far) = UnixStream::pair().unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&near, 4096).unwrap();
        let _reader = SlowReader::start(far, slow);
        let source = Witness::default();
        let device = Large { state: 0, description: 0 };
        let failed = send(near, device, &source, MOMENT, LONG).unwrap_err();
        assert_timed_out(&failed.error);
        assert_eq!(failed.guest, GuestAfter::RunsHere);
        assert!(source.log().is_empty(), "{:?}", source.log());
    }
}

#[test]
fn a_destination_that_stops_reading_once_the_guest_is_stopped_gives_it_back() {
    for slow in [Slow::Nothing, Slow::Trickle] {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut stopping = far.try_clone().unwrap();
        let (tell, stopped) = mpsc::channel();
        let reading = thread::spawn(move || {
            let mut switchover = Vec::new();
            put_command(&mut switchover, &Command::SwitchoverStart);
            read_to(&mut far, &switchover);
            tell.send(SlowReader::start(far, slow)).unwrap();
        });
        let source = Witness::default();
        let device = Large { state: MUCH, description: 0 };
        let failed = send(near, device, &source, LONG, MOMENT).unwrap_err();
        assert_timed_out(&failed.error);
        assert_eq!(failed.guest, GuestAfter::RunsHere);
        assert_eq!(source.log(), ["stop", "run"]);
        reading.join().unwrap();
        drop(stopped.recv().unwrap());
        // It is not told that it may have the guest.
        let mut rest = Vec::new();
        stopping.read_to_end(&mut rest).unwrap();
        assert!(rest.len() < MUCH, "{}", rest.len());
    }
}

/// Reads up to and with `wanted`.
fn read_to(stream: &mut UnixStream, wanted: &[u8]) {
    let mut read = Vec::new();
    while !read.ends_with(wanted) {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        read.push(byte[0]);
    }
}

/// A destination that has loaded everything, and reads no description. Then it says `last`.
fn send_to_one_that_reads_no_description(
    last: Option<ReturnMessage>,
) -> (Result<(), OutgoingError>, Vec<&'static str>) {
    let (near, mut far) = UnixStream::pair().unwrap();
    let there = thread::spawn(move || {
        let mut ping = Vec::new();
        put_command(&mut ping, &Command::Ping(PING_LOADED));
        read_to(&mut far, &ping);
        let mut bytes = Vec::new();
        ReturnMessage::Pong(PING_LOADED).put(&mut bytes);
        far.write_all(&bytes).unwrap();
        // The source has given up waiting when it ends its direction.
        let flags = rustix::event::PollFlags::RDHUP;
        let mut fds = [rustix::event::PollFd::new(&far, flags)];
        rustix::event::poll(&mut fds, None).unwrap();
        if let Some(last) = last {
            let mut bytes = Vec::new();
            last.put(&mut bytes);
            far.write_all(&bytes).unwrap();
        }
    });
    let source = Witness::default();
    let device = Large { state: 0, description: MUCH };
    let sent = send(near, device, &source, LONG, Duration::from_secs(2));
    there.join().unwrap();
    (sent, source.log())
}

#[test]
fn a_destination_that_takes_the_guest_without_its_description_has_it() {
    let (sent, log) = send_to_one_that_reads_no_description(Some(ReturnMessage::Shut(0)));
    sent.unwrap();
    assert_eq!(log, ["stop"]);
}

#[test]
fn a_destination_that_reads_no_description_and_leaves_has_no_guest() {
    for last in [None, Some(ReturnMessage::Shut(5))] {
        let (sent, log) = send_to_one_that_reads_no_description(last);
        let failed = sent.unwrap_err();
        assert_timed_out(&failed.error);
        assert_eq!(failed.guest, GuestAfter::RunsHere);
        assert_eq!(log, ["stop", "run"]);
    }
}
