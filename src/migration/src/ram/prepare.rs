//! Memory that is to be loaded into: zeros everywhere, before anything comes.

use super::{ListOptions, MigrationBlock, RamBlocks};
use crate::error::MigrationError;
use crate::stream::TARGET_PAGE_SIZE;
use ram_discard::ByteRange;

/// What resident memory is compared with zeros by, bytes.
const PIECE: u64 = 64 << 10;

/// Makes zeros of the memory of all blocks that pages come for. Called before the first section: the
/// devices that load theirs may have listeners map the memory and pin it, and may take huge pages.
///
/// # Errors
///
/// When memory cannot be discarded, or not be had for a block that keeps what is resident; with postcopy
/// such a block is refused.
pub(crate) fn prepare(blocks: &RamBlocks, options: ListOptions) -> Result<(), MigrationError> {
    let blocks = blocks.migratable()?;
    if let Some(block) =
        blocks.iter().find(|block| options.postcopy && block.options().keep_resident)
    {
        // Else it would be found out with the guest stopped.
        let what = "be the destination of postcopy";
        return Err(MigrationError::memory(block.id(), what)(MigrationBlock::refusal_to_discard()));
    }
    for block in blocks {
        if options.leaves_out(&block) {
            continue;
        }
        if block.options().keep_resident {
            zero_resident(&block)?;
        } else {
            let swept = block.sweep_all();
            swept.map_err(MigrationError::memory(block.id(), "discard what it held before"))?;
        }
    }
    Ok(())
}

/// Writes zeros over what is resident and not zero, page by page, so that all who have mapped or pinned it
/// go on to see the same memory. Discarded ranges, which nothing may pin, are discarded.
fn zero_resident(block: &MigrationBlock) -> Result<(), MigrationError> {
    let failed = |what| MigrationError::memory(block.id(), what);
    let discarded = block.discarded()?;
    for &range in &discarded {
        block.sweep(range).map_err(failed("discard what it held before"))?;
    }
    // The source may have more in use.
    let past_end = ByteRange::from_bounds(block.used_length(), block.ram().range().len());
    for range in block.all_but(&discarded).into_iter().chain(past_end) {
        if !block.tells_holes() {
            // A hole would be filled by being looked at, and the pool may have no page for it.
            block.reserve(range).map_err(failed("take huge pages"))?;
        }
        let mut resident = Vec::new();
        block.for_each_data(range, |data| resident.push(data)).map_err(failed("look for holes"))?;
        for piece in resident.into_iter().flat_map(|data| data.chunks(PIECE)) {
            let whole = piece.start().is_multiple_of(TARGET_PAGE_SIZE)
                && piece.len().is_multiple_of(TARGET_PAGE_SIZE);
            if !whole || !block.mapping().page_is_zero(piece.start(), piece.len()) {
                block.write_zeros(piece).map_err(failed("write zeros"))?;
            }
        }
    }
    Ok(())
}
