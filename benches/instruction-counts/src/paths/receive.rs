//! Taking apart what arrives and placing it, up to the system calls that read and write.

use std::sync::Arc;

use anyhow::{Result, ensure};
use migration::ram::{BlockOptions, ListOptions, RamLoad};
use migration::stream::{RAM_VERSION, SectionKind};
use migration::test_utils::KeptStream;
use migration::{LoadHandler, Progress, SaveHandler};
use vmstate::wire::WireReader;

use super::region::{controller, migration_block, only};
use super::send::{BLOCK, Dirty, REGION, begin};
use crate::counted::counted;

/// As the destination of a precopy reads ahead.
const READ_AHEAD: usize = 4 << 20;

/// Takes one section with all that `dirty` names, as the source makes it.
pub fn pages(dirty: Dirty) -> Result<u64> {
    let mut stream = KeptStream::new()?;
    let (mut source, pages) = begin(dirty, &mut stream, &Arc::new(Progress::new()))?;
    source.iterate(&mut stream, u64::MAX)?;

    let controller = controller(REGION, BLOCK, |_| true)?;
    let blocks = only(migration_block(&controller, BlockOptions::migratable())?)?;
    let progress = Arc::new(Progress::new());
    let mut load = RamLoad::new(Arc::new(blocks), ListOptions::default(), Arc::clone(&progress));
    let mut reader = WireReader::with_capacity(stream.into_file(), READ_AHEAD);
    load.load_setup()?;
    load.load(SectionKind::Start, RAM_VERSION, &mut reader)?;
    counted(|| load.load(SectionKind::Part, RAM_VERSION, &mut reader))?;
    ensure!(reader.is_at_end()?, "the section was all there is");
    let got = progress.snapshot();
    let got = if dirty == Dirty::Zeros { got.duplicate } else { got.normal };
    ensure!(got == pages, "{got} of {pages} pages came");
    Ok(pages)
}
