//! Snapshots of a guest that runs.

use super::*;

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

pub(super) fn save_running(
    side: &Side,
    file: &File,
) -> (Result<(), MigrationError>, progress::MigrationInfo) {
    let (result, seen, runs) = save_running_while(side, file, None, Arc::default());
    assert_eq!(runs, 1);
    (result, seen)
}

/// Has `happens` done when the guest runs again; also how often it was let run.
pub(super) fn save_running_while(
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
    let running = RunningGuest {
        configuration: Configuration::new("test"),
        blocks: &side.blocks,
        devices: &mut NoDevices,
        guest: &guest,
        progress: Arc::clone(&progress),
    };
    let result = save_in_background(running, file);
    for thread in guest.threads.into_inner().unwrap() {
        thread.join().unwrap();
    }
    (result, progress.snapshot(), guest.runs.into_inner())
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
    assert_eq!(to.resident(), (42, 2));
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
    let running = RunningGuest {
        configuration: Configuration::new("test"),
        blocks: &blocks,
        devices: &mut NoDevices,
        guest: &guest,
        progress: Arc::clone(&progress),
    };
    let error = save_in_background(running, &tempfile::tempfile().unwrap()).unwrap_err();
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
