//! Memory that the file does not have, since both sides share it (x-ignore-shared).

use super::lazy::NoFailure;
use super::*;
use crate::inspect::inspect;
use crate::ram::{BlockOptions, RamBlocks};
use crate::stream::CAPABILITY_IGNORE_SHARED;
use crate::test_support::migration_block;

fn configuration() -> Configuration {
    let capabilities = vec![CAPABILITY_IGNORE_SHARED.to_owned()];
    Configuration { capabilities, ..Configuration::new("test") }
}

/// A side whose region is a file that the other side has, too, as far as it is `shared`.
fn side(region: &File, shared: bool) -> Side {
    let boot = memfd(BLOCK);
    let mut blocks = RamBlocks::new();
    let options = BlockOptions { shared, ..BlockOptions::migratable() };
    blocks.register(Arc::new(migration_block("vmem0", region, 16 * BLOCK, options))).unwrap();
    let own = BlockOptions::migratable();
    blocks.register(Arc::new(migration_block("ram", &boot, BLOCK, own))).unwrap();
    Side { region: region.try_clone().unwrap(), boot, blocks: Arc::new(blocks), manager: None }
}

fn saved(from: &Side, background: bool) -> File {
    let file = tempfile::tempfile().unwrap();
    let progress = Arc::new(Progress::new());
    let (configuration, blocks, devices) = (configuration(), &*from.blocks, &mut NoDevices);
    if background {
        let guest = &Writes(Arc::clone(from.blocks.get("ram").unwrap().mapping()));
        let running = RunningGuest { configuration, blocks, devices, guest, progress };
        save_in_background(running, &file).unwrap();
    } else {
        let io = FileIo::default();
        save(StoppedGuest { configuration, blocks, devices, io, progress }, &file).unwrap();
    }
    file
}

/// Writes to what it does not share as soon as it runs again.
struct Writes(Arc<HostMapping>);

impl Guest for Writes {
    fn stop(&self) -> Result<(), String> {
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        self.0.write(3 * PAGE, &[0xbb; PAGE as usize]);
        Ok(())
    }
}

fn restored(to: &Side, file: &File, configuration: Configuration) -> Result<(), MigrationError> {
    let progress = Arc::new(Progress::new());
    let (blocks, devices) = (Arc::clone(&to.blocks), &mut NoDevices);
    let io = FileIo::default();
    restore(Restore { configuration, blocks, devices, io, progress }, file)
}

#[test]
fn shared_memory_is_not_in_a_snapshot_and_stays_as_it_is() {
    let region = memfd(16 * BLOCK);
    fill(&region, 0..100, 7);
    for background in [false, true] {
        let (from, to) = (side(&region, true), side(&region, true));
        fill(&from.boot, 3..5, 5);
        let file = saved(&from, background);
        let seen = inspect(&file);
        assert!(seen.error.is_none(), "{:?}", seen.error);
        let blocks: Vec<_> = seen.blocks.iter().map(|b| (&*b.id, b.addr, b.normal)).collect();
        assert_eq!(blocks, [("vmem0", Some(1 << 32), 0), ("ram", Some(1 << 32), 2)]);
        restored(&to, &file, configuration()).unwrap();
        assert_eq!(to.resident(), (100, 2));
        assert_eq!(to.page(99), [7; 4096]);
        let mut boot = [0; PAGE as usize];
        to.boot.read_exact_at(&mut boot, 3 * PAGE).unwrap();
        assert_eq!(boot, [5; PAGE as usize], "as it was when the guest was stopped");

        let lazily = side(&region, true);
        let what = Restore {
            configuration: configuration(),
            blocks: Arc::clone(&lazily.blocks),
            devices: &mut NoDevices,
            io: FileIo::default(),
            progress: Arc::new(Progress::new()),
        };
        restore_lazily(what, Arc::new(file), Arc::new(NoFailure)).unwrap().wait().unwrap();
        assert_eq!(lazily.resident(), (100, 2));
    }
}

#[test]
fn a_block_without_pages_is_refused_where_it_is_not_shared() {
    let region = memfd(16 * BLOCK);
    fill(&region, 0..100, 7);
    let file = saved(&side(&region, true), false);
    let error = restored(&side(&memfd(16 * BLOCK), false), &file, configuration()).unwrap_err();
    assert!(error.to_string().contains("offset of a bitmap"), "{error}");
    // Nor are pages taken for a block that is shared here.
    let file = saved(&side(&region, false), false);
    let error = restored(&side(&region, true), &file, configuration()).unwrap_err();
    let expected = "place of the pages of a block that both sides share";
    assert!(error.to_string().contains(expected), "{error}");
    let error = restored(&side(&region, false), &file, Configuration::new("test")).unwrap_err();
    assert!(error.to_string().starts_with("capabilities: "), "{error}");
}

#[test]
fn without_the_capability_no_block_is_without_pages() {
    let region = memfd(16 * BLOCK);
    fill(&region, 0..100, 7);
    let from = side(&region, false);
    let file = tempfile::tempfile().unwrap();
    save_to(&from, &file).0.unwrap();
    // The header of the first block: after its id and length.
    let mut start = vec![0; 400];
    file.read_exact_at(&mut start, 0).unwrap();
    let id = start.windows(6).position(|bytes| bytes == b"\x05vmem0").unwrap();
    file.write_all_at(&[0; 16], id as u64 + 6 + 8 + 12).unwrap();
    let to = side(&memfd(16 * BLOCK), false);
    let error = restore_from(&to, &file).unwrap_err().to_string();
    assert!(error.contains("offset of a bitmap"), "{error}");
    assert!(inspect(&file).error.is_some());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn garbled_files_leave_shared_memory_as_it_is(at in 0usize..250, byte in any::<u8>()) {
        let region = memfd(16 * BLOCK);
        fill(&region, 0..100, 7);
        let file = saved(&side(&region, true), false);
        file.write_all_at(&[byte], at as u64).unwrap();
        let to = side(&region, true);
        let _ = restored(&to, &file, configuration());
        prop_assert_eq!((to.resident().0, to.page(50)), (100, vec![7; PAGE as usize]));
    }
}
