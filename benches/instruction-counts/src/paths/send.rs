//! Finding dirty pages and making records of them, up to the system call that sends them.

use std::fs::File;
use std::hint::black_box;
use std::sync::Arc;

use anyhow::{Result, ensure};
use migration::page_bitmap::PageBitmap;
use migration::ram::{BlockOptions, RamSave, ZeroPageDetection};
use migration::stream::TARGET_PAGE_SIZE;
use migration::{BufferSink, Channel, Progress, SaveHandler, Sink};

use super::MIB;
use super::region::{controller, migration_block, source};
use crate::counted::counted;

/// Size of the region that is sent, all of it plugged.
pub const REGION: u64 = 16 * MIB;
/// Its blocks.
pub const BLOCK: u64 = 2 * MIB;

const NR_PAGES: u64 = REGION / TARGET_PAGE_SIZE;

/// What there is to send.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Dirty {
    /// Every page, with its bytes.
    All,
    /// Every other page, with its bytes.
    EveryOther,
    /// Every page, found to be of zeros.
    Zeros,
}

/// A source that has written its list to `sink`, and all there is to send in its bitmap.
pub fn begin(
    dirty: Dirty,
    sink: &mut dyn Sink,
    progress: &Arc<Progress>,
) -> Result<(RamSave, u64)> {
    let controller = controller(REGION, BLOCK, |_| true)?;
    let options = BlockOptions {
        // What a page costs when it is looked at is counted by itself.
        zero_page_detection: match dirty {
            Dirty::All | Dirty::EveryOther => ZeroPageDetection::None,
            Dirty::Zeros => ZeroPageDetection::Legacy,
        },
        ..BlockOptions::migratable()
    };
    let step = if dirty == Dirty::EveryOther { 2 } else { 1 };
    let mut written = PageBitmap::new(NR_PAGES);
    (0..NR_PAGES).step_by(step).for_each(|page| _ = written.set(page));
    let mut source =
        source(migration_block(&controller, options)?, &written, Arc::clone(progress))?;
    source.setup(sink)?;
    source.pending_exact()?;
    ensure!(source.dirty_pages() == written.count(), "what is written is dirty");
    Ok((source, written.count()))
}

/// Sends them all to a channel that takes whatever comes and looks at none of it.
pub fn pages(dirty: Dirty) -> Result<u64> {
    let progress = Arc::new(Progress::new());
    let (mut source, pages) = begin(dirty, &mut BufferSink::default(), &progress)?;
    let null = File::options().write(true).open("/dev/null")?;
    let mut channel = Channel::new(null, Arc::clone(&progress))?;
    counted(|| source.iterate(&mut channel, u64::MAX))?;
    let sent = progress.snapshot();
    let sent = if dirty == Dirty::Zeros { sent.duplicate } else { sent.normal };
    ensure!(sent == pages && source.dirty_pages() == 0, "{sent} of {pages} pages were sent");
    Ok(pages)
}

/// The search alone: runs of one page, one in `stride` pages.
pub fn runs(stride: u64) -> Result<u64> {
    let nr_pages = NR_PAGES * stride;
    let mut dirty = PageBitmap::new(nr_pages);
    (0..nr_pages / stride).for_each(|at| _ = dirty.set(at * stride + 1));
    let runs = counted(|| {
        let runs = dirty.runs(0..nr_pages);
        runs.map(|run| _ = black_box(run)).count() as u64
    });
    ensure!(runs == nr_pages / stride, "every page is a run");
    Ok(runs)
}
