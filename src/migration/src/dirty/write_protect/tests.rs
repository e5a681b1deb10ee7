#![allow(clippy::single_range_in_vec_init, reason = "lists of runs, some with a single one")]

use super::*;
use crate::stream::TARGET_PAGE_SIZE;
use proptest::prelude::*;
use rustix::fs::MemfdFlags;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};

const PAGE: u64 = TARGET_PAGE_SIZE;

/// A block of `len` bytes that lies at `offset` of a file.
struct Block {
    file: File,
    mapping: Arc<HostMapping>,
    block: Arc<RamBlock>,
}

impl Block {
    fn of(file: File, offset: u64, len: u64) -> io::Result<Self> {
        file.set_len(offset + len)?;
        let mapping = Arc::new(HostMapping::map(&file, offset, len)?);
        let block = RamBlock::new("ram".into(), 1 << 30, len, file.try_clone()?, offset);
        Ok(Self { file, mapping, block: Arc::new(block.unwrap()) })
    }

    fn shmem(len: u64) -> Self {
        Self::of(memfd(MemfdFlags::empty()).unwrap(), 16 * PAGE, len).unwrap()
    }

    fn tracker(&self) -> WriteProtect {
        WriteProtect::new(Arc::clone(&self.mapping), Some(Arc::clone(&self.block))).unwrap()
    }

    fn held(&self) -> u64 {
        self.file.metadata().unwrap().blocks() * 512
    }
}

fn memfd(flags: MemfdFlags) -> io::Result<File> {
    let flags = flags | MemfdFlags::CLOEXEC;
    Ok(File::from(rustix::fs::memfd_create("write-protect-test", flags)?))
}

/// A file on a tmpfs of its own, mounted nowhere, that takes huge pages where it can.
fn huge_tmpfs() -> io::Result<File> {
    use rustix::fs::{Mode, OFlags};
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
        fsopen,
    };
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "huge", "always")?;
    fsconfig_create(&context)?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(&mount, "ram", flags, Mode::RWXU)?))
}

/// Where a kernel or a machine lacks what a test needs, it says so and does nothing.
fn or_skip<T>(what: &str, result: io::Result<T>) -> Option<T> {
    result.inspect_err(|error| eprintln!("skipped, {what}: {error}")).ok()
}

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::from_bounds(start, end).unwrap()
}

fn synced(tracker: &mut WriteProtect) -> PageBitmap {
    let mut dirty = PageBitmap::new(tracker.mapping.len() / PAGE);
    tracker.sync(&mut dirty).unwrap();
    dirty
}

fn dirty_pages(tracker: &mut WriteProtect) -> Vec<Range<u64>> {
    let dirty = synced(tracker);
    dirty.runs(0..dirty.nr_pages()).collect()
}

/// Page tables of this process, bytes.
fn page_tables() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPTE:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().trim().parse::<u64>().unwrap() * 1024
}

/// Whether this kernel has what the tracker needs; older ones are told so by `start`.
fn supported() -> bool {
    or_skip("asynchronous write-protection", AsyncWriteProtect::open()).is_some()
}

#[test]
fn a_page_is_reported_for_each_write_after_the_last_sync() {
    if !supported() {
        return;
    }
    let block = Block::shmem(8 << 20);
    block.mapping.write(0, &vec![1; 3 << 20]);
    let mut tracker = block.tracker();
    tracker.start(&[range(0, 8 << 20)]).unwrap();
    assert_eq!(dirty_pages(&mut tracker), []);
    // Into memory that is mapped, into a hole beside it, and into a hole far away.
    block.mapping.write(5 * PAGE + 1, &[2]);
    block.mapping.write(900 * PAGE, &[2]);
    block.mapping.write(7 << 20, &[2]);
    assert_eq!(dirty_pages(&mut tracker), [5..6, 900..901, 1792..1793]);
    assert_eq!(dirty_pages(&mut tracker), []);
    for page in [5, 6, 900, 1792, 1793, 1000] {
        block.mapping.write(page * PAGE, &[3]);
    }
    assert_eq!(dirty_pages(&mut tracker), [5..7, 900..901, 1000..1001, 1792..1794]);
    // Not reported yet, so not to be forgotten with what is cleared.
    block.mapping.write(5 * PAGE, &[0; 3 * 4096]);
    tracker.clear(range(6 * PAGE, 7 * PAGE)).unwrap();
    assert_eq!(dirty_pages(&mut tracker), [5..8]);
    tracker.stop().unwrap();
    block.mapping.write(0, &[4]);
    assert_eq!(dirty_pages(&mut tracker), []);
    tracker.start(&[range(0, 8 << 20)]).unwrap();
    assert_eq!(dirty_pages(&mut tracker), []);
}

