use super::*;
use crate::huge_page_pool::Pool;
use rustix::fs::MemfdFlags;
use std::os::unix::fs::{FileExt, MetadataExt};

const PAGE: u64 = 4096;

fn memfd(size: u64) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(fs::memfd_create("backing-test", flags).unwrap());
    file.set_len(size).unwrap();
    file
}

fn range(start: u64, len: u64) -> FileRange {
    FileRange::new(start, len).unwrap()
}

#[test]
fn discard_gives_memory_back_and_leaves_the_neighbours() {
    let file = memfd(64 * PAGE);
    file.write_all_at(&vec![0xaa; 64 * 4096], 0).unwrap();
    let backing = Backing::new(file.try_clone().unwrap()).unwrap();
    assert_eq!(backing.kind(), BackingKind::Shmem);
    backing.discard(range(8 * PAGE, 16 * PAGE)).unwrap();
    assert_eq!(file.metadata().unwrap().blocks() * 512, 48 * PAGE);
    assert_eq!(backing.resident(range(0, 64 * PAGE)).unwrap(), Some(48 * PAGE));
    assert_eq!(backing.resident(range(4 * PAGE, 8 * PAGE)).unwrap(), Some(4 * PAGE));
    let mut bytes = vec![0; 64 * 4096];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes[..8 * 4096].iter().chain(&bytes[24 * 4096..]).all(|&b| b == 0xaa));
    assert!(bytes[8 * 4096..24 * 4096].iter().all(|&b| b == 0));
}

#[test]
fn counting_what_is_resident_neither_allocates_nor_moves_the_offset() {
    use std::io::Seek;
    let mut file = memfd(64 * PAGE);
    file.write_all_at(&[1], 5 * PAGE).unwrap();
    file.seek(io::SeekFrom::Start(7)).unwrap();
    let backing = Backing::new(file.try_clone().unwrap()).unwrap();
    assert_eq!(backing.resident(range(0, 64 * PAGE)).unwrap(), Some(PAGE));
    assert_eq!(file.metadata().unwrap().blocks() * 512, PAGE);
    assert_eq!(file.stream_position().unwrap(), 7);
}

#[test]
fn sweep_finds_strays() {
    let file = memfd(64 * PAGE);
    for page in [3, 4, 20, 63] {
        file.write_all_at(&[1], page * PAGE).unwrap();
    }
    let backing = Backing::new(file.try_clone().unwrap()).unwrap();
    backing.sweep(range(4 * PAGE, 60 * PAGE)).unwrap();
    assert_eq!(file.metadata().unwrap().blocks() * 512, PAGE);
}

#[test]
fn a_sweep_of_many_ranges_searches_only_where_data_is() {
    let file = memfd(4096 * PAGE);
    // In a range that is swept, in one that is not, and on either side of a border.
    let pages: [u64; 6] = [6, 100, 103, 2000, 2001, 4095];
    for page in pages {
        file.write_all_at(&[1], page * PAGE).unwrap();
    }
    let backing = Backing::new(file.try_clone().unwrap()).unwrap();
    let every_other = |skip: u64| (0..2048).map(move |nr| range((2 * nr + skip) * PAGE, PAGE));
    SEARCHES.take();
    backing.sweep_all(every_other(0)).unwrap();
    // Each page that is there ends a search at most twice: one before it, one past it.
    let searches = SEARCHES.take().data;
    assert!(searches <= 2 * pages.len() + 1, "{searches} searches");
    let mut left = Vec::new();
    backing.for_each_resident(range(0, 4096 * PAGE), |part| left.push(part)).unwrap();
    assert_eq!(left, [103, 2001, 4095].map(|page: u64| range(page * PAGE, PAGE)));
    backing.sweep_all(every_other(1)).unwrap();
    SEARCHES.take();
    backing.sweep_all(every_other(1)).unwrap();
    assert_eq!((SEARCHES.take().data, file.metadata().unwrap().blocks()), (1, 0));
}

#[test]
fn a_sweep_and_a_look_at_what_is_resident_search_no_end_of_the_data() {
    let file = memfd(4096 * PAGE);
    file.write_all_at(&vec![1; 4096 * 4096], 0).unwrap();
    let backing = Backing::new(file.try_clone().unwrap()).unwrap();
    let resident = |range| {
        let mut found = Vec::new();
        backing.for_each_resident(range, |part| found.push(part)).unwrap();
        found
    };
    SEARCHES.take();
    assert_eq!(resident(range(PAGE, PAGE)), [range(PAGE, PAGE)]);
    backing.sweep(range(PAGE, PAGE)).unwrap();
    backing.sweep(range(1023 * PAGE, 2 * PAGE)).unwrap();
    assert_eq!(SEARCHES.take().holes, 0);
    assert_eq!(file.metadata().unwrap().blocks() * 512, 4093 * PAGE);
    assert_eq!(resident(range(0, 3 * PAGE)), [range(0, PAGE), range(2 * PAGE, PAGE)]);
    let across = [range(1022 * PAGE, PAGE), range(1025 * PAGE, 2 * PAGE)];
    assert_eq!(resident(range(1022 * PAGE, 5 * PAGE)), across);
    assert_eq!(SEARCHES.take().holes, 0);
}

#[test]
fn a_chunk_is_never_smaller_than_a_page() {
    let mut backing = Backing::new(memfd(PAGE)).unwrap();
    for page_size in [4 << 10, 2 << 20, 1 << 30, 16 << 30] {
        backing.page_size = page_size;
        assert!(backing.chunk().is_multiple_of(page_size), "{page_size:#x}");
    }
}

