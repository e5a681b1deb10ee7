mod background;
mod disk;
mod lazy;
mod resizes;
mod shared;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use proptest::prelude::*;

use super::*;
use crate::MigrationError;
use crate::devices::{DevicePhase, DeviceSection, Devices, NoDevices};
use crate::huge_page_pool::Pool;
use crate::lazy::HandlerFailed;
use crate::precopy::Guest;
use crate::progress::{self, Progress, Status};
use crate::ram::{BlockOptions, RamBlocks};
use crate::stream::{
    RAM_SECTION, RAM_VERSION, SectionHeader, SectionKind, put_continued, put_end_of_section,
    put_eof, put_footer, put_header, put_section,
};
use crate::test_support::{BLOCK, Log, PAGE, Side, TestManager, fill, memfd, migration_block};
use background::save_running_while;
use lazy::NoFailure;
use ram_discard::memory::HostMapping;
use std::sync::Arc;
use vmstate::wire::WireRead;

const IO: FileIo = FileIo { threads: 3, direct: true };

fn save_to(side: &Side, file: &File) -> (Result<(), MigrationError>, progress::MigrationInfo) {
    save_with(side, file, IO)
}

fn save_with(
    side: &Side,
    file: &File,
    io: FileIo,
) -> (Result<(), MigrationError>, progress::MigrationInfo) {
    let progress = Arc::new(Progress::new());
    let stopped = StoppedGuest {
        configuration: Configuration::new("test"),
        blocks: &side.blocks,
        devices: &mut NoDevices,
        io,
        progress: Arc::clone(&progress),
    };
    (save(stopped, file), progress.snapshot())
}

fn restore_from(side: &Side, file: &File) -> Result<(), MigrationError> {
    restore_with(side, file, IO)
}

fn restore_with(side: &Side, file: &File, io: FileIo) -> Result<(), MigrationError> {
    let what = Restore {
        configuration: Configuration::new("test"),
        blocks: Arc::clone(&side.blocks),
        devices: &mut NoDevices,
        io,
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
    let before = from.resident();
    let (saved, seen) = save_to(&from, &file);
    saved.unwrap();
    assert_eq!(from.resident(), before);
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
    assert_eq!(to.resident(), (42, 2));
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
    assert_eq!(to.resident().0, pages);
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

/// A block of three huge pages, which takes none until it is loaded.
fn side_of_huge_pages() -> std::io::Result<RamBlocks> {
    use rustix::fs::MemfdFlags;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = File::from(rustix::fs::memfd_create("huge", flags)?);
    file.set_len(6 << 20)?;
    let mut blocks = RamBlocks::new();
    let block = migration_block("vmem0", &file, 6 << 20, BlockOptions::migratable());
    blocks.register(Arc::new(block)).map_err(std::io::Error::other)?;
    Ok(blocks)
}

#[test]
fn a_pool_without_huge_pages_refuses_a_restore() {
    let pool = match Pool::with_free(2 << 20, 1) {
        Ok(pool) => pool,
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let from = Side::of_region(6 << 20);
    fill(&from.region, 3..4, 7);
    fill(&from.region, 1000..1001, 8);
    let file = memfd(0);
    save_to(&from, &file).0.unwrap();
    let blocks = Arc::new(side_of_huge_pages().unwrap());
    let mapping = || blocks.get("vmem0").unwrap().mapping();
    let byte = |page| {
        let mut byte = [0];
        mapping().read(page * PAGE, &mut byte);
        byte[0]
    };
    // The page that is free is another's before: two are needed, and this one is to be had.
    mapping().write(1500 * PAGE, &[9]);
    assert_eq!(pool.free(), 0);
    let (region, boot) = (memfd(0), memfd(0));
    let side = Side { region, boot, blocks: Arc::clone(&blocks), manager: None };
    let failed = Arc::new(NoFailure);
    let lazily = || {
        let what = Restore {
            configuration: Configuration::new("test"),
            blocks: Arc::clone(&blocks),
            devices: &mut NoDevices,
            io: IO,
            progress: Arc::new(Progress::new()),
        };
        let file = Arc::new(file.try_clone().unwrap());
        restore_lazily(what, file, Arc::clone(&failed) as Arc<_>).map(drop)
    };
    for refused in [restore_from(&side, &file), lazily()] {
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("\"vmem0\": cannot take huge pages"), "{error}");
        assert!(error.contains("needs 2 huge pages of 2048 KiB, of which 1 are"), "{error}");
        // Nothing was discarded for it.
        assert_eq!((byte(1500), pool.free()), (9, 0));
    }
    // What it held is discarded first, and is to be had again.
    pool.make_free(1).unwrap();
    restore_from(&side, &file).unwrap();
    assert_eq!((pool.free(), [3, 1000, 4].map(byte)), (0, [7, 8, 0]));
    pool.make_free(1).unwrap();
    assert_eq!(byte(1500), 0);
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
        assert_eq!(to.resident(), (0, 0));
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
fn a_file_without_a_list_of_ram_blocks_is_refused() {
    let mut bytes = Vec::new();
    put_header(&mut bytes, &with_mapped_ram(&Configuration::new("test")));
    let (idstr, kind) = (RAM_SECTION.to_owned(), SectionKind::Start);
    let (section_id, instance_id, version_id) = (0, 0, RAM_VERSION);
    put_section(&mut bytes, &SectionHeader { kind, section_id, idstr, instance_id, version_id });
    put_end_of_section(&mut bytes);
    put_footer(&mut bytes, section_id);
    put_continued(&mut bytes, SectionKind::End, section_id);
    put_end_of_section(&mut bytes);
    put_footer(&mut bytes, section_id);
    put_eof(&mut bytes);
    let file = memfd(0);
    file.write_all_at(&bytes, 0).unwrap();
    let error = restore_from(&Side::new(&[1]), &file).unwrap_err();
    assert!(matches!(error, MigrationError::NoRam), "{error}");
    let to = Side::new(&[1]);
    let what = Restore {
        configuration: Configuration::new("test"),
        blocks: Arc::clone(&to.blocks),
        devices: &mut NoDevices,
        io: IO,
        progress: Arc::new(Progress::new()),
    };
    let restored = restore_lazily(what, Arc::new(file), Arc::new(NoFailure));
    assert!(matches!(restored, Err(MigrationError::NoRam)));
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
    fn save(&mut self, phase: DevicePhase) -> Result<Vec<DeviceSection>, MigrationError> {
        if phase == DevicePhase::Late {
            self.0.lose_freezes();
        }
        NoDevices.save(phase)
    }

    fn load(
        &mut self,
        header: &SectionHeader,
        phase: DevicePhase,
        reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        NoDevices.load(header, phase, reader)
    }

    fn loaded(&mut self) -> Result<(), MigrationError> {
        NoDevices.loaded()
    }
}

#[test]
fn a_freeze_that_was_lost_while_a_stopped_guest_is_saved_leaves_no_snapshot() {
    let from = filled();
    let progress = Arc::new(Progress::new());
    let stopped = StoppedGuest {
        configuration: Configuration::new("test"),
        blocks: &from.blocks,
        devices: &mut Losing(Arc::clone(from.manager.as_ref().unwrap())),
        io: FileIo::default(),
        progress: Arc::clone(&progress),
    };
    let file = tempfile::tempfile().unwrap();
    assert!(matches!(save(stopped, &file), Err(MigrationError::FreezeLost(_))));
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