#[test]
fn a_sync_is_cut_into_windows_that_cover_it_once() {
    let cut_up: Vec<_> = cut(range(3 * SCAN - 4096, 5 * SCAN + 4096), SCAN).collect();
    let expected = [
        range(3 * SCAN - 4096, 3 * SCAN),
        range(3 * SCAN, 4 * SCAN),
        range(4 * SCAN, 5 * SCAN),
        range(5 * SCAN, 5 * SCAN + 4096),
    ];
    assert_eq!(cut_up, expected);
    if !supported() {
        return;
    }
    let block = Block::shmem(3 * SCAN);
    let mut tracker = block.tracker();
    block.mapping.write(SCAN + 5 * PAGE, &[1]);
    tracker.start(&[range(0, 3 * SCAN)]).unwrap();
    let scanned = windows(&tracker.populated, &tracker.armed, tracker.chunk, tracker.len);
    let scanned: Vec<_> = scanned.map(|(part, _)| part).collect();
    assert_eq!((scanned[0].start(), scanned.last().unwrap().end()), (0, 3 * SCAN));
    assert!(scanned.windows(2).all(|pair| pair[0].end() == pair[1].start()), "{scanned:?}");
    assert!(scanned.iter().all(|part| part.len() <= SCAN), "{scanned:?}");
}

#[test]
fn memory_of_somebody_elses_making_is_armed_though_it_is_not_mapped_here() {
    if !supported() {
        return;
    }
    let block = Block::shmem(4 << 20);
    block.file.write_all_at(&[1; 8 * 4096], 16 * PAGE).unwrap();
    let mut tracker = block.tracker();
    tracker.start(&[range(0, 4 << 20)]).unwrap();
    assert_eq!(dirty_pages(&mut tracker), []);
    // A read maps the page; only the write is reported.
    block.mapping.read(2 * PAGE, &mut [0]);
    block.mapping.write(3 * PAGE, &[2]);
    assert_eq!(dirty_pages(&mut tracker), [3..4]);
}

#[test]
fn writes_by_system_calls_are_seen() {
    if !supported() {
        return;
    }
    let block = Block::shmem(4 << 20);
    block.mapping.write(0, &[1; 64 * 4096]);
    let mut tracker = block.tracker();
    tracker.start(&[range(0, 4 << 20)]).unwrap();
    crate::sys::testing::read_from_file(&block.mapping, 9 * PAGE, &block.file, 16 * PAGE);
    assert_eq!(dirty_pages(&mut tracker), [9..10]);
}

#[test]
fn discarded_and_untouched_memory_costs_nothing() {
    if !supported() {
        return;
    }
    let len = 256 << 30;
    let block = Block::shmem(len);
    block.mapping.write(1 << 30, &[1; 4096]);
    let (held, tables) = (block.held(), page_tables());
    let mut tracker = block.tracker();
    // 16 GiB of it populated, in pieces, of which one page was ever touched.
    let populated: Vec<_> = (0..256).map(|at| range(at << 30, (at << 30) + (64 << 20))).collect();
    tracker.start(&populated).unwrap();
    assert_eq!(dirty_pages(&mut tracker), []);
    // Of other tests of this process there may be some.
    assert!(page_tables() < tables + (8 << 20), "{tables} {}", page_tables());
    assert_eq!(block.held(), held);
    block.mapping.write((3 << 30) + 5 * PAGE, &[1]);
    let page = (3 << 30) / PAGE + 5;
    assert_eq!(dirty_pages(&mut tracker), [page..page + 1]);
    assert_eq!(block.held(), held + PAGE);
}

#[test]
fn a_write_to_a_discarded_range_is_reported_once() {
    if !supported() {
        return;
    }
    let block = Block::shmem(8 << 20);
    let mut tracker = block.tracker();
    tracker.start(&[range(0, 1 << 20), range(6 << 20, 8 << 20)]).unwrap();
    let stray = (3 << 20) / PAGE;
    block.mapping.write(3 << 20, &[1; 2 * 4096]);
    assert_eq!(dirty_pages(&mut tracker), [stray..stray + 2]);
    assert_eq!(dirty_pages(&mut tracker), []);
    block.mapping.write(3 << 20, &[2]);
    assert_eq!(dirty_pages(&mut tracker), [stray..stray + 1]);
    // Discarded again, and written again.
    block
        .block
        .backing()
        .discard(range(16 * PAGE + (3 << 20), 16 * PAGE + (4 << 20)).in_file(0).unwrap())
        .unwrap();
    assert_eq!(dirty_pages(&mut tracker), []);
    block.mapping.write(3 << 20, &[2]);
    assert_eq!(dirty_pages(&mut tracker), [stray..stray + 1]);
}

#[test]
fn a_block_that_shares_a_chunk_with_a_discarded_one_is_armed_as_a_whole() {
    if !supported() {
        return;
    }
    let block = Block::shmem(2 << 20);
    let mut tracker = block.tracker();
    // Blocks of 64 KiB, every other one populated, all in one chunk.
    let populated: Vec<_> = (0..16).map(|at| range(at << 17, (at << 17) + (1 << 16))).collect();
    tracker.start(&populated).unwrap();
    block.mapping.write(0, &[1]);
    assert_eq!(dirty_pages(&mut tracker), [0..1]);
    for at in 0..16 {
        block.mapping.write(at << 17, &[1]);
    }
    let expected: Vec<_> = (0..16).map(|at| at * 32..at * 32 + 1).collect();
    assert_eq!(dirty_pages(&mut tracker), expected);
    assert_eq!(dirty_pages(&mut tracker), []);
}

