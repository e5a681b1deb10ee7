//! What the host holds for a region, as every GET /v1/device and every scrape asks for it: a region that is a
//! part of a file, against counting its pages.

#[expect(dead_code, reason = "each bench uses its part")]
mod common;

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use ram_discard::FileRange;
use ram_discard::memory::RamBlock;
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{Geometry, VirtioMem};

use common::{compare, head, memfd, time};

const MIB: u64 = 1 << 20;
const ADDR: u64 = 1 << 32;
const REGION: u64 = 1 << 30;
const RESIDENT: u64 = 256 * MIB;
const RUNS: usize = 7;

fn main() {
    let file = memfd(2 * REGION);
    for at in (0..RESIDENT).step_by(MIB as usize) {
        file.write_all_at(&[0xa5; MIB as usize], REGION + at).unwrap();
    }
    let geometry = Geometry::new(ADDR, REGION, 2 * MIB, None).unwrap();
    let controller =
        MemController::new(InitialState::volatile(VirtioMem::new(geometry, 0).unwrap()));
    let ram = Arc::new(RamBlock::new("ram".into(), ADDR, REGION, file, REGION).unwrap());
    controller.set_memory(vec![Arc::clone(&ram)]).unwrap();
    let region = FileRange::new(REGION, REGION).unwrap();
    head("GET /v1/device on a part of a file, 256 MiB resident", "a count");
    compare(
        "resident_size, a thousand times",
        RUNS,
        || time(1000, || assert_eq!(controller.resident_size(), Some(RESIDENT))),
        || time(1, || assert_eq!(ram.backing().resident(region).unwrap(), Some(RESIDENT))),
    );
}
