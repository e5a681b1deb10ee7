//! UNPLUG of resident memory against a bare loop of fallocate calls on the same memory.

#[expect(dead_code, reason = "each bench uses its part")]
mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{compare, head};
use ram_discard::memory::RamBlock;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{BlockSpan, Geometry, Request, Response, VirtioMem};

const BLOCK: u64 = 2 << 20;
const ADDR: u64 = 1 << 32;
const NR: u16 = 256;
const SIZE: u64 = BLOCK * NR as u64;

fn memfd() -> File {
    let file = File::from(memfd_create("bench", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(SIZE).unwrap();
    file
}

/// Every page is there beforehand, so that what is measured is giving it back.
fn fill(file: &File) {
    let bytes = vec![0xa5; 1 << 20];
    for at in (0..SIZE).step_by(bytes.len()) {
        file.write_all_at(&bytes, at).unwrap();
    }
}

fn main() {
    let file = memfd();
    let device = VirtioMem::new(Geometry::new(ADDR, SIZE, BLOCK, None).unwrap(), SIZE).unwrap();
    let controller = MemController::new(InitialState::volatile(device));
    let ram = RamBlock::new("bench".to_owned(), ADDR, SIZE, file.try_clone().unwrap(), 0).unwrap();
    controller.set_memory(vec![Arc::new(ram)]).unwrap();
    let bare = memfd();
    head("UNPLUG of 512 MiB of resident memory, 2 MiB blocks", "fallocate");
    for step in [1u16, 64, NR] {
        let execute = |request| {
            assert_eq!(controller.execute(request), Response::Ack);
            controller.answered();
        };
        compare(
            &format!("{step} blocks a request"),
            7,
            || {
                execute(Request::Plug(BlockSpan { addr: ADDR, nb_blocks: NR }));
                fill(&file);
                let start = Instant::now();
                for first in (0..NR).step_by(usize::from(step)) {
                    let addr = ADDR + u64::from(first) * BLOCK;
                    execute(Request::Unplug(BlockSpan { addr, nb_blocks: step }));
                }
                start.elapsed()
            },
            || -> Duration {
                fill(&bare);
                let start = Instant::now();
                for first in (0..NR).step_by(usize::from(step)) {
                    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    let len = u64::from(step) * BLOCK;
                    fallocate(&bare, flags, u64::from(first) * BLOCK, len).unwrap();
                }
                start.elapsed()
            },
        );
    }
}
