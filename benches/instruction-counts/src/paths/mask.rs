//! Masking: what is discarded is taken out of the bitmap of dirty pages.

use std::hint::black_box;
use std::sync::Arc;

use anyhow::{Result, ensure};
use migration::page_bitmap::{PageBitmap, pages_touched};
use migration::ram::BlockOptions;
use migration::stream::TARGET_PAGE_SIZE;
use migration::{BufferSink, Progress, SaveHandler};

use super::GIB;
use super::region::{controller, migration_block, source};
use crate::counted::counted;

const REGION: u64 = 16 * GIB;
const NR_PAGES: u64 = REGION / TARGET_PAGE_SIZE;

/// Every other block is discarded and everything dirty: the mask alone.
pub fn clear(block_size: u64) -> Result<u64> {
    let controller = controller(REGION, block_size, |block| block % 2 == 0)?;
    let block = migration_block(&controller, BlockOptions::migratable())?;
    let discarded: Vec<_> = block.discarded()?.into_iter().map(pages_touched).collect();
    let mut dirty = PageBitmap::new(NR_PAGES);
    dirty.set_range(0..NR_PAGES);
    counted(|| {
        for pages in &discarded {
            dirty.clear_range(black_box(pages.clone()));
        }
    });
    ensure!(dirty.count() == NR_PAGES / 2, "half of the pages are left");
    Ok(discarded.len() as u64)
}

/// The same from the beginning of a migration: asking the manager, filling the bitmap, masking.
pub fn setup(block_size: u64) -> Result<u64> {
    let controller = controller(REGION, block_size, |block| block % 2 == 0)?;
    let options = BlockOptions { send_holes: true, ..BlockOptions::migratable() };
    let block = migration_block(&controller, options)?;
    let mut source = source(block, &PageBitmap::new(NR_PAGES), Arc::new(Progress::new()))?;
    let mut sink = BufferSink::default();
    counted(|| source.setup(&mut sink))?;
    ensure!(source.dirty_pages() == NR_PAGES / 2, "half of the pages are dirty");
    Ok(REGION / block_size / 2)
}

/// The mask after a sync that found a page in every eighth populated block.
pub fn again(block_size: u64) -> Result<u64> {
    let controller = controller(REGION, block_size, |block| block % 2 == 0)?;
    let block = migration_block(&controller, BlockOptions::migratable())?;
    let mut written = PageBitmap::new(NR_PAGES);
    let stride = 16 * block_size / TARGET_PAGE_SIZE;
    (0..NR_PAGES / stride).for_each(|at| _ = written.set(at * stride + 5));
    let mut source = source(block, &written, Arc::new(Progress::new()))?;
    source.setup(&mut BufferSink::default())?;
    ensure!(source.dirty_pages() == 0, "the file is empty");
    let pending = counted(|| source.pending_exact())?;
    ensure!(pending == written.count() * TARGET_PAGE_SIZE, "nothing is lost");
    Ok(REGION / block_size / 2)
}
