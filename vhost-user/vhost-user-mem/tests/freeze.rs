//! A daemon that is killed and started again in the middle of a migration: the freeze has ended with it,
//! and what the guest plugs and writes then must not be lost. And what a guest may do while it is saved.

mod common;

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;

use migration::dirty::{DirtyTracker, NeverWritten};
use migration::ram::{BlockOptions, ListOptions, MigrationBlock, RamBlocks, RamLoad, RamSave};
use migration::snapshot::{FileIo, Restore, RunningGuest, restore, save_in_background};
use migration::stream::Configuration;
use migration::{
    Channel, Guest, GuestAfter, Incoming, MigrationError, MigrationInfo, NoDevices, Outgoing,
    Parameters, Progress,
};
use ram_discard::memory::RamBlock;
use small_vmm::driver::ResponseType;
use virtio_mem::discard_channel::RemoteRamDiscardManager;

use common::{ADDR, PATIENCE, REGION, Rig, gpa, options, ram, rig_with};

/// A guest of a rig, to which something happens when it is stopped, or runs again.
struct Vm {
    rig: Mutex<Rig>,
    log: Mutex<Vec<&'static str>>,
    at: &'static str,
    happens: Mutex<Option<fn(&mut Rig)>>,
}

impl Vm {
    fn new(at: &'static str, happens: fn(&mut Rig)) -> Self {
        let mut rig = rig_with(options().discard_socket().state_file(), ram());
        assert_eq!(rig.plug(0, 4), ResponseType::Ack);
        rig.stamp(0, 4);
        let happens = Mutex::new(Some(happens));
        Self { rig: Mutex::new(rig), log: Mutex::default(), at, happens }
    }

    fn note(&self, call: &'static str) {
        self.log.lock().unwrap().push(call);
        if call == self.at
            && let Some(happens) = self.happens.lock().unwrap().take()
        {
            happens(&mut self.rig.lock().unwrap());
        }
    }

    /// The device's region, and a client of the daemon that there is now.
    fn blocks(&self) -> RamBlocks {
        let rig = self.rig.lock().unwrap();
        let stream = UnixStream::connect(rig.daemon.discard_socket()).unwrap();
        let manager = RemoteRamDiscardManager::attach(stream, PATIENCE).unwrap();
        let region = rig.ram.region(ADDR).unwrap();
        let file = region.file.try_clone().unwrap();
        let ram = RamBlock::new("vmem0".to_owned(), ADDR, REGION, file, region.offset).unwrap();
        let mapping = rig.ram.mapping(ADDR).unwrap();
        let block =
            MigrationBlock::new(Arc::new(ram), mapping, BlockOptions::migratable()).unwrap();
        block.set_discard_manager(0, Arc::new(manager)).unwrap();
        let mut blocks = RamBlocks::new();
        blocks.register(Arc::new(block)).unwrap();
        blocks
    }

    fn log(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }
}

impl Guest for Vm {
    fn stop(&self) -> Result<(), String> {
        self.note("stop");
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        self.note("run");
        Ok(())
    }
}

/// Takes whatever comes.
struct Taken;

impl Guest for Taken {
    fn stop(&self) -> Result<(), String> {
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        Ok(())
    }
}

fn restart_and_plug(rig: &mut Rig) {
    rig.daemon.restart().unwrap();
    rig.reconnect();
    assert_eq!(rig.plug(7, 1), ResponseType::Ack, "nothing is frozen any more");
    rig.stamp(7, 8);
}

fn restart_and_unplug(rig: &mut Rig) {
    rig.daemon.restart().unwrap();
    rig.reconnect();
    assert_eq!(rig.unplug(0, 4), ResponseType::Ack, "nothing is frozen any more");
}

/// Migrates, and says where the guest's block 7 is as it was written.
fn migrate(vm: &Vm) -> (Result<(), (MigrationError, GuestAfter)>, bool) {
    let (near, far) = UnixStream::pair().unwrap();
    let there = ram();
    let region = there.region(ADDR).unwrap();
    let file = region.file.try_clone().unwrap();
    let block = RamBlock::new("vmem0".to_owned(), ADDR, REGION, file, region.offset).unwrap();
    let mapping = there.mapping(ADDR).unwrap();
    let block = MigrationBlock::new(Arc::new(block), mapping, BlockOptions::migratable()).unwrap();
    let mut blocks = RamBlocks::new();
    blocks.register(Arc::new(block)).unwrap();
    let receiving = thread::spawn(move || {
        let progress = Arc::new(Progress::new());
        let ram = RamLoad::new(Arc::new(blocks), ListOptions::default(), Arc::clone(&progress));
        let incoming = Incoming {
            configuration: Configuration::new("test"),
            guest: &Taken,
            handlers: vec![Box::new(ram)],
            devices: &mut NoDevices,
            postcopy: None,
            progress: Arc::clone(&progress),
        };
        incoming.run(Channel::new(far, progress).unwrap())
    });
    let progress = Arc::new(Progress::new());
    let blocks = vm.blocks();
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::new(NeverWritten) };
    let ram =
        RamSave::new(&blocks, ListOptions::default(), Arc::clone(&progress), tracker).unwrap();
    let outgoing = Outgoing {
        parameters: Parameters::new(Configuration::new("test")),
        guest: vm,
        handlers: vec![Box::new(ram)],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    let sent = outgoing.run(Channel::new(near, progress).unwrap());
    let received = receiving.join().unwrap();
    assert_eq!(sent.is_ok(), received.is_ok());
    let whole = there.find_wrong_stamp(gpa(7)..gpa(8), 1).unwrap().is_none();
    (sent.map_err(|failed| (failed.error, failed.guest)), whole)
}

