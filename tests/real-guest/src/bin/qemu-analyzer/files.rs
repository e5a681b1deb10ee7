//! What this project writes of a guest with a virtio-mem device.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use migration::dirty::{DirtyTracker, NeverWritten};
use migration::ram::{BlockOptions, ListOptions, MigrationBlock, RamBlocks, RamSave};
use migration::snapshot::{self, FileIo, RunningGuest, StoppedGuest};
use migration::stream::{CAPABILITY_IGNORE_SHARED, Configuration};
use migration::{Channel, DeviceRegistry, Guest, Outgoing, Parameters, Progress};
use ram_discard::memory::RamBlock;
use rustix::fs::MemfdFlags;
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{DeviceState, Geometry, VirtioMem};
use virtio_mem::sections;

const PAGE: u64 = 4096;
const ADDR: u64 = 1 << 32;
const BLOCK: u64 = 512 << 10;
const NR_BLOCKS: u64 = 100;
const BOOT: u64 = 1 << 20;

/// A file, and what QEMU's script must find in it.
pub struct Written {
    pub what: &'static str,
    pub path: PathBuf,
    /// Whether it is in the mapped-ram layout.
    pub mapped_ram: bool,
    /// The guest's memory, by RAM block.
    pub memory: Vec<(String, Vec<u8>)>,
}

/// A guest that does nothing.
struct Idle;

impl Guest for Idle {
    fn stop(&self) -> Result<(), String> {
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        Ok(())
    }
}

/// A guest's memory and its device.
struct Machine {
    blocks: RamBlocks,
    device: Arc<MemController>,
    level: &'static str,
    /// Whether the other side has the file of the boot memory, too.
    shares: bool,
}

impl Machine {
    fn new(level: &'static str, shares: bool) -> Result<Self> {
        let geometry = Geometry::new(ADDR, NR_BLOCKS * BLOCK, BLOCK, Some(1))?;
        let device =
            Arc::new(MemController::new(InitialState::volatile(VirtioMem::new(geometry, 0)?)));
        device.load_state(DeviceState {
            requested_size: 70 * BLOCK,
            usable_region_size: NR_BLOCKS * BLOCK,
            plugged: vec![0x0f0f_0000_ffff_0001, 0x8_0000_0001],
        })?;
        let mut blocks = RamBlocks::new();
        let region = file(NR_BLOCKS * BLOCK)?;
        let boot = file(BOOT)?;
        for (page, byte) in [(0, 1), (1, 2), (100, 3), (64 * 128, 4), (64 * 128 + 127, 5)] {
            region.write_all_at(&[byte; PAGE as usize], page * PAGE)?;
        }
        // Zeros, and what is discarded.
        region.write_all_at(&[0; PAGE as usize], 16 * 128 * PAGE)?;
        region.write_all_at(&[9; PAGE as usize], 4 * 128 * PAGE)?;
        boot.write_all_at(&[6; 3 * PAGE as usize], 7 * PAGE)?;
        for (id, gpa, size, file) in
            [("0000:00:01.0/vmem", ADDR, NR_BLOCKS * BLOCK, region), ("ram", 0, BOOT, boot)]
        {
            let ram = Arc::new(RamBlock::new(id.to_owned(), gpa, size, file, 0)?);
            let shared = shares && gpa == 0;
            let options = BlockOptions { shared, ..BlockOptions::migratable() };
            let block = MigrationBlock::map(ram, options)?;
            if gpa == ADDR {
                block.set_discard_manager(0, Arc::clone(device.manager()) as Arc<_>)?;
            }
            blocks.register(Arc::new(block))?;
        }
        Ok(Self { blocks, device, level, shares })
    }

    fn devices(&self) -> Result<DeviceRegistry> {
        let mut properties = sections::properties();
        properties.apply_level(sections::COMPAT_LEVELS, self.level)?;
        let mut registry = DeviceRegistry::new(properties);
        for (idstr, section) in sections::of("0000:00:01.0", &self.device) {
            registry.register(&idstr, 0, section)?;
        }
        Ok(registry)
    }

    fn configuration(&self) -> Configuration {
        let mut configuration = Configuration::new("test-machine");
        configuration.uuid = Some([0xab; 16]);
        if self.shares {
            configuration.capabilities.push(CAPABILITY_IGNORE_SHARED.to_owned());
        }
        configuration
    }

    /// What a file has of the guest's memory: nothing of what is discarded or shared.
    fn memory(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut memory = Vec::new();
        for block in self.blocks.iter() {
            let mut bytes = vec![0; usize::try_from(block.used_length())?];
            let sent = if block.options().shared { Vec::new() } else { block.populated()? };
            for range in sent {
                let part = range.start() as usize..range.end() as usize;
                block.mapping().read(range.start(), &mut bytes[part]);
            }
            memory.push((block.id().to_owned(), bytes));
        }
        Ok(memory)
    }
}

fn file(size: u64) -> Result<File> {
    let file = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC)?);
    file.set_len(size)?;
    Ok(file)
}

/// Everything that can be written, in files in `folder`.
pub fn write_all(folder: &Path) -> Result<Vec<Written>> {
    type Write = fn(&Machine, &File) -> Result<()>;
    let kinds: [(&str, &str, bool, bool, Write); 7] = [
        ("a saved stream", "8.0", false, false, stream),
        ("a saved stream of level 7.2", "7.2", false, false, stream),
        ("a saved stream without shared memory", "8.0", true, false, stream),
        ("a snapshot", "8.0", false, true, snapshot),
        ("a snapshot of level 7.2", "7.2", false, true, snapshot),
        ("a snapshot without shared memory", "8.0", true, true, snapshot),
        ("a background snapshot", "8.0", false, true, background),
    ];
    let mut written = Vec::new();
    for (index, (what, level, shares, mapped_ram, write)) in kinds.into_iter().enumerate() {
        let machine = Machine::new(level, shares)?;
        let path = folder.join(format!("guest-{index}"));
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).open(&path)?;
        write(&machine, &file).with_context(|| format!("cannot write {what}"))?;
        written.push(Written { what, path, mapped_ram, memory: machine.memory()? });
    }
    Ok(written)
}

fn stream(machine: &Machine, file: &File) -> Result<()> {
    let progress = Arc::new(Progress::new());
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::new(NeverWritten) };
    let options = ListOptions::of(&machine.configuration());
    let ram = RamSave::new(&machine.blocks, options, Arc::clone(&progress), tracker)?;
    let outgoing = Outgoing {
        parameters: Parameters { one_way: true, ..Parameters::new(machine.configuration()) },
        guest: &Idle,
        handlers: vec![Box::new(ram)],
        devices: &mut machine.devices()?,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    Ok(outgoing.run(Channel::new(file.try_clone()?, progress)?)?)
}

fn snapshot(machine: &Machine, file: &File) -> Result<()> {
    let stopped = StoppedGuest {
        configuration: machine.configuration(),
        blocks: &machine.blocks,
        devices: &mut machine.devices()?,
        io: FileIo::default(),
        progress: Arc::new(Progress::new()),
    };
    Ok(snapshot::save(stopped, file)?)
}

fn background(machine: &Machine, file: &File) -> Result<()> {
    let running = RunningGuest {
        configuration: machine.configuration(),
        blocks: &machine.blocks,
        devices: &mut machine.devices()?,
        guest: &Idle,
        progress: Arc::new(Progress::new()),
    };
    Ok(snapshot::save_in_background(running, file)?)
}
