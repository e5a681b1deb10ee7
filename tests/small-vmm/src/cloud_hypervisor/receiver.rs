//! A Cloud Hypervisor that waits for a guest: `receive-migration`. It checks nothing of the memory that it gets.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::faults::{Asking, Faults, Range};
use super::frames::{self, Command, answer};
use super::guest::{BLOCK, memfd};

/// How long a receiver in postcopy waits for the connection that it asks for pages over, and how long another one
/// leaves it open.
const FAULTS_COME: Duration = Duration::from_secs(5);
const FAULTS_GO: Duration = Duration::from_millis(50);
/// For what the other end does after the sweep of a guest that stays paused.
const AFTER_SWEEP: Duration = Duration::from_millis(300);

/// What it does otherwise than it should, or than is hoped for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// Nothing.
    None,
    /// Answers this command so.
    At(Command, Fault),
    /// It was not started with memory_mode=postcopy: the connection for page faults waits to be accepted until all
    /// is over.
    NotPostcopy,
    /// The same, and it is accepted and quietly closed.
    NotPostcopyCloses,
}

/// How a command is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// With Error.
    Error,
    /// The connection ends.
    Close,
    /// Not at all.
    Silent,
    /// With an answer that has a payload.
    Odd,
    /// With a status that there is not.
    Status,
    /// With half of an answer, and the connection ends.
    Cut,
    /// With half of an answer, and no more.
    Half,
    /// With Ok, twice.
    Twice,
}

/// What is left of the guest here.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing.
    Nothing,
    /// The configuration stays.
    Created,
    /// A second copy of the guest stays, which can be resumed.
    PausedCopy,
    /// It was told to drop what it had got, or has said itself that it did.
    Dropped,
    /// A page that the guest or the sweep needs was not had: the VM exits, or cannot be saved any more.
    Broken,
    /// The guest.
    Has(Taken),
}

/// A guest that was taken.
#[derive(Debug, PartialEq, Eq)]
pub struct Taken {
    /// It stays paused.
    pub paused: bool,
    /// Byte for byte.
    pub config: Vec<u8>,
    /// Byte for byte.
    pub state: Vec<u8>,
    /// What the guest finds, by address.
    pub memory: Vec<(u64, Vec<u8>)>,
    /// Bytes that the host holds for it.
    pub resident: u64,
    /// How many pages were asked for.
    pub asked: u64,
    /// How long each page took that the guest touched.
    pub waited: Vec<Duration>,
    /// From waiting for a connection to the first page being there, or to the guest running where none was asked for.
    pub begun_after: Duration,
}

/// How a guest is taken.
#[derive(Clone, Debug)]
pub struct Receive {
    /// Pages are asked for.
    pub postcopy: bool,
    /// What goes otherwise.
    pub trap: Trap,
    /// How pages are asked for.
    pub asking: Asking,
    /// Memory is looked at in the end: [`Taken::memory`].
    pub look: bool,
}

impl Receive {
    /// As it should be.
    pub fn new(postcopy: bool) -> Self {
        Self { postcopy, trap: Trap::None, asking: Asking::default(), look: true }
    }

    /// With a trap.
    pub fn with(self, trap: Trap) -> Self {
        Self { trap, ..self }
    }

    /// With another way of asking for pages.
    pub fn asking(self, asking: Asking) -> Self {
        Self { asking, ..self }
    }

    /// Takes a guest from the first that connects.
    ///
    /// # Panics
    ///
    /// When the socket cannot be used.
    pub fn take(&self, listener: &UnixListener) -> Outcome {
        let begun = Instant::now();
        let (stream, _) = listener.accept().expect("a connection");
        Receiver {
            begun,
            begun_after: None,
            listener,
            stream,
            how: self,
            postcopy: self.postcopy
                && !matches!(self.trap, Trap::NotPostcopy | Trap::NotPostcopyCloses),
            slots: HashMap::new(),
            config: Value::Null,
            texts: (Vec::new(), Vec::new()),
            faults: None,
        }
        .take()
    }
}

struct Receiver<'a> {
    begun: Instant,
    begun_after: Option<Duration>,
    listener: &'a UnixListener,
    stream: UnixStream,
    how: &'a Receive,
    postcopy: bool,
    slots: HashMap<u32, File>,
    config: Value,
    /// Config and State.
    texts: (Vec<u8>, Vec<u8>),
    faults: Option<Faults>,
}

