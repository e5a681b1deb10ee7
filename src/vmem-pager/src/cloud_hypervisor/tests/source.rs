//! A Cloud Hypervisor that sends its guest: `send-migration` with `local=on`, as the stock one does it.

use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::io::IoSlice;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;

use super::guest::Guest;
use crate::cloud_hypervisor::protocol::{Command, FRAME_LEN, Request};

/// What it does otherwise than it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
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
    /// Header, slot and descriptor are one message.
    OneMessage,
    NoDescriptor,
    TwoDescriptors,
    /// A descriptor that is not of a file.
    Socket,
    /// The file is shorter than the mapping.
    Short,
    MissingSlot,
    FurtherSlot,
    OtherVersion,
    /// The Config says nothing of the layout.
    BadConfig,
    Overlap,
    SlashInZone,
    BadState,
    /// The State has nothing of the virtio-mem device.
    NoDevice,
    /// As many blocks are plugged as the device does not say.
    OtherPluggedSize,
    OtherRegion,
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

/// Sends a guest over `stream`.
pub fn send(mut stream: UnixStream, guest: &Guest, trap: Trap) -> Outcome {
    match (Source { stream: &mut stream, guest, trap }).send() {
        Some(()) => Outcome::Ended,
        None => Outcome::Continues,
    }
}

struct Source<'a> {
    stream: &'a mut UnixStream,
    guest: &'a Guest,
    trap: Trap,
}

impl Source<'_> {
    fn send(&mut self) -> Option<()> {
        self.command(Command::Start, &[])?;
        for index in 0..self.guest.mappings.len() {
            self.memory(index)?;
        }
        if self.trap == Trap::FurtherSlot {
            self.memory_fd(1000, &[self.guest.mappings[0].file.as_fd()])?;
        }
        let mut config = self.guest.config();
        match self.trap {
            Trap::BadConfig => drop(config["memory_manager_data"].take()),
            Trap::SlashInZone => {
                config["memory_manager_data"]["guest_ram_mappings"][1]["zone_id"] =
                    "hot/vmem".into();
            }
            Trap::Overlap => {
                config["memory_manager_data"]["guest_ram_mappings"][1]["gpa"] =
                    config["memory_manager_data"]["guest_ram_mappings"][2]["gpa"].clone();
            }
            _ => {}
        }
        self.command(Command::Config, config.to_string().as_bytes())?;
        // The guest still runs: what it writes now counts, and what was read before does not.
        self.guest.write(1, 1, &super::guest::content(77));
        self.guest.write(0, 1, &super::guest::content(78));
        let state = self.state();
        self.command(Command::State, state.to_string().as_bytes())?;
        let complete = if self.guest.paused { Command::CompletePaused } else { Command::Complete };
        self.command(complete, &[])
    }

    fn state(&self) -> Value {
        let mut state = self.guest.state();
        let devices = &mut state["snapshots"]["device-manager"]["snapshots"];
        let node = &mut devices["hot"]["snapshot_data"]["state"];
        let mut device: Value = serde_json::from_str(node.as_str().unwrap()).unwrap();
        match self.trap {
            Trap::OtherPluggedSize => device["config"]["plugged_size"] = 4096.into(),
            Trap::OtherRegion => device["config"]["addr"] = 4096.into(),
            Trap::FewerBlocks => {
                drop(device["blocks_state"]["bitmap"].as_array_mut().unwrap().pop());
            }
            _ => {}
        }
        *node = device.to_string().into();
        match self.trap {
            Trap::NoDevice => drop(devices.as_object_mut().unwrap().remove("hot")),
            Trap::BadState => drop(state["snapshots"].take()),
            _ => {}
        }
        state
    }

    fn memory(&mut self, index: usize) -> Option<()> {
        let mapping = &self.guest.mappings[index];
        let file = mapping.file.as_fd();
        let short = super::guest::memfd(4096);
        let first = index == 0;
        match self.trap {
            Trap::MissingSlot if first => Some(()),
            Trap::NoDescriptor if first => self.memory_fd(mapping.slot, &[]),
            Trap::TwoDescriptors if first => self.memory_fd(mapping.slot, &[file, file]),
            Trap::Short if first => self.memory_fd(mapping.slot, &[short.as_fd()]),
            Trap::Socket if first => {
                let socket = self.stream.try_clone().unwrap();
                self.memory_fd(mapping.slot, &[socket.as_fd()])
            }
            Trap::OneMessage if first => {
                let mut bytes = Request::new(Command::MemoryFd, 4).encode().to_vec();
                bytes.extend_from_slice(&mapping.slot.to_le_bytes());
                with_fds(self.stream, &bytes, &[file]);
                self.answer()
            }
            Trap::Twice(Command::MemoryFd) if first => {
                self.memory_fd(mapping.slot, &[file])?;
                self.memory_fd(mapping.slot, &[file])
            }
            _ => self.memory_fd(mapping.slot, &[file]),
        }
    }

    fn memory_fd(&mut self, slot: u32, fds: &[BorrowedFd<'_>]) -> Option<()> {
        self.before(Command::MemoryFd)?;
        self.write(&Request::new(Command::MemoryFd, 4).encode())?;
        with_fds(self.stream, &slot.to_le_bytes(), fds);
        self.answer()
    }

    fn command(&mut self, command: Command, payload: &[u8]) -> Option<()> {
        self.before(command)?;
        let mut request = Request::new(command, payload.len() as u64).encode();
        if self.trap == Trap::OtherVersion && command == Command::Start {
            request[2] = 1;
        }
        if self.trap == Trap::CutIn(command) {
            self.write(&request[..FRAME_LEN / 2])?;
            return None;
        }
        self.write(&request)?;
        if self.trap == Trap::CutPayload(command) {
            self.write(&payload[..payload.len() / 2])?;
            return None;
        }
        self.write(payload)?;
        self.answer()?;
        if self.trap == Trap::Twice(command) {
            self.write(&request)?;
            self.write(payload)?;
            self.answer()?;
        }
        Some(())
    }

    fn before(&mut self, command: Command) -> Option<()> {
        let mut unknown = [0; FRAME_LEN];
        unknown[0] = 77;
        match self.trap {
            Trap::CloseBefore(at) if at == command => None,
            // It waits for an answer that nothing asked for: until it is told that it keeps the guest.
            Trap::SilentBefore(at) if at == command => self.answer(),
            Trap::UnknownBefore(at) if at == command => {
                self.write(&unknown)?;
                self.answer()
            }
            Trap::AbandonBefore(at) if at == command => {
                self.write(&Request::new(Command::Abandon, 0).encode())?;
                self.answer()?;
                None
            }
            _ => Some(()),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Option<()> {
        self.stream.write_all(bytes).ok()
    }

    fn answer(&mut self) -> Option<()> {
        let mut answer = [0; FRAME_LEN];
        self.stream.read_exact(&mut answer).ok()?;
        (answer[0] == 1).then_some(())
    }
}

/// Sends bytes and descriptors in one message.
pub fn with_fds(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    // A peer that has gone is noticed at the answer.
    let _ = sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
}
