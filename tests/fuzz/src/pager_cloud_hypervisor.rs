//! What a Cloud Hypervisor that sends its guest may send to the pager: any requests, payloads and descriptors, in
//! any order, and Configs and States with edits.
//!
//! What is promised: no panic, no hang; a guest is taken only after all of it, and then each mapping has a file
//! of its size, the mappings do not overlap, and what is plugged is what the State says; a sender whose guest
//! was not taken is told so.

use std::fs::File;
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::IoSlice;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::json;
use vmem_pager::cloud_hypervisor::channel::Peer;
use vmem_pager::cloud_hypervisor::protocol::{Command, Request};
use vmem_pager::cloud_hypervisor::taking::{Nothing, Taken, take};
use vmem_pager::run::Run;

use crate::input::Input;

/// Bounds the time of one input.
const STEPS: usize = 64;
const BLOCK: u64 = 2 << 20;
const REGION: u64 = 4 << 30;
const BLOCKS: u64 = 8;

/// Runs the target.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (near, far) = UnixStream::pair().unwrap();
    let peer = Peer::new(near.into()).unwrap();
    let run = Run::with_silence(None, Duration::from_millis(20));
    thread::scope(|scope| {
        let taking = scope.spawn(|| {
            let taken = take(&peer, &run, &mut Nothing);
            drop(peer);
            taken
        });
        let mut sender = Sender { stream: &far, ended: false };
        for _ in 0..STEPS {
            if input.is_empty() || sender.ended {
                break;
            }
            sender.step(&mut input);
        }
        far.shutdown(std::net::Shutdown::Write).unwrap();
        if let Ok(taken) = taking.join().expect("no bytes make it panic") {
            assert_sound(&taken);
        }
    });
}

fn assert_sound(taken: &Taken) {
    let mappings = &taken.layout.mappings;
    assert_eq!(mappings.len(), taken.files.len());
    assert_eq!(mappings.len(), taken.devices.len());
    for pair in mappings.windows(2) {
        assert!(pair[0].range.end() <= pair[1].range.start());
    }
    for ((mapping, file), device) in mappings.iter().zip(&taken.files).zip(&taken.devices) {
        assert!(file.metadata().unwrap().len() >= mapping.file_range().end());
        assert_eq!(mapping.virtio_mem, device.is_some());
        if let Some(device) = device {
            let plugged: u64 = device.state.plugged().map(|range| range.len()).sum();
            assert_eq!(plugged, device.state.plugged_size);
            assert!(device.state.plugged().all(|range| range.end() <= mapping.range.len()));
        }
    }
}

struct Sender<'a> {
    stream: &'a UnixStream,
    /// The other end has refused or closed.
    ended: bool,
}

impl Sender<'_> {
    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 10 {
            0 => {
                let len = usize::from(input.u8());
                let bytes = input.bytes(len);
                self.write(bytes);
            }
            1 => {
                let command = Command::ALL[usize::from(input.u8()) % Command::ALL.len()];
                let length = if input.u8() % 4 == 0 { input.u64() } else { 0 };
                self.write(&Request::new(command, length).encode());
                if length == 0 {
                    self.read_answer();
                }
            }
            2 => self.command(Command::Start, b""),
            3 | 4 => {
                let (slot, size, how) = (u32::from(input.u8() % 4), input.u8(), input.u8() % 8);
                self.memory(slot, size, how);
            }
            5 | 6 => {
                let config = edited(&config(), input);
                self.command(Command::Config, &config);
            }
            7 | 8 => {
                let state = edited(&state(input), input);
                self.command(Command::State, &state);
            }
            _ => {
                let paused = input.u8() & 1 == 1;
                let command = if paused { Command::CompletePaused } else { Command::Complete };
                self.write(&Request::new(command, 0).encode());
                // The answer is for the caller of `take` to give.
                self.ended = true;
            }
        }
    }

    fn command(&mut self, command: Command, payload: &[u8]) {
        self.write(&Request::new(command, payload.len() as u64).encode());
        self.write(payload);
        self.read_answer();
    }

    fn memory(&mut self, slot: u32, size: u8, how: u8) {
        self.write(&Request::new(Command::MemoryFd, 4).encode());
        let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(if size == 0 { 4096 } else { BLOCKS * BLOCK }).unwrap();
        let fds: &[BorrowedFd<'_>] = match how {
            0 => &[],
            1 => &[file.as_fd(), file.as_fd()],
            2 => &[self.stream.as_fd()],
            _ => &[file.as_fd()],
        };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let bytes = slot.to_le_bytes();
        let _ = sendmsg(self.stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL);
        self.read_answer();
    }

    fn write(&mut self, bytes: &[u8]) {
        self.ended |= self.stream.write_all(bytes).is_err();
    }

    fn read_answer(&mut self) {
        let mut answer = [0; 16];
        self.ended |= self.stream.read_exact(&mut answer).is_err();
        self.ended |= answer[0] != 1;
    }
}

