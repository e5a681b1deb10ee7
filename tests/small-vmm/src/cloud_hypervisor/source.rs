//! A Cloud Hypervisor that sends its guest: `send-migration` with `local=on`.
//!
//! What it does is a list of [`Step`]s. [`steps`] is the list of one that does it right, and of one with a [`Trap`].

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use serde_json::Value;

use super::frames::{self, Command, FRAME_LEN};
use super::guest::{Guest, memfd};

/// What it does otherwise than it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// Nothing.
    None,
    /// The connection ends before this command is sent.
    CloseBefore(Command),
    /// Nothing more is sent from this command on.
    SilentBefore(Command),
    /// Only a part of the command's request is sent.
    CutIn(Command),
    /// Only a part of the command's payload is sent.
    CutPayload(Command),
    /// A number that no command has.
    UnknownBefore(Command),
    /// This command comes twice.
    Twice(Command),
    /// Abandon comes in its place.
    AbandonBefore(Command),
    /// The connection ends as soon as this command is sent.
    CloseAfter(Command),
    /// Nothing is read any more once this command is sent, and the connection stays open.
    StopAfter(Command),
    /// Header, slot and descriptor are one message.
    OneMessage,
    /// A slot without its descriptor.
    NoDescriptor,
    /// Two with one slot.
    TwoDescriptors,
    /// A descriptor that is not of a file.
    Socket,
    /// The file is shorter than the mapping.
    Short,
    /// A mapping has no descriptor.
    MissingSlot,
    /// A descriptor is of no mapping.
    FurtherSlot,
    /// The version in Start is 1.
    OtherVersion,
    /// The Config says nothing of the layout.
    BadConfig,
    /// Two mappings overlap.
    Overlap,
    /// The name of a zone has a slash in it.
    SlashInZone,
    /// The State has no snapshots.
    BadState,
    /// The State has nothing of the virtio-mem device.
    NoDevice,
    /// As many blocks are plugged as the device does not say.
    OtherPluggedSize,
    /// The device has its region elsewhere than the mapping.
    OtherRegion,
    /// The device has fewer blocks than the mapping.
    FewerBlocks,
}

/// Who has the guest in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was told that the guest is taken, and has ended.
    Ended,
    /// The guest runs on here: the answer was Error, or the connection ended.
    Continues,
}

/// A part of what a source does; each that sends waits for an answer, and a source goes no further without Ok.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Sends a command as it should be. MemoryFd is of the mapping of this place; Complete is CompletePaused of a
    /// guest that is paused.
    Send(Command, usize),
    /// Sends as many bytes of a command and its payload, and closes.
    Cut(Command, usize),
    /// Sends a number that no command has.
    Unknown,
    /// Closes the connection.
    Close,
    /// Sends a command and closes without reading the answer.
    SendAndClose(Command),
    /// Sends a command and does no more, as a process that is stopped.
    SendAndStop(Command),
    /// Waits to be told, and says nothing.
    Wait,
}

/// The steps of a source that does all as it should, with `mappings`.
pub fn right_steps(mappings: usize) -> Vec<Step> {
    let mut steps = vec![Step::Send(Command::Start, 0)];
    steps.extend((0..mappings).map(|index| Step::Send(Command::MemoryFd, index)));
    steps.extend([Command::Config, Command::State, Command::Complete].map(|it| Step::Send(it, 0)));
    steps
}

/// The steps of a source with a trap.
pub fn steps(mappings: usize, trap: Trap) -> Vec<Step> {
    let mut steps = right_steps(mappings);
    let place = |steps: &[Step], command| {
        let found =
            steps.iter().position(|step| matches!(step, Step::Send(it, _) if *it == command));
        found.expect("each command is sent")
    };
    let mut cut = |command, step| {
        let at = place(&steps, command);
        steps.truncate(at);
        steps.push(step);
    };
    match trap {
        Trap::CloseBefore(command) => cut(command, Step::Close),
        Trap::SilentBefore(command) => cut(command, Step::Wait),
        Trap::CutIn(command) => cut(command, Step::Cut(command, FRAME_LEN / 2)),
        Trap::CutPayload(command) => cut(command, Step::Cut(command, FRAME_LEN + 10)),
        Trap::UnknownBefore(command) => cut(command, Step::Unknown),
        Trap::CloseAfter(command) => cut(command, Step::SendAndClose(command)),
        Trap::StopAfter(command) => cut(command, Step::SendAndStop(command)),
        Trap::AbandonBefore(command) => cut(command, Step::Send(Command::Abandon, 0)),
        Trap::Twice(command) => {
            let at = place(&steps, command);
            steps.insert(at, steps[at]);
        }
        Trap::MissingSlot => drop(steps.remove(1)),
        Trap::FurtherSlot => steps.insert(mappings + 1, Step::Send(Command::MemoryFd, mappings)),
        _ => {}
    }
    steps
}

/// Sends a guest over `stream`.
pub fn send(stream: UnixStream, guest: &Guest, trap: Trap) -> Outcome {
    perform(stream, guest, &steps(guest.mappings.len(), trap), trap)
}

/// Does these steps; what a command has in it is as `trap` says.
pub fn perform(mut stream: UnixStream, guest: &Guest, steps: &[Step], trap: Trap) -> Outcome {
    let mut source = Source { stream: &mut stream, guest, trap };
    let complete = |step: &Step| matches!(step, Step::Send(Command::Complete, _));
    for step in steps {
        if source.step(*step).is_none() {
            return Outcome::Continues;
        }
        // From the Ok on it ends.
        if complete(step) {
            return Outcome::Ended;
        }
    }
    Outcome::Continues
}

