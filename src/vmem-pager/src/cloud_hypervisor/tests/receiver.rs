//! A Cloud Hypervisor that waits for a guest: `receive-migration`, as the stock one does it. It checks nothing of
//! the memory that it gets.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use serde_json::Value;

use super::guest::{BLOCK, PAGE, memfd};
use crate::cloud_hypervisor::channel::{Peer, Wait};
use crate::cloud_hypervisor::protocol::{Command, FRAME_LEN, Request};
use crate::run::Run;

/// What it does otherwise than it should, or than is hoped for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    None,
    ErrorAt(Command),
    CloseAt(Command),
    SilentAt(Command),
    /// An answer that has a payload.
    OddAnswerAt(Command),
    /// It was not started with memory_mode=postcopy.
    NotPostcopy,
    /// The guest discards a page while the sweep lasts, which is asked for again.
    Balloon,
    /// It asks for what is no memory.
    OutsideRequest,
    UnalignedRequest,
    OtherRequest,
    /// The sweep ends before it has begun.
    SweepStops,
    /// The fault connection ends amid a request.
    CutRequest,
}

/// What is left of the guest here.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    Nothing,
    /// The configuration stays.
    Created,
    /// A second copy of the guest stays, which can be resumed.
    PausedCopy,
    /// It was told to drop what it had got.
    Dropped,
    /// A page that the guest or the sweep needs was not had: the VM exits, or cannot be saved any more.
    Broken,
    Has(Guest),
}

/// A guest that was taken.
#[derive(Debug, PartialEq, Eq)]
pub struct Guest {
    pub paused: bool,
    pub config: Vec<u8>,
    pub state: Vec<u8>,
    /// What the guest finds, by address.
    pub memory: Vec<(u64, Vec<u8>)>,
    /// Bytes that the host holds for it.
    pub resident: u64,
}

/// Takes a guest.
pub fn receive(listener: &UnixListener, postcopy: bool, trap: Trap) -> Outcome {
    let (stream, _) = listener.accept().unwrap();
    let peer = Peer::new(stream.into()).unwrap();
    let mut receiver = Receiver {
        listener,
        peer,
        run: Run::new(None),
        postcopy: postcopy && trap != Trap::NotPostcopy,
        trap,
        slots: HashMap::new(),
        config: Vec::new(),
        state: Vec::new(),
        faults: None,
    };
    receiver.receive()
}

struct Receiver<'a> {
    listener: &'a UnixListener,
    peer: Peer,
    run: std::sync::Arc<Run>,
    postcopy: bool,
    trap: Trap,
    slots: HashMap<u32, File>,
    config: Vec<u8>,
    state: Vec<u8>,
    faults: Option<UnixStream>,
}

