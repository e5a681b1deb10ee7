//! What a snapshot that is being written adds to a guest's UNPLUG: pages that are outstanding are saved before
//! their memory goes.

#[expect(dead_code, reason = "each bench uses its part")]
mod common;

use std::fs::File;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{head, memfd, report};
use migration::ram::{BlockOptions, MigrationBlock, RamBlocks};
use migration::snapshot::{RunningGuest, save_in_background};
use migration::stream::Configuration;
use migration::{Guest, NoDevices, Progress};
use ram_discard::RamDiscardManager;
use ram_discard::memory::RamBlock;
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{BlockSpan, Geometry, Request, Response, VirtioMem};

const MIB: u64 = 1 << 20;
const ADDR: u64 = 4 << 30;
const SIZE: u64 = 1 << 30;
const BLOCK: u64 = 2 * MIB;
/// Plugged and written.
const PLUGGED: u64 = 256 * MIB;
/// Unplugged at once.
const UNPLUGGED: u64 = 64 * MIB;
const RUNS: usize = 9;

/// A guest of which the first part of the region is plugged and written.
struct Vm {
    controller: MemController,
    block: Arc<MigrationBlock>,
    blocks: RamBlocks,
}

fn span(size: u64) -> BlockSpan {
    BlockSpan { addr: ADDR, nb_blocks: (size / BLOCK) as u16 }
}

impl Vm {
    fn new() -> Self {
        let file: File = memfd(SIZE);
        let geometry = Geometry::new(ADDR, SIZE, BLOCK, None).unwrap();
        let device = VirtioMem::new(geometry, PLUGGED).unwrap();
        let controller = MemController::new(InitialState::volatile(device));
        let ram = Arc::new(RamBlock::new("vmem0".into(), ADDR, SIZE, file, 0).unwrap());
        controller.set_memory(vec![Arc::clone(&ram)]).unwrap();
        let block = Arc::new(MigrationBlock::map(ram, BlockOptions::migratable()).unwrap());
        let manager = Arc::clone(controller.manager()) as Arc<dyn RamDiscardManager>;
        block.set_discard_manager(0, manager).unwrap();
        let mut blocks = RamBlocks::new();
        blocks.register(Arc::clone(&block)).unwrap();
        assert_eq!(controller.execute(Request::Plug(span(PLUGGED))), Response::Ack);
        let bytes = vec![7; MIB as usize];
        (0..PLUGGED).step_by(MIB as usize).for_each(|at| block.mapping().write(at, &bytes));
        Self { controller, block, blocks }
    }

    /// How long an UNPLUG takes.
    fn unplug(&self) -> Duration {
        let start = Instant::now();
        assert_eq!(self.controller.execute(Request::Unplug(span(UNPLUGGED))), Response::Ack);
        start.elapsed()
    }

    /// How long an UNPLUG takes while the image is written: before the background has begun, so that all
    /// of it is outstanding, or after what was unplugged has been saved.
    fn unplug_while_saved(&self, outstanding: bool) -> Duration {
        let file = tempfile::tempfile_in(std::env::temp_dir()).unwrap();
        if !outstanding {
            // It is gone before the image is begun, and comes again: nothing of it is outstanding.
            self.unplug();
        }
        let guest = Unplugs { vm: self, outstanding, took: Mutex::default() };
        let running = RunningGuest {
            configuration: Configuration::new("bench"),
            blocks: &self.blocks,
            devices: &mut NoDevices,
            guest: &guest,
            progress: Arc::new(Progress::new()),
        };
        save_in_background(running, &file).unwrap();
        guest.took.into_inner().unwrap()
    }

    fn fill(&self) {
        let bytes = vec![9; MIB as usize];
        (0..UNPLUGGED).step_by(MIB as usize).for_each(|at| self.block.mapping().write(at, &bytes));
    }
}

struct Unplugs<'a> {
    vm: &'a Vm,
    outstanding: bool,
    took: Mutex<Duration>,
}

impl Guest for Unplugs<'_> {
    fn stop(&self) -> Result<(), String> {
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        if !self.outstanding {
            let request = Request::Plug(span(UNPLUGGED));
            assert_eq!(self.vm.controller.execute(request), Response::Ack);
            self.vm.fill();
        }
        *self.took.lock().unwrap() = self.vm.unplug();
        Ok(())
    }
}

/// What it takes to write as many bytes to a file.
fn bare_write() -> Duration {
    use std::os::unix::fs::FileExt;
    let file = tempfile::tempfile_in(std::env::temp_dir()).unwrap();
    let bytes = vec![7; MIB as usize];
    let start = Instant::now();
    (0..UNPLUGGED).step_by(MIB as usize).for_each(|at| file.write_all_at(&bytes, at).unwrap());
    start.elapsed()
}

fn main() {
    let rounds = |measure: &dyn Fn() -> (Duration, Duration)| {
        (0..=RUNS).map(|_| measure()).skip(1).collect::<Vec<_>>()
    };
    head("UNPLUG of 64 MiB while an image of 256 MiB is written", "no snapshot");
    report(
        "nothing of it is outstanding",
        &rounds(&|| (Vm::new().unplug_while_saved(false), Vm::new().unplug())),
    );
    report(
        "all of it is outstanding",
        &rounds(&|| (Vm::new().unplug_while_saved(true), Vm::new().unplug())),
    );
    head("The same, against what has to be written", "bare write of 64 MiB");
    report(
        "all of it is outstanding",
        &rounds(&|| (Vm::new().unplug_while_saved(true), bare_write())),
    );
    head("The same, against what has to be written and discarded", "both");
    report(
        "all of it is outstanding",
        &rounds(&|| (Vm::new().unplug_while_saved(true), bare_write() + Vm::new().unplug())),
    );
}