struct Source<'a> {
    stream: &'a mut UnixStream,
    guest: &'a Guest,
    trap: Trap,
}

impl Source<'_> {
    /// `None`: the guest stays here.
    fn step(&mut self, step: Step) -> Option<()> {
        match step {
            Step::Send(Command::MemoryFd, index) => self.memory(index),
            Step::Send(command, _) => {
                let (request, payload) = self.message(command);
                self.write(&request)?;
                self.write(&payload)?;
                self.answer()?;
                if command == Command::Config {
                    // It still runs: what it writes now counts, and what was read before does not.
                    for (mapping, page, seed) in &self.guest.writes {
                        self.guest.write(*mapping, *page, &super::content(*seed));
                    }
                }
                (command != Command::Abandon).then_some(())
            }
            Step::Cut(command, len) => {
                let (request, payload) = self.message(command);
                let bytes = [&request[..], &payload].concat();
                self.write(&bytes[..len.min(bytes.len() - 1)])?;
                None
            }
            Step::Unknown => {
                self.write(&frames::request(77, 0))?;
                self.answer()
            }
            Step::Close => None,
            Step::SendAndClose(command) => {
                let (request, payload) = self.message(command);
                self.write(&request)?;
                self.write(&payload)?;
                None
            }
            Step::SendAndStop(command) => {
                let (request, payload) = self.message(command);
                self.write(&request)?;
                self.write(&payload)?;
                // Until the other end closes, without reading what it says.
                let mut fds = [PollFd::new(&self.stream, PollFlags::empty())];
                poll(&mut fds, None).expect("a socket");
                None
            }
            Step::Wait => {
                // An answer that nothing has asked for.
                let _ = self.answer();
                None
            }
        }
    }

    fn message(&self, command: Command) -> ([u8; FRAME_LEN], Vec<u8>) {
        let (number, payload) = match command {
            Command::Config => (command.number(), self.config().to_string().into_bytes()),
            Command::State => (command.number(), self.state().to_string().into_bytes()),
            Command::MemoryFd => (command.number(), vec![0; 4]),
            Command::PageFault => (command.number(), vec![0; 16]),
            Command::Complete if self.guest.paused => {
                (Command::CompletePaused.number(), Vec::new())
            }
            _ => (command.number(), Vec::new()),
        };
        let mut request = frames::request(number, payload.len() as u64);
        if self.trap == Trap::OtherVersion && command == Command::Start {
            request[2] = 1;
        }
        (request, payload)
    }

    fn config(&self) -> Value {
        let mut config = self.guest.config();
        let data = &mut config["memory_manager_data"];
        match self.trap {
            Trap::BadConfig => drop(data.take()),
            Trap::SlashInZone => data["guest_ram_mappings"][1]["zone_id"] = "hot/vmem".into(),
            Trap::Overlap => {
                data["guest_ram_mappings"][1]["gpa"] = data["guest_ram_mappings"][2]["gpa"].clone();
            }
            _ => {}
        }
        config
    }

    fn state(&self) -> Value {
        let mut state = self.guest.state();
        let devices = &mut state["snapshots"]["device-manager"]["snapshots"];
        let node = &mut devices["hot"]["snapshot_data"]["state"];
        let Some(text) = node.as_str() else {
            return self.guest.state();
        };
        let mut device: Value = serde_json::from_str(text).expect("State is JSON");
        match self.trap {
            Trap::OtherPluggedSize => device["config"]["plugged_size"] = 4096.into(),
            Trap::OtherRegion => device["config"]["addr"] = 4096.into(),
            Trap::FewerBlocks => {
                device["blocks_state"]["bitmap"].as_array_mut().map(Vec::pop);
            }
            _ => {}
        }
        *node = device.to_string().into();
        match self.trap {
            Trap::NoDevice => {
                devices.as_object_mut().map(|devices| devices.remove("hot"));
            }
            Trap::BadState => drop(state["snapshots"].take()),
            _ => {}
        }
        state
    }

    fn memory(&mut self, index: usize) -> Option<()> {
        let Some(mapping) = self.guest.mappings.get(index) else {
            // Of no mapping.
            return self.memory_fd(1000, &[self.guest.mappings[0].file.as_fd()]);
        };
        let (slot, file) = (mapping.slot, mapping.file.as_fd());
        let fds = match self.trap {
            _ if index != 0 => vec![file],
            Trap::NoDescriptor => vec![],
            Trap::TwoDescriptors => vec![file, file],
            Trap::Short => return self.memory_fd(slot, &[memfd(4096, None).as_fd()]),
            Trap::Socket => {
                let socket = self.stream.try_clone().ok()?;
                return self.memory_fd(slot, &[socket.as_fd()]);
            }
            Trap::OneMessage => {
                let mut bytes = frames::request(Command::MemoryFd.number(), 4).to_vec();
                bytes.extend_from_slice(&slot.to_le_bytes());
                frames::send_with_fds(self.stream, &bytes, &[file]);
                return self.answer();
            }
            _ => vec![file],
        };
        self.memory_fd(slot, &fds)
    }

    fn memory_fd(&mut self, slot: u32, fds: &[std::os::fd::BorrowedFd<'_>]) -> Option<()> {
        self.write(&frames::request(Command::MemoryFd.number(), 4))?;
        frames::send_with_fds(self.stream, &slot.to_le_bytes(), fds);
        self.answer()
    }

    fn write(&mut self, bytes: &[u8]) -> Option<()> {
        self.stream.write_all(bytes).ok()
    }

    fn answer(&mut self) -> Option<()> {
        frames::read_answer(self.stream)?.then_some(())
    }
}