#[test]
fn a_daemon_that_is_killed_and_back_before_the_guest_is_stopped_keeps_the_guest_here() {
    let vm = Vm::new("stop", restart_and_plug);
    let (error, guest) = migrate(&vm).0.unwrap_err();
    assert!(matches!(error, MigrationError::FreezeLost(_)), "{error}");
    assert_eq!(guest, GuestAfter::RunsHere);
    assert_eq!(vm.log(), ["stop", "run"]);
    vm.rig.lock().unwrap().assert_stamped(7, 8);
    // The next attempt takes it along, with what was plugged.
    let (sent, whole) = migrate(&vm);
    sent.unwrap();
    assert!(whole);
    assert_eq!(vm.log(), ["stop"]);
}

/// Saves a guest while it runs, as a client of its daemon.
fn save(vm: &Vm, file: &File) -> (Result<(), MigrationError>, MigrationInfo) {
    let blocks = vm.blocks();
    let progress = Arc::new(Progress::new());
    let running = RunningGuest {
        configuration: Configuration::new("test"),
        blocks: &blocks,
        devices: &mut NoDevices,
        guest: vm,
        progress: Arc::clone(&progress),
    };
    (save_in_background(running, file), progress.snapshot())
}

fn resize(rig: &mut Rig) {
    assert_eq!(rig.unplug(0, 2), ResponseType::Ack, "block state is not frozen");
    assert_eq!(rig.resident(0, 2), 0, "its memory goes before the guest is answered");
    // Comes again as zeros, and another one, and both are written.
    assert_eq!(rig.plug(0, 1), ResponseType::Ack);
    assert_eq!(rig.plug(7, 1), ResponseType::Ack);
    rig.ram.write(gpa(0), &[0xbb; 4096]).unwrap();
    rig.stamp(7, 8);
    rig.ram.write(gpa(2), &[0xbb; 4096]).unwrap();
}

#[test]
fn a_guest_that_is_saved_while_it_plugs_and_unplugs_is_in_the_image_as_it_was_at_the_instant() {
    let vm = Vm::new("run", resize);
    let file = tempfile::tempfile().unwrap();
    let (saved, seen) = save(&vm, &file);
    saved.unwrap();
    let pages = 2 * (gpa(1) - gpa(0)) / 4096;
    assert_eq!((seen.saved_before_discard, seen.normal), (pages, 2 * pages));
    assert!(seen.busy_time.is_some());
    let there = ram();
    let region = there.region(ADDR).unwrap();
    let (file_there, offset) = (region.file.try_clone().unwrap(), region.offset);
    let block = RamBlock::new("vmem0".to_owned(), ADDR, REGION, file_there, offset).unwrap();
    let block = MigrationBlock::map(Arc::new(block), BlockOptions::migratable()).unwrap();
    let mut blocks = RamBlocks::new();
    blocks.register(Arc::new(block)).unwrap();
    let image = Restore {
        configuration: Configuration::new("test"),
        blocks: Arc::new(blocks),
        devices: &mut NoDevices,
        io: FileIo { threads: 2, direct: false },
        progress: Arc::new(Progress::new()),
    };
    restore(image, &file).unwrap();
    assert_eq!(there.find_wrong_stamp(gpa(0)..gpa(4), 1).unwrap(), None);
    assert_eq!(there.allocated_bytes(gpa(0)..gpa(8)).unwrap(), gpa(4) - gpa(0));
    // Nothing is left of it at the device.
    assert_eq!(vm.rig.lock().unwrap().unplug(3, 1), ResponseType::Ack);
}

#[test]
fn a_daemon_that_is_killed_and_back_while_a_guest_is_saved_leaves_no_snapshot() {
    let vm = Vm::new("run", restart_and_unplug);
    let error = save(&vm, &tempfile::tempfile().unwrap()).0.unwrap_err();
    assert!(matches!(error, MigrationError::FreezeLost(_)), "{error}");
    assert_eq!(vm.log(), ["stop", "run"]);
}
