//! Blocks whose used length changes, as firmware's.

use super::handlers::run;
use super::*;
use crate::lazy::HandlerFailed;
use crate::postcopy::SwitchWhen;
use crate::snapshot::{
    FileIo, Restore, RunningGuest, StoppedGuest, restore, restore_lazily, save, save_in_background,
};

/// A side with such a block of `size` bytes, `used` of which are in use.
fn side(size: u64, used: u64, keep_resident: bool) -> Side {
    let file = memfd(size);
    let resizable = Some(used);
    let options = BlockOptions { resizable, keep_resident, ..BlockOptions::migratable() };
    let mut blocks = RamBlocks::new();
    blocks.register(Arc::new(migration_block("vmem0", &file, size, options))).unwrap();
    Side { region: file, boot: memfd(PAGE), blocks: Arc::new(blocks), manager: None }
}

fn used(side: &Side) -> u64 {
    side.blocks.get("vmem0").unwrap().used_length()
}

/// A source with 32 pages in use, most of them zeros, and destinations with less and more.
fn sides() -> (Side, [Side; 2]) {
    let from = side(BLOCK, 32 * PAGE, false);
    fill(&from.region, 3..5, 0xaa);
    fill(&from.region, 31..32, 0xbb);
    (from, [side(2 * BLOCK, 4 * PAGE, false), side(BLOCK, 64 * PAGE, false)])
}

fn assert_followed(to: &Side) {
    assert_eq!(used(to), 32 * PAGE);
    assert_eq!([to.page(4), to.page(31)], [[0xaa; 4096], [0xbb; 4096]]);
    assert_eq!(to.resident().0, 3);
}

#[test]
fn precopy_and_postcopy_follow_the_source_s_length() {
    for when in [None, Some(SwitchWhen::AtOnce), Some(SwitchWhen::Rounds(0))] {
        let (from, destinations) = sides();
        for to in destinations {
            let (sent, received) = run(&from, &to, [&[], &[]], when);
            sent.unwrap();
            received.unwrap();
            assert_followed(&to);
        }
    }
}

#[test]
fn what_a_destination_kept_past_its_end_is_not_the_source_s() {
    let (from, _) = sides();
    let to = side(BLOCK, 4 * PAGE, true);
    fill(&to.region, 0..64, 0xee);
    let (sent, received) = run(&from, &to, [&[], &[]], None);
    sent.unwrap();
    received.unwrap();
    assert_eq!(used(&to), 32 * PAGE);
    assert_eq!([to.page(3), to.page(20)], [[0xaa; 4096], [0; 4096]]);
}

#[test]
fn snapshots_and_restores_follow_it_eager_and_lazy() {
    let configuration = || Configuration::new("test");
    for background in [false, true] {
        let (from, destinations) = sides();
        let file = Arc::new(tempfile::tempfile().unwrap());
        let progress = Arc::new(Progress::new());
        let (blocks, devices) = (&*from.blocks, &mut NoDevices);
        let configured = configuration();
        if background {
            let (configuration, guest) = (configured, &Witness::default());
            let running = RunningGuest { configuration, blocks, devices, guest, progress };
            save_in_background(running, &file).unwrap();
        } else {
            let configuration = configured;
            let io = FileIo::default();
            save(StoppedGuest { configuration, blocks, devices, io, progress }, &file).unwrap();
        }
        let what = |to: &Side| (Arc::clone(&to.blocks), Arc::new(Progress::new()));
        let (blocks, progress) = what(&destinations[0]);
        let (configuration, devices) = (configuration(), &mut NoDevices);
        let eager = Restore { configuration, blocks, devices, io: FileIo::default(), progress };
        restore(eager, &file).unwrap();
        assert_followed(&destinations[0]);

        let (blocks, progress) = what(&destinations[1]);
        let (configuration, devices) = (Configuration::new("test"), &mut NoDevices);
        let lazy = Restore { configuration, blocks, devices, io: FileIo::default(), progress };
        let guest = Arc::new(Witness::default()) as Arc<dyn HandlerFailed>;
        let restored = restore_lazily(lazy, Arc::clone(&file), guest).unwrap();
        let block = destinations[1].blocks.get("vmem0").unwrap();
        let migrating = BlockError::Migrating { id: "vmem0".to_owned() };
        assert_eq!(block.resize(PAGE), Err(migrating));
        restored.wait().unwrap();
        assert_followed(&destinations[1]);
        block.resize(PAGE).unwrap();
    }
}

#[test]
fn a_length_is_changed_within_its_limits_and_not_while_it_migrates() {
    let (from, [to, _]) = sides();
    let block = Arc::clone(from.blocks.get("vmem0").unwrap());
    for wrong in [BLOCK + PAGE, 100, PAGE + 1] {
        let error = block.resize(wrong).unwrap_err().to_string();
        let expected = format!("cannot have {wrong:#x} bytes: at most 0x40000 are possible");
        assert!(error.contains(&expected), "{error}");
    }
    let fixed = Side::new(&[]);
    let error = fixed.blocks.get("ram").unwrap().resize(PAGE).unwrap_err().to_string();
    assert_eq!(error, "RAM block \"ram\" was not registered as resizable");

    block.resize(40 * PAGE).unwrap();
    let seen = Arc::new(Mutex::new(None));
    let (tell, resized) = (Arc::clone(&seen), Arc::clone(&block));
    let last_words: Box<dyn FnOnce() + Send> =
        Box::new(move || *tell.lock().unwrap() = Some(resized.resize(64 * PAGE)));
    let source = Witness { last_words: Mutex::new(Some(last_words)), ..Witness::default() };
    let run = migrate(&from, &to, &Script::default(), source);
    run.outgoing.unwrap();
    run.incoming.unwrap();
    let migrating = BlockError::Migrating { id: "vmem0".to_owned() };
    assert_eq!(seen.lock().unwrap().take(), Some(Err(migrating)));
    assert_eq!((used(&from), used(&to)), (40 * PAGE, 40 * PAGE));
    // Afterwards it may be changed again, on both sides.
    for side in [&from, &to] {
        side.blocks.get("vmem0").unwrap().resize(64 * PAGE).unwrap();
    }
}

#[test]
fn a_length_that_changed_since_it_was_listed_is_refused() {
    let (from, _) = sides();
    let progress = Arc::new(Progress::new());
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Script>::default() };
    let options = ListOptions::default();
    let ram = RamSave::new(&from.blocks, options, Arc::clone(&progress), tracker).unwrap();
    from.blocks.get("vmem0").unwrap().resize(64 * PAGE).unwrap();
    let (near, _far) = UnixStream::pair().unwrap();
    let outgoing = Outgoing {
        parameters: parameters(),
        guest: &Witness::default(),
        handlers: vec![Box::new(ram)],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    let error = outgoing.run(Channel::new(near, progress).unwrap()).unwrap_err().error.to_string();
    assert_eq!(error, "RAM block \"vmem0\": length 0x20000 in the stream, 0x40000 here");
}
