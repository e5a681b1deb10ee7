mod shared;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use proptest::prelude::*;

use super::*;
use crate::MigrationError;
use crate::devices::{DeviceSection, Devices, NoDevices};
use crate::huge_page_pool::Pool;
use crate::lazy::HandlerFailed;
use crate::precopy::Guest;
use crate::progress::{self, Progress, Status};
use crate::ram::{BlockOptions, RamBlocks};
use crate::stream::SectionHeader;
use crate::test_support::{BLOCK, Log, PAGE, Side, TestManager, fill, memfd, migration_block};
use ram_discard::memory::HostMapping;
use std::sync::Arc;
use vmstate::wire::WireRead;

fn save_to(side: &Side, file: &File) -> (Result<(), MigrationError>, progress::MigrationInfo) {
    let progress = Arc::new(Progress::new());
    let snapshot = Snapshot {
        configuration: Configuration::new("test"),
        blocks: &side.blocks,
        devices: &mut NoDevices,
        progress: Arc::clone(&progress),
    };
    (save(snapshot, file), progress.snapshot())
}

fn restore_from(side: &Side, file: &File) -> Result<(), MigrationError> {
    let what = Restore {
        configuration: Configuration::new("test"),
        blocks: Arc::clone(&side.blocks),
        devices: &mut NoDevices,
        threads: 3,
        progress: Arc::new(Progress::new()),
    };
    restore(what, file)
}

fn filled() -> Side {
    let side = Side::new(&[1, 4, 5]);
    fill(&side.region, 64..96, 7);
    fill(&side.region, 300..310, 8);
    fill(&side.region, 310..314, 0);
    // Written although discarded.
    fill(&side.region, 640..643, 9);
    fill(&side.boot, 3..5, 5);
    side
}

#[test]
fn a_snapshot_holds_what_the_guest_holds_and_comes_back() {
    let from = filled();
    let file = tempfile::tempfile().unwrap();
    let held = from.held();
    let (saved, seen) = save_to(&from, &file);
    saved.unwrap();
    assert_eq!(from.held(), held);
    assert_eq!(seen.status, Status::Completed);
    assert_eq!((seen.normal, seen.duplicate), (32 + 10 + 2, 4));
    assert_eq!((seen.discarded, seen.holes), (13 * 64, 3 * 64 - 46 + 64 - 2));
    assert_eq!(seen.remaining, 0);
    // Pages, and a page or two each for the stream and the bitmaps.
    let on_disk = file.metadata().unwrap().blocks() * 512;
    assert!(on_disk <= (44 + 10) * PAGE, "{on_disk}");
    assert!(file.metadata().unwrap().len() > 17 * BLOCK);

    let to = Side::new(&[1, 4, 5]);
    fill(&to.region, 64..500, 0xee);
    restore_from(&to, &file).unwrap();
    for page in [64, 95, 300, 309, 310, 313, 640, 700] {
        let expected = if page == 640 { vec![0; PAGE as usize] } else { from.page(page) };
        assert_eq!(to.page(page), expected, "page {page}");
    }
    // Zeros are holes now, and so is what came for discarded memory: nothing.
    assert_eq!(to.held(), (42, 2));
}

#[test]
fn the_file_does_not_grow_with_the_block() {
    // Far apart, at an end of what one page of the bitmap tells, and many in a row.
    let size = 64 << 30;
    let nr_pages = size / PAGE;
    let runs = [0..3, 32767..32769, 5_000_000..5_000_001, nr_pages - 300..nr_pages];
    let (from, to) = (Side::of_region(size), Side::of_region(size));
    runs.iter().for_each(|run| fill(&from.region, run.clone(), 7));
    let file = memfd(0);
    save_to(&from, &file).0.unwrap();
    let held = file.metadata().unwrap().blocks() * 512 / PAGE;
    let pages: u64 = runs.iter().map(|run| run.end - run.start).sum();
    // A page or two of the bitmap for each run, and what is around.
    assert!(held <= pages + 2 * runs.len() as u64 + 4, "{held}");
    restore_from(&to, &file).unwrap();
    assert_eq!(to.held().0, pages);
    for page in runs.into_iter().flatten() {
        assert_eq!(to.page(page), [7; 4096], "page {page}");
    }
}

