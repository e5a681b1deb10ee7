//! Migrates a guest with a virtio-mem region by precopy, from one side of a socket to the other.
//!
//!     cargo run --example migrate

mod vm;

use std::error::Error;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use migration::dirty::WriteProtect;
use migration::ram::{ListOptions, MigrationBlock, RamBlocks, RamLoad, RamSave};
use migration::stream::Configuration;
use migration::{Channel, Guest, Incoming, Outgoing, Parameters, Progress};
use virtio_mem::device::{BlockSpan, Request, Response};

use vm::{ADDR, BLOCK, Vm};

const REGION: u64 = 1 << 30;

type Failure = Box<dyn Error + Send + Sync>;

/// A VMM stops its vCPUs here and lets them run; these two print.
struct Vcpus(&'static str);

impl Guest for Vcpus {
    fn stop(&self) -> Result<(), String> {
        println!("{}: the guest is stopped", self.0);
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        println!("{}: the guest runs", self.0);
        Ok(())
    }
}

fn send(vm: &mut Vm, socket: UnixStream) -> Result<(), Failure> {
    let progress = Arc::new(Progress::new());
    // Writes are tracked by userfaultfd here; a VMM with KVM has its log for that.
    let blocks = vm.blocks.migratable()?;
    let mut trackers = Vec::new();
    for block in &blocks {
        let (mapping, ram) = (Arc::clone(block.mapping()), Arc::clone(block.ram()));
        trackers.push(WriteProtect::new(mapping, Some(ram))?);
    }
    let mut trackers = trackers.into_iter();
    let tracker = |_: &MigrationBlock| Box::new(trackers.next().expect("one a block")) as Box<_>;
    let ram = RamSave::new(&vm.blocks, ListOptions::default(), Arc::clone(&progress), tracker)?;
    let outgoing = Outgoing {
        parameters: Parameters::new(Configuration::new("example")),
        guest: &Vcpus("source"),
        handlers: vec![Box::new(ram)],
        devices: &mut vm.devices,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    // An error tells where the guest is: `OutgoingError::guest`.
    outgoing.run(Channel::new(socket, Arc::clone(&progress))?)?;
    let sent = progress.snapshot();
    println!(
        "{} bytes sent; {} pages sent, {} discarded, {} never touched",
        sent.transferred, sent.normal, sent.discarded, sent.holes
    );
    Ok(())
}

fn receive(mut vm: Vm, socket: UnixStream) -> Result<Vm, Failure> {
    let progress = Arc::new(Progress::new());
    let blocks = Arc::new(vm.blocks);
    let ram = RamLoad::new(blocks, ListOptions::default(), Arc::clone(&progress));
    let incoming = Incoming {
        configuration: Configuration::new("example"),
        guest: &Vcpus("destination"),
        handlers: vec![Box::new(ram)],
        devices: &mut vm.devices,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    incoming.run(Channel::new(socket, progress)?)?;
    Ok(Vm { blocks: RamBlocks::new(), ..vm })
}

fn main() -> Result<(), Failure> {
    let mut from = Vm::new(REGION)?;
    let plug = Request::Plug(BlockSpan { addr: ADDR, nb_blocks: 8 });
    assert_eq!(from.controller.execute(plug), Response::Ack);
    from.file.write_all_at(b"what the guest wrote", 3 * BLOCK)?;

    let (near, far) = UnixStream::pair()?;
    let there = thread::spawn(move || receive(Vm::new(REGION)?, far));
    send(&mut from, near)?;
    let to = there.join().map_err(|_| "the destination panicked")??;

    let mut bytes = [0; 20];
    to.file.read_exact_at(&mut bytes, 3 * BLOCK)?;
    assert_eq!(&bytes, b"what the guest wrote");
    assert_eq!(to.controller.plugged_ranges(), from.controller.plugged_ranges());
    println!("resident at the destination: {:?} bytes", to.controller.resident_size());
    Ok(())
}