#[test]
fn a_truncated_file_is_an_error() {
    if !supported() {
        return;
    }
    let block = Block::shmem(4 << 20);
    let mut tracker = block.tracker();
    tracker.start(&[range(0, 4 << 20)]).unwrap();
    block.file.set_len(1 << 20).unwrap();
    let mut dirty = PageBitmap::new(1024);
    let error = tracker.sync(&mut dirty).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    tracker.stop().unwrap();
    assert!(tracker.start(&[range(0, 4 << 20)]).is_err());
}

#[test]
fn what_cannot_be_tracked_is_refused() {
    if !supported() {
        return;
    }
    let block = Block::shmem(4 << 20);
    let mut tracker = block.tracker();
    for wrong in [
        vec![range(0, 5 << 20)],
        vec![range(1, PAGE)],
        vec![range(PAGE, 2 * PAGE), range(0, PAGE)],
        vec![range(0, 2 * PAGE), range(PAGE, 3 * PAGE)],
    ] {
        let error = tracker.start(&wrong).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
    // Another userfaultfd has it.
    tracker.start(&[range(0, PAGE)]).unwrap();
    let error = block.tracker().start(&[range(0, PAGE)]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
    let short = Arc::new(HostMapping::map(&block.file, 0, PAGE).unwrap());
    assert!(WriteProtect::new(short, Some(Arc::clone(&block.block))).is_err());
}

#[test]
fn what_lies_behind_a_short_bitmap_is_left_out() {
    if !supported() {
        return;
    }
    let block = Block::shmem(4 << 20);
    let mut tracker = block.tracker();
    tracker.start(&[range(0, 1 << 20)]).unwrap();
    block.mapping.write(PAGE, &[1]);
    block.mapping.write(3 << 20, &[1]);
    let mut dirty = PageBitmap::new(256);
    tracker.sync(&mut dirty).unwrap();
    assert!(dirty.runs(0..256).eq([1..2]));
}

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

#[test]
fn a_transparent_huge_page_is_reported_by_the_page() {
    let Some(file) = or_skip("tmpfs with huge pages", huge_tmpfs()) else { return };
    if !supported() {
        return;
    }
    let block = Block::of(file, 0, 8 << 20).unwrap();
    block.mapping.write(0, &[1]);
    let mut tracker = block.tracker();
    tracker.start(&[range(0, 8 << 20)]).unwrap();
    assert_eq!(dirty_pages(&mut tracker), []);
    for _ in 0..2 {
        block.mapping.write(7 * PAGE, &[1]);
        assert_eq!(dirty_pages(&mut tracker), [7..8]);
    }
    // A huge page that is new is data as a whole, and told by the page from then on.
    block.mapping.write(4 << 20, &[1]);
    assert!(synced(&mut tracker).test(1024));
    block.mapping.write((4 << 20) + PAGE, &[1]);
    assert_eq!(dirty_pages(&mut tracker), [1025..1026]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn segments_cover_the_block_once(
        cuts in prop::collection::btree_set(0u64..64, 0..12),
        armed in prop::collection::vec(any::<bool>(), 16),
        chunk in 1u64..6,
    ) {
        let cuts: Vec<u64> = cuts.into_iter().collect();
        let populated: Vec<_> =
            cuts.chunks_exact(2).map(|pair| range(pair[0], pair[1])).collect();
        let len = 64;
        let mut bits = PageBitmap::new(64u64.div_ceil(chunk));
        for at in 0..bits.nr_pages() {
            if armed[at as usize % 16] {
                bits.set(at);
            }
        }
        let mut at = 0;
        for (segment, written) in segments(&populated, &bits, chunk, len) {
            prop_assert_eq!(segment.start(), at);
            at = segment.end();
            for byte in segment.start()..segment.end() {
                let is_populated = populated.iter().any(|p| p.contains(range(byte, byte + 1)));
                let expected = is_populated && bits.test(byte / chunk);
                prop_assert_eq!(written == Written::Unprotected, expected);
            }
        }
        prop_assert_eq!(at, len);
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

#[test]
fn what_is_populated_and_not_touched_costs_nothing() {
    if !supported() {
        return;
    }
    let block = Block::shmem(64 << 20);
    let mut tracker = block.tracker();
    tracker.start(&[]).unwrap();
    let before = page_tables();
    tracker.populate(range(0, 32 << 20)).unwrap();
    assert_eq!(dirty_pages(&mut tracker), []);
    assert_eq!((block.held(), page_tables()), (0, before));
    block.mapping.write(5 * PAGE, &[1]);
    assert_eq!(dirty_pages(&mut tracker), [5..6]);
}