/// A memfd of two huge pages, and a pool that has them; `None`, having said why, where it cannot
/// be had.
fn huge(page_size: u64, size: MemfdFlags) -> Option<(Pool, Backing)> {
    let pool = Pool::with_free(page_size, 2);
    let pool = pool.inspect_err(|error| eprintln!("skipped: {error}")).ok()?;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | size;
    let file = File::from(fs::memfd_create("backing-test", flags).unwrap());
    file.set_len(2 * page_size).unwrap();
    Some((pool, Backing::new(file).unwrap()))
}

#[test]
fn huge_pages_that_are_discarded_are_in_the_pool_again() {
    for (page_size, size) in [(2 << 20, MemfdFlags::HUGE_2MB), (1 << 30, MemfdFlags::HUGE_1GB)] {
        let Some((pool, backing)) = huge(page_size, size) else { continue };
        assert_eq!(backing.page_size(), page_size);
        let resident = || backing.file().metadata().unwrap().blocks() * 512;
        backing.reserve(range(0, 2 * page_size)).unwrap();
        assert_eq!((resident(), pool.free()), (2 * page_size, 0));
        backing.discard(range(page_size, page_size)).unwrap();
        assert_eq!((resident(), pool.free()), (page_size, 1));
        for part in [range(0, page_size / 2), range(4096, page_size)] {
            let refused = backing.discard(part).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{part}");
        }
        assert_eq!(resident(), page_size);
        backing.sweep(range(0, 2 * page_size)).unwrap();
        assert_eq!((resident(), pool.free()), (0, 2));
    }
}

#[test]
fn sealed_memory_is_refused_also_when_sealed_later() {
    let file = memfd(PAGE);
    let backing = Backing::new(file.try_clone().unwrap()).unwrap();
    fs::fcntl_add_seals(&file, fs::SealFlags::FUTURE_WRITE).unwrap();
    assert!(matches!(backing.probe(), Err(BackingError::Sealed("F_SEAL_FUTURE_WRITE"))));
    assert!(matches!(Backing::new(file), Err(BackingError::Sealed(_))));
}

#[test]
fn sealed_memory_of_huge_pages_is_refused_also_when_sealed_later() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
    for seal in [fs::SealFlags::FUTURE_WRITE, fs::SealFlags::WRITE] {
        // Needs no huge page, since none is touched.
        let Ok(file) = fs::memfd_create("backing-test", flags) else { return };
        let backing = Backing::new(File::from(file.try_clone().unwrap())).unwrap();
        assert_eq!(backing.kind(), BackingKind::Hugetlb);
        fs::fcntl_add_seals(&file, seal).unwrap();
        assert!(matches!(backing.probe(), Err(BackingError::Sealed(_))));
    }
}

#[test]
fn what_is_resident_is_what_the_kernel_counts_and_no_end_of_data_is_searched() {
    let file = memfd(8 * PAGE);
    let backing = Backing::new(file.try_clone().unwrap()).unwrap();
    file.write_all_at(&[1], PAGE).unwrap();
    file.write_all_at(&[1; 2 * 4096], 4 * PAGE).unwrap();
    let resident = |from: u64, to: u64| {
        backing.resident(range(from * PAGE, (to - from) * PAGE)).unwrap().unwrap() / PAGE
    };
    SEARCHES.take();
    assert_eq!([resident(0, 8), resident(0, 7), resident(1, 8), resident(2, 5)], [3, 3, 3, 1]);
    assert_eq!(SEARCHES.take().holes, 0);
    for (from, to) in [(0, 8), (0, 7), (2, 4), (2, 5), (5, 6), (6, 8)] {
        let searched = backing.search_pages(range(from * PAGE, (to - from) * PAGE));
        assert_eq!(searched.unwrap(), resident(from, to) * PAGE, "{from}..{to}");
    }
    assert_eq!(SEARCHES.take().holes, 0);
    // Held, though no data.
    fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 6 * PAGE, PAGE).unwrap();
    assert_eq!(resident(0, 8), 4);
}

#[test]
fn probing_takes_nothing_from_the_file() {
    let file = memfd(4 * PAGE);
    file.write_all_at(&[0xaa; 4 * 4096], 0).unwrap();
    let on_disk = tempfile::tempfile().unwrap();
    on_disk.write_all_at(&[0xaa; 4 * 4096], 0).unwrap();
    for file in [file, on_disk] {
        let backing = Backing::new(file.try_clone().unwrap()).unwrap();
        backing.probe().unwrap();
        let mut bytes = [0; 4 * 4096];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [0xaa; 4 * 4096]);
        assert_eq!(backing.file_len().unwrap(), 4 * PAGE);
    }
}

#[test]
fn memory_that_is_open_for_appending_is_written_at_its_place() {
    let file = memfd(4 * PAGE);
    fs::fcntl_setfl(&file, OFlags::APPEND).unwrap();
    let backing = Backing::new(file.try_clone().unwrap()).unwrap();
    backing.file().write_all_at(&[7], 2 * PAGE).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 2 * PAGE).unwrap();
    assert_eq!((byte, file.metadata().unwrap().len()), ([7], 4 * PAGE));
}

#[test]
fn memory_that_cannot_be_written_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let read_only = File::open(file.path()).unwrap();
    assert!(matches!(Backing::new(read_only), Err(BackingError::NotWritable)));
}