#[test]
fn a_file_that_is_open_for_appending_is_refused_before_anything_is_written() {
    let named = tempfile::NamedTempFile::new().unwrap();
    let file = File::options().read(true).append(true).open(named.path()).unwrap();
    let error = save_to(&filled(), &file).0.unwrap_err().to_string();
    assert!(error.contains("open it without O_APPEND"), "{error}");
    assert_eq!(file.metadata().unwrap().len(), 0);
}

#[test]
fn an_image_has_its_name_when_it_is_whole_and_not_before() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let names = || {
        let entries = std::fs::read_dir(folder.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>()
    };
    std::fs::write(&path, b"precious").unwrap();
    let failed = write_image(&path, |file| {
        file.write_all_at(b"half", 0).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        Err(MigrationError::Cancelled)
    });
    assert!(matches!(failed, Err(MigrationError::Cancelled)));
    assert_eq!(
        (names(), std::fs::read(&path).unwrap()),
        (vec!["image".into()], b"precious".into())
    );
    let from = filled();
    write_image(&path, |file| save_to(&from, file).0).unwrap();
    assert_eq!(names(), ["image"]);
    let image = File::open(&path).unwrap();
    assert_eq!(image.metadata().unwrap().mode() & 0o777, 0o600);
    let to = Side::new(&[1, 4, 5]);
    restore_from(&to, &image).unwrap();
    assert_eq!(to.page(64), from.page(64));
}

/// A block of two huge pages, which takes none until it is loaded.
fn side_of_huge_pages() -> std::io::Result<RamBlocks> {
    use rustix::fs::MemfdFlags;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = File::from(rustix::fs::memfd_create("huge", flags)?);
    file.set_len(4 << 20)?;
    let mut blocks = RamBlocks::new();
    let block = migration_block("vmem0", &file, 4 << 20, BlockOptions::migratable());
    blocks.register(Arc::new(block)).map_err(std::io::Error::other)?;
    Ok(blocks)
}

