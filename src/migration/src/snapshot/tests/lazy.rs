//! Restores whose guest runs before its memory is there.

use super::*;
use crate::test_support::wait_until;

/// Panics: in these tests every fault can be answered.
pub(super) struct NoFailure;

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
        io: FileIo::default(),
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
        io: FileIo::default(),
        progress: Arc::clone(&progress),
    };
    restore_lazily(what, file, Arc::new(NoFailure)).unwrap().wait().unwrap();
    assert_eq!(to.resident(), (42, 2));
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
        io: FileIo::default(),
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
        io: FileIo::default(),
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
    wait_until(|| !failed.0.lock().unwrap().is_empty());
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
    fn save(&mut self, _phase: DevicePhase) -> Result<Vec<DeviceSection>, MigrationError> {
        Ok(Vec::new())
    }

    fn load(
        &mut self,
        _header: &SectionHeader,
        _phase: DevicePhase,
        _reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        Ok(())
    }

    fn loaded(&mut self) -> Result<(), MigrationError> {
        self.0.set_len(4096).unwrap();
        Ok(())
    }
}

/// A guest of which nothing is read that is not touched, once its block state is followed.
fn followed(to: &Side, file: &Arc<File>) -> LazyRestore {
    let progress = Arc::new(Progress::new());
    progress.cancel();
    let what = Restore {
        configuration: Configuration::new("test"),
        blocks: Arc::clone(&to.blocks),
        devices: &mut NoDevices,
        io: FileIo::default(),
        progress,
    };
    let restored = restore_lazily(what, Arc::clone(file), Arc::new(NoFailure)).unwrap();
    assert_eq!(to.device().plug(2).unwrap_err(), "block state is frozen");
    restored.follow().unwrap();
    restored
}

#[test]
fn what_is_plugged_is_not_read_from_the_file_and_what_is_unplugged_is_not_waited_for() {
    let file = Arc::new(tempfile::tempfile().unwrap());
    save_to(&filled(), &file).0.unwrap();
    let to = Side::elastic(&[1, 4, 5]);
    let restored = followed(&to, &file);
    let device = to.device();
    device.unplug(1, &to.region).unwrap();
    assert_eq!(restored.outstanding(), 44 - 32);
    device.unplug(5, &to.region).unwrap();
    device.plug(1).unwrap();
    device.plug(2).unwrap();
    let region = to.blocks.get("vmem0").unwrap().mapping();
    assert_eq!([64, 95, 130].map(|page| region_byte(region, page)), [0; 3]);
    region.write(70 * PAGE, &[0x77; PAGE as usize]);
    assert_eq!([300, 309].map(|page| region_byte(region, page)), [8; 2]);
    device.unplug(4, &to.region).unwrap();
    // A guest that touches what it has unplugged.
    region.write(320 * PAGE, &[1]);
    let boot = to.blocks.get("ram").unwrap().mapping();
    assert_eq!([3, 4].map(|page| region_byte(boot, page)), [5; 2]);
    restored.wait().unwrap();
    assert_eq!((restored.outstanding(), to.leaked()), (0, vec![]));
    assert_eq!((to.page(70)[0], to.page(64)[0]), (0x77, 0));
    drop(restored);
    device.plug(4).unwrap();
}

#[test]
fn a_guest_whose_device_cannot_be_followed_is_frozen_until_all_was_read() {
    let file = Arc::new(tempfile::tempfile().unwrap());
    save_to(&filled(), &file).0.unwrap();
    let to = Side::new(&[1, 4, 5]);
    let restored = followed(&to, &file);
    assert_eq!(to.device().plug(2).unwrap_err(), "block state is frozen");
    let mapping = |id| to.blocks.get(id).unwrap().mapping();
    for page in (64..96).chain(300..310) {
        region_byte(mapping("vmem0"), page);
    }
    for page in [3, 4] {
        region_byte(mapping("ram"), page);
    }
    restored.wait().unwrap();
    to.device().plug(2).unwrap();
}
