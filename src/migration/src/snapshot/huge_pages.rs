//! Whether the system has the huge pages that a guest in a file needs.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::error::MigrationError;
use crate::inspect::{PageIndex, PageMap, inspect_pages};
use crate::ram::{ListOptions, MigrationBlock, RamBlocks};
use crate::stream::{PageKind, TARGET_PAGE_SIZE};

/// Where the kernel tells of its pools of huge pages.
const POOLS: &str = "/sys/kernel/mm/hugepages";

/// Bytes of memory that are told by one word of a bitmap.
const WORD: u64 = 64 * TARGET_PAGE_SIZE;

/// Fails when blocks of `blocks` need more huge pages for what `file` has of them than are to be had:
/// those that are free, those that the pool may grow by, and those that their files hold, which are discarded
/// first. Nothing is changed.
///
/// What others have set aside looks as what the VMM itself has set aside for these blocks by mapping them
/// without MAP_NORESERVE. So where it is enough with that, it is left to taking them. So is a file that
/// cannot be read here: reading it for good tells what is wrong with it.
pub(super) fn check(
    blocks: &RamBlocks,
    options: ListOptions,
    file: &File,
) -> Result<(), MigrationError> {
    let huge = |block: &Arc<MigrationBlock>| {
        !block.tells_holes() && block.page_size() >= WORD && !options.leaves_out(block)
    };
    let blocks: Vec<_> = blocks.migratable()?.into_iter().filter(huge).collect();
    if blocks.is_empty() {
        return Ok(());
    }
    let (inspection, words) = inspect_pages::<Words>(file);
    let saved: HashMap<_, _> =
        inspection.blocks.iter().map(|block| &*block.id).zip(&words).collect();
    let mut pools: BTreeMap<u64, Need> = BTreeMap::new();
    for block in &blocks {
        let page_size = block.page_size();
        let pages = saved.get(block.id()).map_or(0, |words| words.pages_of(page_size));
        let need = pools.entry(page_size).or_insert_with(|| Need::of(block));
        need.pages += pages;
        let resident = block.ram().backing().resident_size();
        need.resident +=
            resident.map_err(MigrationError::memory(block.id(), "look at its file"))? / page_size;
    }
    pools.into_iter().try_for_each(|(page_size, need)| need.check(page_size))
}

/// What is needed of one size of huge pages.
struct Need<'a> {
    /// The first block of them.
    block: &'a MigrationBlock,
    pages: u64,
    /// Of the files of the blocks, resident already. A file that several share counts for each of them: then it
    /// is left to taking them.
    resident: u64,
}

impl<'a> Need<'a> {
    fn of(block: &'a Arc<MigrationBlock>) -> Self {
        Self { block, pages: 0, resident: 0 }
    }

    fn check(self, page_size: u64) -> Result<(), MigrationError> {
        let Self { block, pages, resident } = self;
        // A system that does not tell is found out when they are taken.
        let Some(free) = free_pages(Path::new(POOLS), page_size) else { return Ok(()) };
        let had = free.saturating_add(resident);
        if pages <= had {
            return Ok(());
        }
        let what = format!(
            "the guest needs {pages} huge pages of {} KiB, of which {had} are to be had: free some, or have more \
             of them (/proc/sys/vm/nr_hugepages)",
            page_size >> 10,
        );
        Err(MigrationError::memory(block.id(), "take huge pages")(io::Error::other(what)))
    }
}

/// Huge pages of a size that are not in use, those set aside among them, and those that the kernel makes on
/// demand; `None` where the system does not tell.
fn free_pages(pools: &Path, page_size: u64) -> Option<u64> {
    let pool = pools.join(format!("hugepages-{}kB", page_size >> 10));
    let read = |name| fs::read_to_string(pool.join(name)).ok()?.trim().parse::<u64>().ok();
    // Neither is there in every pool: pages of 1 GiB may have none of it.
    let may_grow = read("nr_overcommit_hugepages").unwrap_or(0);
    let has_grown = read("surplus_hugepages").unwrap_or(0);
    Some(read("free_hugepages")?.saturating_add(may_grow.saturating_sub(has_grown)))
}

/// Which memory of a block the file has pages for, in words of its bitmap: runs, ascending.
#[derive(Default)]
struct Words {
    runs: Vec<std::ops::Range<u64>>,
    /// Which pages there are is of no interest.
    none: PageMap,
}

impl Words {
    fn note(&mut self, word: u64) {
        match self.runs.last_mut() {
            Some(last) if last.contains(&word) => {}
            Some(last) if last.end == word => last.end += 1,
            _ => self.runs.push(word..word + 1),
        }
    }

    /// Pages of `page_size` bytes that they lie in.
    fn pages_of(&self, page_size: u64) -> u64 {
        let per_page = page_size / WORD;
        let (mut pages, mut from) = (0, 0);
        for run in &self.runs {
            let first = (run.start / per_page).max(from);
            let end = run.end.div_ceil(per_page);
            pages += end.saturating_sub(first);
            from = from.max(end);
        }
        pages
    }
}

impl PageIndex for Words {
    fn map(&self) -> &PageMap {
        &self.none
    }

    fn note(&mut self, page: u64, _kind: PageKind, _at: u64) {
        self.note(page / 64);
    }

    fn note_normal(&mut self, index: u64, normal: u64) {
        if normal != 0 {
            self.note(index);
        }
    }

    fn entries(&self) -> usize {
        self.runs.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_huge_page_with_a_page_in_it_counts_once() {
        let mut words = Words::default();
        // The first and the last word of a huge page of 2 MiB, all of the next two, and one further on.
        for word in [0, 7].into_iter().chain(8..24).chain([40]) {
            words.note_normal(word, 1);
        }
        words.note_normal(100, 0);
        words.note_normal(40, 4);
        assert_eq!(words.runs, [0..1, 7..24, 40..41]);
        assert_eq!(words.pages_of(2 << 20), 4);
        assert_eq!(words.pages_of(1 << 30), 1);
        assert_eq!(words.pages_of(WORD), 1 + 17 + 1);
        assert_eq!(Words::default().pages_of(2 << 20), 0);
    }

    #[test]
    fn what_the_kernel_makes_on_demand_is_to_be_had() {
        let pools = tempfile::tempdir().unwrap();
        let pool = pools.path().join("hugepages-2048kB");
        let has = |name: &str, pages: &str| fs::write(pool.join(name), pages).unwrap();
        let free = || free_pages(pools.path(), 2 << 20);
        assert_eq!(free(), None);
        fs::create_dir(&pool).unwrap();
        has("free_hugepages", "3\n");
        assert_eq!(free(), Some(3));
        has("nr_overcommit_hugepages", "10\n");
        has("surplus_hugepages", "4\n");
        assert_eq!(free(), Some(9));
        // Fewer are allowed now than there were made before.
        has("surplus_hugepages", "11\n");
        assert_eq!(free(), Some(3));
        has("nr_overcommit_hugepages", &u64::MAX.to_string());
        has("surplus_hugepages", "0\n");
        assert_eq!(free(), Some(u64::MAX));
    }
}
