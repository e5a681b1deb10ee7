//! No write is lost: writers against a copy that is kept equal, on each kind of memory.

use super::*;
use std::sync::atomic::{AtomicBool, Ordering};

/// Ends the writers when it is dropped, also by an assertion that fails.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Threads write while another copies what is reported. When they stop, one more round must make
/// the copy equal: had a write been missed, its page would differ.
fn never_loses_a_write(block: &Block, known_file: bool) {
    let len = block.mapping.len();
    let quarter = len / 4;
    let populated = [range(0, quarter), range(2 * quarter, len)];
    block.mapping.write(0, &vec![0xaa; quarter as usize / 2]);
    let copy_file = memfd(MemfdFlags::empty()).unwrap();
    copy_file.set_len(len).unwrap();
    let copy = HostMapping::map(&copy_file, 0, len).unwrap();
    let file = known_file.then(|| Arc::clone(&block.block));
    let mut tracker = WriteProtect::new(Arc::clone(&block.mapping), file).unwrap();
    tracker.start(&populated).unwrap();

    let mut page = vec![0; PAGE as usize];
    let mut copy_pages = |dirty: &PageBitmap| {
        for at in dirty.runs(0..dirty.nr_pages()).flatten() {
            block.mapping.read(at * PAGE, &mut page);
            copy.write(at * PAGE, &page);
        }
    };
    let mut all = PageBitmap::new(len / PAGE);
    all.set_range(0..quarter / PAGE / 2);
    copy_pages(&all);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for writer in 0..2u64 {
            let (done, populated) = (&done, &populated);
            scope.spawn(move || {
                let mut seed = 0x9e37_79b9_7f4a_7c15 ^ (writer << 32);
                while !done.load(Ordering::Relaxed) {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    let part = populated[(seed & 1) as usize];
                    // Half of the writes stay within a few pages, so that the same page is
                    // written before, during and after a sync.
                    let span = if seed & 2 == 0 { 16 * PAGE } else { part.len() };
                    let at = part.start() + (seed >> 8) % (span / 8) * 8;
                    block.mapping.write(at, &seed.to_le_bytes());
                }
            });
        }
        let _done = Done(&done);
        for _ in 0..30 {
            let dirty = synced(&mut tracker);
            tracker.clear(range(0, len)).unwrap();
            copy_pages(&dirty);
        }
    });
    copy_pages(&synced(&mut tracker));
    for part in populated {
        let (mut ours, mut theirs) = (vec![0; part.len() as usize], vec![0; part.len() as usize]);
        block.mapping.read(part.start(), &mut ours);
        copy.read(part.start(), &mut theirs);
        assert!(ours == theirs, "a write was missed");
    }
}

#[test]
fn no_write_to_shmem_is_lost() {
    if supported() {
        never_loses_a_write(&Block::shmem(8 << 20), true);
    }
}

#[test]
fn no_write_to_memory_of_unknown_files_is_lost() {
    if supported() {
        never_loses_a_write(&Block::shmem(8 << 20), false);
    }
}

#[test]
fn no_write_to_transparent_huge_pages_is_lost() {
    let file = or_skip("tmpfs with huge pages", huge_tmpfs());
    if let Some(file) = file.filter(|_| supported()) {
        never_loses_a_write(&Block::of(file, 0, 8 << 20).unwrap(), true);
    }
}

#[test]
fn no_write_to_hugetlb_is_lost() {
    let file = memfd(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB);
    let block = file.and_then(|file| {
        let block = Block::of(file, 0, 8 << 20)?;
        // A page that cannot be had raises SIGBUS when it is touched.
        block.block.backing().reserve(range(0, 8 << 20).in_file(0).unwrap())?;
        Ok(block)
    });
    if let Some(block) = or_skip("huge pages", block).filter(|_| supported()) {
        never_loses_a_write(&block, true);
    }
}

#[test]
fn no_write_to_a_file_on_disk_is_lost() {
    let block = tempfile::tempfile_in(".").and_then(|file| Block::of(file, 0, 8 << 20));
    if let Some(block) = or_skip("a file", block).filter(|_| supported()) {
        never_loses_a_write(&block, true);
    }
}

/// What is done with a block of which granules come and go.
#[derive(Clone, Debug)]
enum Op {
    /// Populates a granule, or discards it.
    Toggle(u64),
    Write(u64),
    Sync,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Granules of 64 pages, of which eight share a chunk; another one in which nothing is populated at first.
    #[test]
    fn no_write_is_lost_while_ranges_come_and_go(
        ops in prop::collection::vec(
            prop_oneof![
                3 => (0u64..16).prop_map(Op::Toggle),
                6 => (0u64..1024).prop_map(Op::Write),
                2 => Just(Op::Sync),
            ],
            1..60,
        ),
    ) {
        if !supported() {
            return Ok(());
        }
        const GRANULE: u64 = 64 * PAGE;
        let block = Block::shmem(16 * GRANULE);
        let mut tracker = block.tracker();
        tracker.start(&[range(0, 2 * GRANULE)]).unwrap();
        let mut populated: Vec<_> = (0..16).map(|granule| granule < 2).collect();
        let mut written = std::collections::BTreeSet::new();
        for op in ops.into_iter().chain([Op::Sync]) {
            match op {
                Op::Toggle(granule) => {
                    let part = range(granule * GRANULE, (granule + 1) * GRANULE);
                    let is_populated = &mut populated[granule as usize];
                    if *is_populated {
                        tracker.discard(part).unwrap();
                        let in_file = part.in_file(16 * PAGE).unwrap();
                        block.block.backing().discard(in_file).unwrap();
                        written.retain(|page| page / 64 != granule);
                    } else {
                        tracker.populate(part).unwrap();
                    }
                    *is_populated = !*is_populated;
                }
                Op::Write(page) if populated[(page / 64) as usize] => {
                    block.mapping.write(page * PAGE + 8, &[1]);
                    written.insert(page);
                }
                Op::Write(_) => {}
                Op::Sync => {
                    let dirty = synced(&mut tracker);
                    let missed: Vec<_> = written.iter().filter(|page| !dirty.test(**page)).collect();
                    prop_assert!(missed.is_empty(), "{missed:?}");
                    written.clear();
                }
            }
        }
        // Each range costs a sync a call.
        prop_assert!(tracker.populated.windows(2).all(|pair| pair[0].end() < pair[1].start()));
        let (outside, within) = (range(16 * GRANULE, 17 * GRANULE), range(0, GRANULE));
        prop_assert!(tracker.populate(outside).is_err());
        prop_assert_eq!(tracker.populate(within).is_err(), populated[0]);
    }
}