/// A Config of boot memory in slot 0 and a virtio-mem region in slot 1.
fn config() -> Vec<u8> {
    let zone = json!({ "id": "z", "size": BLOCKS * BLOCK, "hugepages": false, "prefault": false });
    let mapping = |slot: u32, gpa: u64, virtio_mem: bool| {
        json!({
            "slot": slot, "gpa": gpa, "size": BLOCKS * BLOCK, "zone_id": "z", "virtio_mem": virtio_mem,
            "file_offset": 0,
        })
    };
    let mappings = [mapping(1, REGION, true), mapping(0, 0, false)];
    json!({
        "vm_config": { "memory": { "size": 0, "zones": [zone] } },
        "memory_manager_data": { "guest_ram_mappings": mappings },
    })
    .to_string()
    .into_bytes()
}

fn state(input: &mut Input<'_>) -> Vec<u8> {
    let bits = input.u8();
    let bitmap: Vec<bool> = (0..BLOCKS).map(|bit| bits >> bit & 1 == 1).collect();
    let device = json!({
        "config": {
            "block_size": BLOCK, "node_id": 0, "addr": REGION, "region_size": BLOCKS * BLOCK,
            "usable_region_size": BLOCKS * BLOCK, "plugged_size": u64::from(bits.count_ones()) * BLOCK,
            "requested_size": BLOCK,
        },
        "blocks_state": { "bitmap": bitmap },
    });
    let node = json!({ "snapshots": {}, "snapshot_data": { "state": device.to_string() } });
    json!({
        "snapshots": {
            "cpu-manager": {}, "memory-manager": {}, "device-manager": { "snapshots": { "z": node } },
        },
    })
    .to_string()
    .into_bytes()
}

/// Text with a digit or a byte changed here and there.
fn edited(text: &[u8], input: &mut Input<'_>) -> Vec<u8> {
    let mut text = text.to_vec();
    for _ in 0..input.u8() % 4 {
        let (at, byte) = (usize::from(input.u16()) % text.len(), input.u8());
        match byte {
            128.. => text[at] = byte & 0x7f,
            _ => text[at] = b'0' + byte % 10,
        }
    }
    text
}

/// A whole guest, one that is edited, and one that comes in the wrong order.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let memory = |slot: u8| [3, slot, 1, 7];
    let whole = [&[2][..], &memory(0), &memory(1), &[5, 0], &[7, 0b101, 0], &[9, 0]].concat();
    vec![
        whole,
        [&[2][..], &memory(0), &memory(1), &[5, 0], &[7, 0xff, 1, 200, 0, 9], &[9, 1]].concat(),
        [&[2][..], &memory(0), &[5, 1, 60, 0, 3], &[9, 1]].concat(),
        [&[2][..], &memory(0), &memory(0), &[3, 1, 0, 0], &[1, 4, 1]].concat(),
    ]
}