#[test]
fn a_pool_without_huge_pages_refuses_a_restore() {
    let pool = match Pool::with_free(2 << 20, 1) {
        Ok(pool) => pool,
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let from = Side::of_region(4 << 20);
    fill(&from.region, 3..4, 7);
    fill(&from.region, 1000..1001, 8);
    let file = memfd(0);
    save_to(&from, &file).0.unwrap();
    let restored = || {
        let blocks = Arc::new(side_of_huge_pages().unwrap());
        let side =
            Side { region: memfd(0), boot: memfd(0), blocks: Arc::clone(&blocks), manager: None };
        restore_from(&side, &file).map(|()| blocks)
    };
    let error = restored().err().unwrap().to_string();
    assert!(error.contains("\"vmem0\": cannot take huge pages"), "{error}");
    pool.make_free(2).unwrap();
    let blocks = restored().unwrap();
    let mut bytes = [0; 3];
    for (byte, page) in bytes.iter_mut().zip([3, 1000, 4]) {
        blocks.get("vmem0").unwrap().mapping().read(page * PAGE, std::slice::from_mut(byte));
    }
    assert_eq!(bytes, [7, 8, 0]);
}

#[test]
fn a_block_whose_pages_are_said_to_be_nowhere_is_refused() {
    let from = filled();
    let file = memfd(0);
    save_to(&from, &file).0.unwrap();
    let mut stream = vec![0; 4096];
    file.read_exact_at(&mut stream, 0).unwrap();
    // After the id and the used length: version, page size, and the two offsets.
    let id = stream.windows(5).position(|bytes| bytes == b"vmem0").unwrap();
    let offsets = id + 5 + 8 + 4 + 8;
    // Both of them; and a bitmap in what was read of the stream, or after the pages.
    let pages = u64::from_be_bytes(stream[offsets + 8..offsets + 16].try_into().unwrap());
    for (bitmap, pages) in [(0, 0), (0, pages), (8, pages), (pages, pages)] {
        file.write_all_at(&u64::to_be_bytes(bitmap), offsets as u64).unwrap();
        file.write_all_at(&u64::to_be_bytes(pages), offsets as u64 + 8).unwrap();
        let to = Side::new(&[1, 4, 5]);
        let error = restore_from(&to, &file).unwrap_err().to_string();
        assert!(error.contains("offset of a bitmap"), "{bitmap:#x} {pages:#x}: {error}");
        assert_eq!(to.held(), (0, 0));
    }
}

#[test]
fn a_block_of_which_nothing_is_used_comes_back_wherever_it_is_listed() {
    let side = |used| {
        let mut blocks = RamBlocks::new();
        let file = memfd(BLOCK);
        let ram = migration_block("ram", &file, BLOCK, BlockOptions::migratable());
        blocks.register(Arc::new(ram)).unwrap();
        let options = BlockOptions { resizable: Some(used), ..BlockOptions::migratable() };
        let firmware = migration_block("fw", &memfd(BLOCK), BLOCK, options);
        blocks.register(Arc::new(firmware)).unwrap();
        Side { region: file, boot: memfd(0), blocks: Arc::new(blocks), manager: None }
    };
    let (from, to) = (side(0), side(2 * PAGE));
    fill(&from.region, 3..4, 7);
    let file = memfd(0);
    save_to(&from, &file).0.unwrap();
    restore_from(&to, &file).unwrap();
    assert_eq!(to.blocks.get("fw").unwrap().used_length(), 0);
    assert_eq!(to.page(3), [7; 4096]);
}

#[test]
fn a_file_with_content_is_not_written_over() {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(b"precious", 0).unwrap();
    let error = save_to(&filled(), &file).0.unwrap_err().to_string();
    assert!(error.contains("file with content"), "{error}");
    let mut content = [0; 8];
    file.read_exact_at(&mut content, 0).unwrap();
    assert_eq!(&content, b"precious");
}

#[test]
fn a_page_in_a_discarded_range_is_refused() {
    let file = tempfile::tempfile().unwrap();
    save_to(&filled(), &file).0.unwrap();
    let error = restore_from(&Side::new(&[1, 5]), &file).unwrap_err().to_string();
    assert!(error.contains("\"vmem0\": a page at 0x12c000"), "{error}");
}

/// The bytes of a snapshot before the first pages.
fn stream_start(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; 400];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn files_cut_anywhere_are_refused() {
    let file = tempfile::tempfile().unwrap();
    save_to(&filled(), &file).0.unwrap();
    let len = file.metadata().unwrap().len();
    let start = stream_start(&file);
    for cut in (0..200).chain([MAPPED_RAM_ALIGNMENT, 2 * MAPPED_RAM_ALIGNMENT, len - 30]) {
        let copy = memfd(0);
        let bytes = cut.min(start.len() as u64) as usize;
        copy.write_all_at(&start[..bytes], 0).unwrap();
        copy.set_len(cut).unwrap();
        assert!(restore_from(&Side::new(&[1, 4, 5]), &copy).is_err(), "cut at {cut}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn garbled_files_are_read_or_refused(at in 0usize..200, byte in any::<u8>()) {
        let file = memfd(0);
        save_to(&filled(), &file).0.unwrap();
        file.write_all_at(&[byte], at as u64).unwrap();
        let to = Side::new(&[1, 4, 5]);
        let _ = restore_from(&to, &file);
        // Whatever it says, nothing gets where memory is discarded.
        prop_assert_eq!(to.page(640), vec![0; PAGE as usize]);
    }
}

/// Panics: in these tests every fault can be answered.
struct NoFailure;

impl HandlerFailed for NoFailure {
    fn handler_failed(&self, error: &MigrationError) {
        panic!("{error}");
    }
}

#[test]
fn a_guest_runs_at_once_while_its_memory_is_read() {
    let from = filled();
    let file = Arc::new(tempfile::tempfile().unwrap());
    save_to(&from, &file).0.unwrap();
    let to = Side::new(&[1, 4, 5]);
    fill(&to.region, 64..500, 0xee);
    let what = Restore {
        configuration: Configuration::new("test"),
        blocks: Arc::clone(&to.blocks),
        devices: &mut NoDevices,
        threads: 1,
        progress: Arc::new(Progress::new()),
    };
    let restored = restore_lazily(what, Arc::clone(&file), Arc::new(NoFailure)).unwrap();
    let region = Arc::clone(to.blocks.get("vmem0").unwrap().mapping());
    let guest = std::thread::spawn(move || {
        // Backwards, so that the prefetch comes from the other side.
        (0..1024u64).rev().map(|page| region_byte(&region, page)).collect::<Vec<_>>()
    });
    let mut seen = guest.join().unwrap();
    seen.reverse();
    restored.wait().unwrap();
    let expected = |page| match page {
        64..96 => 7,
        300..310 => 8,
        _ => 0,
    };
    for (page, byte) in seen.into_iter().enumerate() {
        assert_eq!(byte, expected(page), "page {page}");
    }
}

fn region_byte(region: &HostMapping, page: u64) -> u8 {
    let mut bytes = [0];
    region.read(page * PAGE + 4095, &mut bytes);
    bytes[0]
}

#[test]
fn memory_that_nobody_touches_is_not_allocated_by_a_lazy_restore() {
    let from = filled();
    let file = Arc::new(tempfile::tempfile().unwrap());
    save_to(&from, &file).0.unwrap();
    let to = Side::new(&[1, 4, 5]);
    let progress = Arc::new(Progress::new());
    let what = Restore {
        configuration: Configuration::new("test"),
        blocks: Arc::clone(&to.blocks),
        devices: &mut NoDevices,
        threads: 1,
        progress: Arc::clone(&progress),
    };
    restore_lazily(what, file, Arc::new(NoFailure)).unwrap().wait().unwrap();
    assert_eq!(to.held(), (42, 2));
    assert_eq!(progress.snapshot().normal, 44);
}

/// A snapshot of [`filled`], and a side where it is being restored.
fn lazily(
    progress: &Arc<Progress>,
    failed: Arc<dyn HandlerFailed>,
) -> (Side, Arc<File>, LazyRestore) {
    let file = Arc::new(tempfile::tempfile().unwrap());
    save_to(&filled(), &file).0.unwrap();
    let to = Side::new(&[1, 4, 5]);
    let what = Restore {
        configuration: Configuration::new("test"),
        blocks: Arc::clone(&to.blocks),
        devices: &mut NoDevices,
        threads: 1,
        progress: Arc::clone(progress),
    };
    let restored = restore_lazily(what, Arc::clone(&file), failed).unwrap();
    (to, file, restored)
}

#[test]
fn a_guest_whose_lazy_restore_is_cancelled_runs_on_and_reads_what_it_touches() {
    let progress = Arc::new(Progress::new());
    // Before anything was read in the background.
    progress.cancel();
    let (to, _file, restored) = lazily(&progress, Arc::new(NoFailure));
    for _ in 0..2 {
        let error = restored.wait().unwrap_err();
        assert!(matches!(error, MigrationError::Cancelled), "{error}");
    }
    assert_eq!((restored.outstanding(), progress.status()), (44, Status::Cancelled));
    let region = to.blocks.get("vmem0").unwrap().mapping();
    let boot = to.blocks.get("ram").unwrap().mapping();
    assert_eq!([64, 95, 309, 310, 640].map(|page| region_byte(region, page)), [7, 7, 8, 0, 0]);
    assert_eq!(restored.outstanding(), 44 - 3);
    // It touches everything in the end.
    for page in (64..96).chain(300..310) {
        assert_ne!(region_byte(region, page), 0, "page {page}");
    }
    assert_eq!((region_byte(boot, 3), region_byte(boot, 4)), (5, 5));
    restored.wait().unwrap();
    assert_eq!((restored.outstanding(), progress.status()), (0, Status::Completed));
}

#[derive(Default)]
struct Failures(std::sync::Mutex<Vec<String>>);

impl HandlerFailed for Failures {
    fn handler_failed(&self, error: &MigrationError) {
        self.0.lock().unwrap().push(error.to_string());
    }
}

#[test]
fn a_lazy_restore_goes_on_when_the_file_can_be_read_again() {
    let failed = Arc::new(Failures::default());
    let progress = Arc::new(Progress::new());
    progress.cancel();
    let (to, file, cancelled) = lazily(&progress, Arc::clone(&failed) as Arc<dyn HandlerFailed>);
    drop(cancelled);
    drop(to);
    // Told, since the guest would wait for ever; and nothing was read.
    assert_eq!(failed.0.lock().unwrap().len(), 1);
    let to_again = Side::new(&[1, 4, 5]);
    let len = file.metadata().unwrap().len();
    let mut kept = vec![0; len as usize];
    file.read_exact_at(&mut kept, 0).unwrap();
    let progress = Arc::new(Progress::new());
    let what = Restore {
        configuration: Configuration::new("test"),
        blocks: Arc::clone(&to_again.blocks),
        devices: &mut CutsFile(Arc::clone(&file)),
        threads: 1,
        progress: Arc::clone(&progress),
    };
    let failed = Arc::new(Failures::default());
    let told = Arc::clone(&failed) as Arc<dyn HandlerFailed>;
    let restored = restore_lazily(what, Arc::clone(&file), told).unwrap();
    let region = Arc::clone(to_again.blocks.get("vmem0").unwrap().mapping());
    let guest = std::thread::spawn(move || region_byte(&region, 64));
    let error = restored.wait().unwrap_err().to_string();
    assert!(error.contains("cannot read pages"), "{error}");
    assert_eq!((progress.status(), restored.outstanding()), (Status::Failed, 44));
    while failed.0.lock().unwrap().is_empty() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(!guest.is_finished());
    file.write_all_at(&kept, 0).unwrap();
    assert_eq!(guest.join().unwrap(), 7);
    restored.wait().unwrap();
    assert_eq!((progress.status(), restored.outstanding()), (Status::Completed, 0));
    assert_eq!((to_again.page(95)[0], to_again.page(309)[0]), (7, 8));
    assert_eq!(failed.0.lock().unwrap().len(), 1, "once");
}

/// Cuts the file off before the first page, once the stream was read.
struct CutsFile(Arc<File>);

impl Devices for CutsFile {
    fn save(&mut self, _early: bool) -> Result<Vec<DeviceSection>, MigrationError> {
        Ok(Vec::new())
    }

    fn load(
        &mut self,
        _header: &SectionHeader,
        _early: bool,
        _reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        Ok(())
    }

    fn loaded(&mut self) -> Result<(), MigrationError> {
        self.0.set_len(4096).unwrap();
        Ok(())
    }
}

/// A guest that writes everything it has as soon as it runs on.
struct Writer {
    region: Arc<HostMapping>,
    threads: std::sync::Mutex<Vec<std::thread::JoinHandle<()>>>,
    stops: std::sync::atomic::AtomicUsize,
    runs: std::sync::atomic::AtomicUsize,
    /// Done when the guest runs.
    happens: std::sync::Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Guest for Writer {
    fn stop(&self) -> Result<(), String> {
        self.stops.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        self.runs.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if let Some(happens) = self.happens.lock().unwrap().take() {
            happens();
        }
        for first in 0..2 {
            let region = Arc::clone(&self.region);
            let thread = std::thread::spawn(move || {
                for page in (0..1024u64).rev().filter(|page| page % 2 == first) {
                    region.write(page * PAGE, &[0xbb; PAGE as usize]);
                }
            });
            self.threads.lock().unwrap().push(thread);
        }
        Ok(())
    }
}

fn save_running(side: &Side, file: &File) -> (Result<(), MigrationError>, progress::MigrationInfo) {
    let (result, seen, runs) = save_running_while(side, file, None, Arc::default());
    assert_eq!(runs, 1);
    (result, seen)
}

/// Has `happens` done when the guest runs again; also how often it was let run.
fn save_running_while(
    side: &Side,
    file: &File,
    happens: Option<Box<dyn FnOnce() + Send>>,
    progress: Arc<Progress>,
) -> (Result<(), MigrationError>, progress::MigrationInfo, usize) {
    let guest = Writer {
        region: Arc::clone(side.blocks.get("vmem0").unwrap().mapping()),
        threads: std::sync::Mutex::default(),
        stops: std::sync::atomic::AtomicUsize::new(0),
        runs: std::sync::atomic::AtomicUsize::new(0),
        happens: std::sync::Mutex::new(happens),
    };
    let snapshot = BackgroundSnapshot {
        configuration: Configuration::new("test"),
        blocks: &side.blocks,
        devices: &mut NoDevices,
        guest: &guest,
        progress: Arc::clone(&progress),
    };
    let result = save_in_background(snapshot, file);
    for thread in guest.threads.into_inner().unwrap() {
        thread.join().unwrap();
    }
    (result, progress.snapshot(), guest.runs.into_inner())
}

#[test]
fn a_freeze_that_was_lost_leaves_a_file_that_cannot_be_restored() {
    let from = filled();
    let manager = Arc::clone(from.manager.as_ref().unwrap());
    let file = tempfile::tempfile().unwrap();
    let losing = Arc::clone(&manager);
    let happens: Box<dyn FnOnce() + Send> = Box::new(move || losing.lose_freezes());
    let (saved, seen, runs) =
        save_running_while(&from, &file, Some(happens), Arc::new(Progress::new()));
    assert!(matches!(saved, Err(MigrationError::FreezeLost(_))), "{saved:?}");
    assert_eq!((seen.status, runs), (Status::Failed, 1));
    restore_from(&Side::new(&[1, 4, 5]), &file).unwrap_err();

    // Unplugged while it is saved, by a device of this process: its pages are gone from the file.
    let file = tempfile::tempfile().unwrap();
    let unplugging = Arc::clone(&manager);
    let happens: Box<dyn FnOnce() + Send> = Box::new(move || unplugging.set(4, false));
    let (saved, _, _) = save_running_while(&from, &file, Some(happens), Arc::new(Progress::new()));
    assert!(matches!(saved, Err(MigrationError::FreezeLost(_))), "{saved:?}");
    restore_from(&Side::new(&[1, 4, 5]), &file).unwrap_err();
}

/// Loses a freeze when the rest of the devices is saved.
struct Losing(Arc<TestManager>);

impl Devices for Losing {
    fn save(&mut self, early: bool) -> Result<Vec<DeviceSection>, MigrationError> {
        if !early {
            self.0.lose_freezes();
        }
        NoDevices.save(early)
    }

    fn load(
        &mut self,
        header: &SectionHeader,
        early: bool,
        reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        NoDevices.load(header, early, reader)
    }

    fn loaded(&mut self) -> Result<(), MigrationError> {
        NoDevices.loaded()
    }
}

#[test]
fn a_freeze_that_was_lost_while_a_stopped_guest_is_saved_leaves_no_snapshot() {
    let from = filled();
    let progress = Arc::new(Progress::new());
    let snapshot = Snapshot {
        configuration: Configuration::new("test"),
        blocks: &from.blocks,
        devices: &mut Losing(Arc::clone(from.manager.as_ref().unwrap())),
        progress: Arc::clone(&progress),
    };
    let file = tempfile::tempfile().unwrap();
    assert!(matches!(save(snapshot, &file), Err(MigrationError::FreezeLost(_))));
    assert_eq!(progress.status(), Status::Failed);
    restore_from(&Side::new(&[1, 4, 5]), &file).unwrap_err();
}

#[test]
fn block_state_is_frozen_while_memory_is_restored() {
    let from = filled();
    let file = tempfile::tempfile().unwrap();
    save_to(&from, &file).0.unwrap();
    let to = Side::new(&[1, 4, 5]);
    let log = Log::default();
    to.manager.as_ref().unwrap().watch(&log);
    restore_from(&to, &file).unwrap();
    assert_eq!(*log.lock().unwrap(), ["freeze", "thaw"]);
}

#[test]
fn a_background_snapshot_is_the_guest_at_one_instant() {
    let from = filled();
    let before: Vec<Vec<u8>> = (0..1024).map(|page| from.page(page)).collect();
    let file = tempfile::tempfile().unwrap();
    let (saved, seen) = save_running(&from, &file);
    saved.unwrap();
    // The guest wrote everything meanwhile, discarded memory too.
    assert!((0..1024).all(|page| from.page(page) == [0xbb; 4096]));
    assert_eq!(seen.status, Status::Completed);
    assert_eq!((seen.normal, seen.duplicate), (32 + 10 + 2, 4));
    let to = Side::new(&[1, 4, 5]);
    restore_from(&to, &file).unwrap();
    for (page, before) in before.iter().enumerate() {
        let page = page as u64;
        let expected = if (640..643).contains(&page) { vec![0; 4096] } else { before.clone() };
        assert_eq!(to.page(page), expected, "page {page}");
    }
    assert_eq!(to.held(), (42, 2));
}

#[test]
fn a_snapshot_that_cannot_be_written_lets_the_guest_go_on() {
    let from = filled();
    // Read-only: the first write fails, with the guest stopped or not.
    let path = tempfile::NamedTempFile::new().unwrap();
    let file = File::open(path.path()).unwrap();
    let (saved, seen) = save_running(&from, &file);
    assert!(saved.is_err());
    assert_eq!(seen.status, Status::Failed);
    assert!((0..1024).all(|page| from.page(page) == [0xbb; 4096]));
}

#[test]
fn a_cancel_is_noticed_while_memory_that_others_write_is_saved() {
    let region = memfd(4 * BLOCK);
    fill(&region, 0..4 * BLOCK / PAGE, 7);
    let options = BlockOptions { written_elsewhere: true, ..BlockOptions::migratable() };
    let mut blocks = RamBlocks::new();
    blocks.register(Arc::new(migration_block("ram", &region, 4 * BLOCK, options))).unwrap();
    let progress = Arc::new(Progress::new());
    progress.cancel();
    let guest = StopsAndRuns::default();
    let snapshot = BackgroundSnapshot {
        configuration: Configuration::new("test"),
        blocks: &blocks,
        devices: &mut NoDevices,
        guest: &guest,
        progress: Arc::clone(&progress),
    };
    let error = save_in_background(snapshot, &tempfile::tempfile().unwrap()).unwrap_err();
    assert!(matches!(error, MigrationError::Cancelled), "{error}");
    assert_eq!(*guest.0.lock().unwrap(), ["stop", "run"]);
    let seen = progress.snapshot();
    assert_eq!((seen.normal, seen.status), (0, Status::Cancelled));
}

/// Notes what is asked of it.
#[derive(Default)]
struct StopsAndRuns(std::sync::Mutex<Vec<&'static str>>);

impl Guest for StopsAndRuns {
    fn stop(&self) -> Result<(), String> {
        self.0.lock().unwrap().push("stop");
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        self.0.lock().unwrap().push("run");
        Ok(())
    }
}
