//! One side's memory: fresh, sparse, partly plugged, and partly filled.

use std::fs::File;
use std::io;
use std::sync::Arc;

use migration::ram::{BlockOptions, MigrationBlock, RamBlocks, ZeroPageDetection};
use ram_discard::memory::RamBlock;
use ram_discard::{
    LocalRamDiscardManager, MemoryState, RamDiscardManager, RamDiscardSource, Section,
};

use crate::case::{Case, Mode};
use crate::content::Generator;
use crate::host;

/// Where the region would be for a guest.
const ADDR: u64 = 1 << 40;

/// Block state as Linux makes it: plugged from the start of the region on. It never changes, as
/// while migration runs.
struct Plugged {
    region: u64,
    plugged: u64,
}

impl RamDiscardSource for Plugged {
    fn region_size(&self) -> u64 {
        self.region
    }

    fn granularity(&self) -> u64 {
        Case::BLOCK
    }

    fn next_range(&self, section: Section, state: MemoryState) -> Option<Section> {
        let (start, end) = match state {
            MemoryState::Populated => (0, self.plugged),
            MemoryState::Discarded => (self.plugged, self.region),
        };
        Section::from_bounds(start, end)?.intersection(section)
    }
}

/// The manager of a region whose first `plugged` bytes are plugged.
pub fn manager(region: u64, plugged: u64) -> anyhow::Result<Arc<dyn RamDiscardManager>> {
    let manager = LocalRamDiscardManager::new(region);
    manager.add_source(Arc::new(Plugged { region, plugged })).map_err(io::Error::other)?;
    Ok(Arc::new(manager))
}

/// A block of a side, and the file behind it.
pub struct Side {
    file: File,
    /// What is migrated.
    pub block: Arc<MigrationBlock>,
    /// The same, in a list of its own.
    pub blocks: Arc<RamBlocks>,
}

impl Side {
    /// The options of a VMM that knows as much as `mode` says.
    pub fn options(mode: Mode) -> BlockOptions {
        let zero_page_detection = match mode {
            Mode::DiscardBlind => ZeroPageDetection::None,
            _ => ZeroPageDetection::Legacy,
        };
        let send_holes = mode != Mode::HoleAware;
        BlockOptions { send_holes, zero_page_detection, ..BlockOptions::migratable() }
    }

    /// An empty region.
    pub fn new(case: &Case) -> anyhow::Result<Self> {
        let file = host::memfd(case.region)?;
        let ram = RamBlock::new("vmem0".into(), ADDR, case.region, file.try_clone()?, 0)?;
        let block = MigrationBlock::map(Arc::new(ram), Self::options(case.mode))?;
        if case.mode.knows_blocks() {
            block.set_discard_manager(0, manager(case.region, case.plugged)?)?;
        }
        let block = Arc::new(block);
        let mut blocks = RamBlocks::new();
        blocks.register(Arc::clone(&block))?;
        Ok(Self { file, block, blocks: Arc::new(blocks) })
    }

    /// Fills what the guest has touched, as a guest does: through the mapping.
    pub fn fill(&self, case: &Case) {
        let mut bytes = vec![0; case.touched_in_block() as usize];
        let mut content = Generator::new(case.content);
        if !bytes.is_empty() {
            for at in (0..case.plugged).step_by(Case::BLOCK as usize) {
                content.fill(&mut bytes);
                self.block.mapping().write(at, &bytes);
            }
        }
    }

    /// Bytes that the host holds for it.
    pub fn resident(&self) -> io::Result<u64> {
        host::resident(&self.file)
    }
}