impl Receiver<'_> {
    fn receive(&mut self) -> Outcome {
        // Named as the requests that may come next.
        let mut stage = Command::Start;
        loop {
            let left = match stage {
                Command::Start | Command::Config => Outcome::Nothing,
                Command::State => Outcome::Created,
                _ => Outcome::PausedCopy,
            };
            let Ok(Ok(Request { command, length })) = self.peer.request(&self.run, forever())
            else {
                return left;
            };
            if command == Command::Abandon {
                self.answer(true);
                return Outcome::Dropped;
            }
            match self.trap {
                Trap::ErrorAt(at) if at == command => {
                    self.answer(false);
                    return Outcome::Dropped;
                }
                Trap::CloseAt(at) if at == command => return left,
                Trap::SilentAt(at) if at == command => {
                    // Until it is told, or the connection ends.
                    let _ = self.peer.payload(length, &self.run, forever());
                    let next = self.peer.request(&self.run, forever());
                    return match next {
                        Ok(Ok(Request { command: Command::Abandon, .. })) => {
                            self.answer(true);
                            Outcome::Dropped
                        }
                        _ => left,
                    };
                }
                Trap::OddAnswerAt(at) if at == command => {
                    let _ = self.peer.payload(length, &self.run, forever());
                    let mut answer = [0; FRAME_LEN];
                    (answer[0], answer[8]) = (1, 4);
                    let _ = self.peer.send_bytes(&answer, &self.run, forever());
                    continue;
                }
                _ => {}
            }
            match (stage, command) {
                (Command::Start, Command::Start) => stage = Command::Config,
                (Command::Config, Command::MemoryFd) => {
                    let (slot, file) = self.peer.slot(&self.run, forever()).unwrap();
                    let Some(file) = file else {
                        self.answer(false);
                        return Outcome::Dropped;
                    };
                    self.slots.insert(slot, file);
                }
                (Command::Config, Command::Config) => {
                    self.config = self.peer.payload(length, &self.run, forever()).unwrap();
                    stage = Command::State;
                }
                (Command::State, Command::State) => {
                    self.state = self.peer.payload(length, &self.run, forever()).unwrap();
                    if !self.take_faults() {
                        self.answer(false);
                        return Outcome::Dropped;
                    }
                    stage = Command::Complete;
                }
                (Command::Complete, Command::Complete | Command::CompletePaused) => {
                    self.answer(true);
                    let paused = command == Command::CompletePaused;
                    return self.have(paused);
                }
                _ => {
                    self.answer(false);
                    return Outcome::Dropped;
                }
            }
            self.answer(true);
        }
    }

    fn answer(&self, ok: bool) {
        let mut answer = [0; FRAME_LEN];
        answer[0] = if ok { 1 } else { 2 };
        let _ = self.peer.send_bytes(&answer, &self.run, forever());
    }

    /// A fault connection has to be there in postcopy, and is used before State is answered; otherwise it is
    /// closed quietly.
    fn take_faults(&mut self) -> bool {
        self.listener.set_nonblocking(true).unwrap();
        let begun = Instant::now();
        let bound = Duration::from_millis(if self.postcopy { 5000 } else { 50 });
        let found = loop {
            match self.listener.accept() {
                Ok((stream, _)) => break Some(stream),
                Err(_) if begun.elapsed() > bound => break None,
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        };
        self.listener.set_nonblocking(false).unwrap();
        let Some(mut stream) = found.filter(|_| self.postcopy) else { return !self.postcopy };
        stream.set_nonblocking(false).unwrap();
        let mut role = [0; 2];
        if stream.read_exact(&mut role).is_err() || role != [2, 0] {
            return false;
        }
        // A device of the guest's reads its memory while State is loaded.
        let (gpa, ..) = self.boot()[0];
        self.faults = Some(stream);
        self.fault(gpa + PAGE)
    }

    fn mappings(&self) -> Vec<Value> {
        let config: Value = serde_json::from_slice(&self.config).unwrap();
        config["memory_manager_data"]["guest_ram_mappings"].as_array().unwrap().clone()
    }

    /// Mappings that are registered for faults: address, size, slot, offset.
    fn boot(&self) -> Vec<(u64, u64, u32, u64)> {
        let number = |value: &Value| value.as_u64().unwrap();
        let mappings = self.mappings().into_iter().filter(|it| it["virtio_mem"] == false);
        let boot = mappings.map(|it| {
            (
                number(&it["gpa"]),
                number(&it["size"]),
                number(&it["slot"]) as u32,
                number(&it["file_offset"]),
            )
        });
        boot.collect()
    }

    /// Asks for a page, and looks whether it is there.
    fn fault(&mut self, gpa: u64) -> bool {
        let found =
            self.boot().into_iter().find(|(base, size, ..)| gpa >= *base && gpa < base + size);
        let stream = self.faults.as_mut().unwrap();
        let mut bytes = Request::new(Command::PageFault, 16).encode().to_vec();
        bytes.extend_from_slice(&gpa.to_le_bytes());
        bytes.extend_from_slice(&PAGE.to_le_bytes());
        let mut answer = [0; FRAME_LEN];
        let answered = stream.write_all(&bytes).is_ok() && stream.read_exact(&mut answer).is_ok();
        if !answered || answer[0] != 1 || answer[8..] != [0; 8] {
            return false;
        }
        let (base, _, slot, offset) = found.expect("only asked for memory");
        let at = offset + gpa - base;
        // UFFDIO_CONTINUE of a hole is EFAULT.
        seek(&self.slots[&slot], SeekFrom::Data(at)).is_ok_and(|data| data == at)
    }

    fn have(&mut self, paused: bool) -> Outcome {
        if self.faults.is_some() && !self.sweep() {
            return Outcome::Broken;
        }
        // The sweep is over, and what is left to do for the other side with it.
        self.faults = None;
        if self.postcopy && paused {
            thread::sleep(Duration::from_millis(300));
        }
        let state: Value = serde_json::from_slice(&self.state).unwrap();
        let devices = &state["snapshots"]["device-manager"]["snapshots"];
        let number = |value: &Value| value.as_u64().unwrap();
        let mut memory = Vec::new();
        let mut resident = 0;
        for mapping in self.mappings() {
            let size = number(&mapping["size"]);
            let fresh = memfd(number(&mapping["file_offset"]) + size);
            // A slot that is missing is silently memory of zeros.
            let file = self.slots.get(&(number(&mapping["slot"]) as u32)).unwrap_or(&fresh);
            let mut bytes = vec![0; size as usize];
            file.read_exact_at(&mut bytes, number(&mapping["file_offset"])).unwrap();
            if mapping["virtio_mem"] == true {
                let node = &devices[mapping["zone_id"].as_str().unwrap()]["snapshot_data"]["state"];
                let device: Value = serde_json::from_str(node.as_str().unwrap()).unwrap();
                for (block, plugged) in
                    device["blocks_state"]["bitmap"].as_array().unwrap().iter().enumerate()
                {
                    if *plugged == false {
                        bytes[block * BLOCK as usize..][..BLOCK as usize].fill(0);
                    }
                }
            }
            resident += std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512;
            memory.push((number(&mapping["gpa"]), bytes));
        }
        memory.sort();
        let (config, state) = (self.config.clone(), self.state.clone());
        Outcome::Has(Guest { paused, config, state, memory, resident })
    }

    /// Asks for every page of every range that the guest has not touched, and once for what is discarded.
    fn sweep(&mut self) -> bool {
        let boot = self.boot();
        if self.trap == Trap::Balloon {
            let (gpa, _, slot, offset) = boot[0];
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            if !self.fault(gpa) {
                return false;
            }
            fallocate(&self.slots[&slot], hole, offset, PAGE).unwrap();
        }
        let odd = match self.trap {
            Trap::OutsideRequest => Some((Command::PageFault, 1 << 40)),
            Trap::UnalignedRequest => Some((Command::PageFault, 1)),
            Trap::OtherRequest => Some((Command::Start, 0)),
            Trap::SweepStops => return false,
            Trap::CutRequest => {
                let stream = self.faults.as_mut().unwrap();
                stream.write_all(&[9, 0, 0]).unwrap();
                return false;
            }
            _ => None,
        };
        if let Some((command, gpa)) = odd {
            let stream = self.faults.as_mut().unwrap();
            let length = if command == Command::PageFault { 16 } else { 0 };
            let mut bytes = Request::new(command, length).encode().to_vec();
            if length != 0 {
                bytes.extend_from_slice(&u64::to_le_bytes(gpa));
                bytes.extend_from_slice(&PAGE.to_le_bytes());
            }
            stream.write_all(&bytes).unwrap();
            let mut answer = [0; FRAME_LEN];
            // Asked for by a guest fault, anything but Ok ends the VM.
            return stream.read_exact(&mut answer).is_ok() && answer[0] == 1;
        }
        for (gpa, size, ..) in boot {
            for page in 0..size / PAGE {
                if !self.fault(gpa + page * PAGE) {
                    return false;
                }
            }
        }
        true
    }
}

fn forever() -> Wait<'static> {
    Wait::for_the_run("the test")
}