impl Receiver<'_> {
    fn take(&mut self) -> Outcome {
        // Named as the request that may come next.
        let mut stage = Command::Start;
        loop {
            let left = match stage {
                Command::Start | Command::Config => Outcome::Nothing,
                Command::State => Outcome::Created,
                _ => Outcome::PausedCopy,
            };
            let Some((number, length)) = frames::read_request(&mut self.stream) else {
                return left;
            };
            // Closed without any answer.
            let Some(command) = Command::of(number) else { return left };
            if command == Command::Abandon {
                self.answer(true);
                return Outcome::Dropped;
            }
            if let Trap::At(at, fault) = self.how.trap
                && at == command.or_complete()
                && let Some(outcome) = self.misbehave(fault, length, left)
            {
                return outcome;
            }
            match (stage, command) {
                (Command::Start, Command::Start) => stage = Command::Config,
                (Command::Config, Command::MemoryFd) => match frames::read_slot(&self.stream) {
                    Some((slot, Some(file))) => drop(self.slots.insert(slot, file)),
                    _ => return self.refuse(),
                },
                (Command::Config, Command::Config) => {
                    let Some(config) = frames::read_payload(&mut self.stream, length) else {
                        return Outcome::Nothing;
                    };
                    let Ok(parsed) = serde_json::from_slice(&config) else {
                        return self.refuse();
                    };
                    (self.texts.0, self.config) = (config, parsed);
                    if self.postcopy && self.has_prefault() {
                        return self.refuse();
                    }
                    stage = Command::State;
                }
                (Command::State, Command::State) => {
                    let Some(state) = frames::read_payload(&mut self.stream, length) else {
                        return Outcome::Created;
                    };
                    self.texts.1 = state;
                    if !self.take_faults() {
                        return self.refuse();
                    }
                    stage = Command::Complete;
                }
                (Command::Complete, Command::Complete | Command::CompletePaused) => {
                    self.answer(true);
                    return self.have(command == Command::CompletePaused);
                }
                _ => return self.refuse(),
            }
            self.answer(true);
        }
    }

    /// Answers as a trap has it; `None` when all else goes on as ever.
    fn misbehave(&mut self, fault: Fault, length: u64, left: Outcome) -> Option<Outcome> {
        if fault == Fault::Error {
            return Some(self.refuse());
        }
        if fault == Fault::Close {
            return Some(left);
        }
        if fault == Fault::Twice {
            // The second one follows where it should.
            self.answer(true);
            return None;
        }
        // A MemoryFd has its descriptor with the payload.
        let _ = frames::read_payload(&mut self.stream, length);
        let bytes = match fault {
            Fault::Odd => answer(1, 4).to_vec(),
            Fault::Status => answer(7, 0).to_vec(),
            Fault::Cut | Fault::Half => answer(1, 0)[..7].to_vec(),
            _ => Vec::new(),
        };
        let _ = self.stream.write_all(&bytes);
        if fault == Fault::Cut {
            return Some(left);
        }
        // Until it is told, or the connection ends.
        Some(match frames::read_request(&mut self.stream) {
            Some((number, _)) if Command::of(number) == Some(Command::Abandon) => {
                self.answer(true);
                Outcome::Dropped
            }
            _ => left,
        })
    }

    fn answer(&mut self, ok: bool) {
        frames::send_answer(&mut self.stream, ok);
    }

    fn refuse(&mut self) -> Outcome {
        self.answer(false);
        Outcome::Dropped
    }

    fn has_prefault(&self) -> bool {
        let memory = &self.config["vm_config"]["memory"];
        let mut zones = memory["zones"].as_array().into_iter().flatten();
        memory["prefault"] == true || zones.any(|zone| zone["prefault"] == true)
    }

    /// A connection for page faults has to be there in postcopy, and is used before State is answered.
    fn take_faults(&mut self) -> bool {
        if !self.postcopy && self.how.trap != Trap::NotPostcopyCloses {
            return true;
        }
        self.listener.set_nonblocking(true).expect("a socket");
        let begun = Instant::now();
        let bound = if self.postcopy { FAULTS_COME } else { FAULTS_GO };
        let found = loop {
            match self.listener.accept() {
                Ok((stream, _)) => break Some(stream),
                Err(_) if begun.elapsed() > bound => break None,
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        };
        self.listener.set_nonblocking(false).expect("a socket");
        let Some(stream) = found.filter(|_| self.postcopy) else { return !self.postcopy };
        stream.set_nonblocking(false).expect("a socket");
        let faults = Faults::new(stream, self.boot(), self.how.asking.clone());
        let Some(mut faults) = faults else { return false };
        let had = faults.begin();
        self.begun_after = Some(self.begun.elapsed());
        self.faults = Some(faults);
        had
    }

    fn mappings(&self) -> Vec<Value> {
        let mappings = &self.config["memory_manager_data"]["guest_ram_mappings"];
        mappings.as_array().cloned().unwrap_or_default()
    }

    /// Mappings that are registered for faults: regions of virtio-mem are not.
    fn boot(&self) -> Vec<Range> {
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        let zones = self.config["vm_config"]["memory"]["zones"].as_array().cloned();
        let zones = zones.unwrap_or_default();
        let mappings = self.mappings().into_iter().filter(|it| it["virtio_mem"] == false);
        let ranges = mappings.map(|it| {
            let zone = zones.iter().find(|zone| zone["id"] == it["zone_id"]);
            let huge_page = zone.and_then(|zone| zone["hugepage_size"].as_u64());
            let slot = number(&it["slot"]) as u32;
            let offset = number(&it["file_offset"]);
            Range {
                gpa: number(&it["gpa"]),
                size: number(&it["size"]),
                page: huge_page.unwrap_or(super::guest::PAGE),
                offset,
                // A slot that is missing is silently memory of zeros.
                file: self.file(slot, offset + number(&it["size"])),
            }
        });
        ranges.collect()
    }

    fn file(&self, slot: u32, len: u64) -> File {
        let found = self.slots.get(&slot).map(|file| file.try_clone().expect("a descriptor"));
        found.unwrap_or_else(|| memfd(len, None))
    }

    fn have(&mut self, paused: bool) -> Outcome {
        let mut asked = (0, Vec::new());
        let begun_after = self.begun_after.unwrap_or_else(|| self.begun.elapsed());
        if let Some(mut faults) = self.faults.take() {
            if !faults.sweep() {
                return Outcome::Broken;
            }
            asked = faults.end();
            if paused {
                thread::sleep(AFTER_SWEEP);
            }
        }
        let (config, state) = self.texts.clone();
        let mut taken = Taken {
            paused,
            config,
            state,
            memory: Vec::new(),
            resident: 0,
            asked: asked.0,
            waited: asked.1,
            begun_after,
        };
        if self.how.look {
            self.look(&mut taken);
        }
        Outcome::Has(taken)
    }

    fn look(&self, taken: &mut Taken) {
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        let state: Value = serde_json::from_slice(&taken.state).expect("State is JSON");
        let devices = &state["snapshots"]["device-manager"]["snapshots"];
        for mapping in self.mappings() {
            let (size, offset) = (number(&mapping["size"]), number(&mapping["file_offset"]));
            let file = self.file(number(&mapping["slot"]) as u32, offset + size);
            let mut bytes = vec![0; size as usize];
            file.read_exact_at(&mut bytes, offset).expect("memory");
            if mapping["virtio_mem"] == true {
                let zone = mapping["zone_id"].as_str().unwrap_or_default();
                let device = devices[zone]["snapshot_data"]["state"].as_str().unwrap_or("{}");
                let device: Value = serde_json::from_str(device).expect("State is JSON");
                let blocks = device["blocks_state"]["bitmap"].as_array().into_iter().flatten();
                for (block, _) in blocks.enumerate().filter(|(_, plugged)| **plugged == false) {
                    bytes[block * BLOCK as usize..][..BLOCK as usize].fill(0);
                }
            }
            taken.resident += file.metadata().expect("a file").blocks() * 512;
            taken.memory.push((number(&mapping["gpa"]), bytes));
        }
        taken.memory.sort();
    }
}

impl Command {
    /// Both ways of completing are one here.
    fn or_complete(self) -> Self {
        match self {
            Self::CompletePaused => Self::Complete,
            other => other,
        }
    }
}
