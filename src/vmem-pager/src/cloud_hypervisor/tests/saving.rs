use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;

use migration::inspect::{Warning, inspect};
use small_vmm::cloud_hypervisor::guest::PAGE;
use small_vmm::cloud_hypervisor::source::{self, Outcome, Trap};
use small_vmm::cloud_hypervisor::{Command, Guest};

use super::ways::{COMMANDS, quick, saved};
use crate::cli::report::Report;
use crate::cloud_hypervisor::channel::Peer;
use crate::cloud_hypervisor::image::SavedGuest;
use crate::cloud_hypervisor::save::save;
use crate::error::PagerError;
use crate::image::PageReader;
use crate::image::writer::NewFile;
use crate::run::Run;

/// All memory that an image has, by address.
fn memory_of(saved: &SavedGuest) -> Vec<(u64, Vec<u8>)> {
    let mut reader = PageReader::new(saved.image());
    let mappings = saved.layout().mappings.iter().enumerate();
    let memory = mappings.map(|(index, mapping)| {
        let mut bytes = vec![0; mapping.range.len() as usize];
        let block = saved.block(index);
        for run in block.present().runs(0..block.nr_pages()) {
            reader
                .read(block, run, |page, content| {
                    if let Some(content) = content {
                        bytes[(page * PAGE) as usize..][..PAGE as usize].copy_from_slice(content);
                    }
                })
                .unwrap();
        }
        (mapping.range.start(), bytes)
    });
    memory.collect()
}

#[test]
fn a_saved_guest_is_whole_and_only_then_its_sender_ends() {
    let dir = tempfile::tempdir().unwrap();
    for (paused, ack_early) in [(false, false), (true, false), (false, true)] {
        let path = dir.path().join("image");
        let mut guest = Guest::new();
        guest.paused = paused;
        let before = guest.resident();
        let (done, outcome) = saved(&guest, Trap::None, &path, ack_early, &Run::new(None));
        done.unwrap();
        assert_eq!(outcome, Outcome::Ended);
        let image = SavedGuest::open(&path).unwrap();
        assert_eq!(image.config(), guest.config().to_string().as_bytes());
        assert_eq!(image.state(), guest.state().to_string().as_bytes());
        assert_eq!(image.is_paused(), paused);
        // What was written after Config is in it, and the block that is not plugged is not.
        assert_eq!(memory_of(&image), guest.memory());
        assert_eq!(image.image().present_bytes(), 9 * PAGE);
        // Its reading filled no hole of the guest's: the sender wrote one page more.
        assert_eq!(guest.resident(), before + PAGE);
        assert!(fs::metadata(&path).unwrap().blocks() * 512 < 1 << 20, "the image is sparse");
    }
}

#[test]
fn an_image_is_inspected_as_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let guest = Guest::new();
    saved(&guest, Trap::None, &path, false, &Run::new(None)).0.unwrap();
    let seen = inspect(&File::open(&path).unwrap());
    assert!(seen.error.is_none(), "{:?}", seen.error);
    assert!(
        !seen.warnings.iter().any(|it| !matches!(it, Warning::NoSizes { .. })),
        "{:?}",
        seen.warnings
    );
    assert_eq!(seen.configuration.machine, "cloud-hypervisor");
    let [device] = &seen.virtio_mem[..] else { panic!("{:?}", seen.virtio_mem) };
    assert_eq!((device.path.as_str(), device.plugged_size), ("hot/vmem", 6 << 20));
    assert_eq!(device.requested_size, Some(8 << 20));
    assert_eq!(device.ram_block.as_deref(), Some("hot/vmem/0x100000000"));
    let ids: Vec<&str> = seen.blocks.iter().map(|block| block.id.as_str()).collect();
    assert_eq!(ids, ["boot/0x0", "boot/0xc0000000", "hot/vmem/0x100000000"]);
    // What is plugged, and what is resident: blocks 0 and 1, and block 5.
    let plugged: Vec<_> = device.plugged().map(|range| (range.start(), range.len())).collect();
    assert_eq!(plugged, [(0, 4 << 20), (10 << 20, 2 << 20)]);
    let pages: Vec<_> = seen.blocks.iter().map(|it| (it.normal, it.zero, it.absent)).collect();
    assert_eq!(pages, [(3, 0, 1021), (2, 0, 510), (4, 0, 4092)]);
}

/// Whatever a sender does wrong, it keeps its guest, and there is no image.
fn refused(trap: Trap) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let (done, outcome) = saved(&Guest::new(), trap, &path, false, &quick());
    let error = done.expect_err(&format!("{trap:?}"));
    assert_eq!(outcome, Outcome::Continues, "{trap:?}: {error}");
    assert!(!path.exists(), "{trap:?}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{trap:?}");
    error.to_string()
}

#[test]
fn a_sender_that_breaks_off_anywhere_keeps_its_guest() {
    for command in COMMANDS {
        assert!(refused(Trap::CloseBefore(command)).contains("closed the connection"));
        assert!(refused(Trap::SilentBefore(command)).contains("is silent"));
        assert!(refused(Trap::AbandonBefore(command)).contains("broken off"));
        assert!(refused(Trap::UnknownBefore(command)).contains("command 77"));
    }
    for command in [Command::Start, Command::Config, Command::State, Command::Complete] {
        assert!(refused(Trap::CutIn(command)).contains("closed the connection"));
    }
    for command in [Command::Config, Command::State] {
        assert!(refused(Trap::CutPayload(command)).contains("closed the connection"));
    }
}

#[test]
fn what_a_sender_may_not_send_is_refused() {
    for (trap, what) in [
        (Trap::Twice(Command::Start), "Start came where"),
        (Trap::Twice(Command::MemoryFd), "slot 7 came twice"),
        (Trap::Twice(Command::Config), "Config came where State"),
        (Trap::Twice(Command::State), "State came where Complete"),
        (Trap::OneMessage, "slot 7 came with no descriptor"),
        (Trap::NoDescriptor, "slot 7 came with no descriptor"),
        (Trap::TwoDescriptors, "slot 7 came with no descriptor, or with more"),
        (Trap::Socket, "not of a memfd or file"),
        (Trap::Short, "expected 0x1000000 at least"),
        (Trap::MissingSlot, "slot 7, for which no descriptor came"),
        (Trap::FurtherSlot, "slot 1000, which no mapping has"),
        (Trap::OtherVersion, "version 1"),
        (Trap::BadConfig, "the Config is not what"),
        (Trap::Overlap, "overlaps"),
        (Trap::SlashInZone, "no slash"),
        (Trap::BadState, "the State is not what"),
        (Trap::NoDevice, "the State has nothing of its virtio-mem device"),
        (Trap::OtherPluggedSize, "bytes of plugged blocks, and says 0x1000"),
        (Trap::OtherRegion, "has its region at 0x1000"),
        (Trap::FewerBlocks, "tells of 7 blocks; expected 8"),
    ] {
        let error = refused(trap);
        assert!(error.contains(what), "{trap:?}: {error}");
    }
}

#[test]
fn a_signal_leaves_the_guest_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    fs::write(&path, "what was there").unwrap();
    let run = Run::new(None);
    run.interrupt();
    let (done, outcome) = saved(&Guest::new(), Trap::None, &path, false, &run);
    assert!(matches!(done, Err(PagerError::Interrupted)));
    assert_eq!(outcome, Outcome::Continues);
    assert_eq!(fs::read(&path).unwrap(), b"what was there");
}

#[test]
fn an_image_that_is_damaged_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    saved(&Guest::new(), Trap::None, &path, false, &Run::new(None)).0.unwrap();
    let bytes = fs::read(&path).unwrap();
    let find = |what: &str| {
        let found = bytes.windows(what.len()).position(|bytes| bytes == what.as_bytes());
        found.unwrap() as u64
    };
    for (at, with, expected) in [
        (find("\"guest_ram_mappings\""), "\"guest_ram_mapping_\"", "the Config is not what"),
        (find("\"gpa\":3221225472"), "\"gpa\":3221229568", "\"boot/0xc0001000\" is missing"),
        (find("\"plugged_size\\\":6291456"), "\"plugged_size\\\":4194304", "and says 0x400000"),
        (
            find("\"bitmap\\\":[true,true,false,"),
            "\"bitmap\\\":[true,false,true,",
            "differ in what is plugged",
        ),
        (find("cloud-hypervisor/state"), "cloud-hypervisor/stage", "damaged"),
    ] {
        let damaged = dir.path().join("damaged");
        fs::copy(&path, &damaged).unwrap();
        let file = File::options().write(true).open(&damaged).unwrap();
        // The text is of JSON within JSON: as long as before.
        file.write_all_at(with.as_bytes(), at).unwrap();
        let error = SavedGuest::open(&damaged).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

/// What an early acknowledgement risks.
#[test]
fn what_is_acknowledged_early_is_written_from_what_this_side_holds() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let guest = Guest::new();
    let expected = guest.memory();
    let (near, far) = UnixStream::pair().unwrap();
    let (ended, wait) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            let outcome = source::send(far, &guest, Trap::None);
            // Its process has ended: only the descriptors that it handed over are left.
            drop(guest);
            ended.send(outcome).unwrap();
        });
        let peer = Peer::new(near.into()).unwrap();
        let run = Run::new(None);
        // Nothing ends it any more.
        let hold = std::sync::Arc::clone(&run);
        save(&peer, NewFile::create(&path).unwrap(), true, &run, &Report::silent()).unwrap();
        hold.interrupt();
        hold.check("").unwrap();
    });
    assert_eq!(wait.recv(), Ok(Outcome::Ended));
    let image = SavedGuest::open(&path).unwrap();
    let mut found = memory_of(&image);
    // What the guest wrote after Config.
    for (gpa, page, seed) in [(0, 1, 77), (4u64 << 30, 1, 78)] {
        let (_, bytes) = found.iter_mut().find(|(base, _)| *base == gpa).unwrap();
        let place = &mut bytes[page * PAGE as usize..][..PAGE as usize];
        assert!(*place == small_vmm::cloud_hypervisor::content(seed));
        place.fill(0);
    }
    let mut expected = expected;
    for (_, bytes) in expected.iter_mut().filter(|(base, _)| [0, 4 << 30].contains(base)) {
        bytes[PAGE as usize..2 * PAGE as usize].fill(0);
    }
    assert!(found == expected);
}

#[test]
fn a_guest_that_is_lost_after_an_early_acknowledgement_is_said_to_be() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let guest = Guest::new();
    let (near, far) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let sending = scope.spawn(|| source::send(far, &guest, Trap::None));
        let peer = Peer::new(near.into()).unwrap();
        let file = NewFile::create(&path).unwrap();
        // The image cannot get its name.
        fs::create_dir(&path).unwrap();
        let error = save(&peer, file, true, &Run::new(None), &Report::silent()).unwrap_err();
        assert!(error.to_string().contains("the guest is lost"), "{error}");
        assert!(error.to_string().contains("cannot finish"), "{error}");
        assert_eq!(error.exit_status(), 1);
        assert_eq!(sending.join().unwrap(), Outcome::Ended);
    });
    // Without it the same failure costs nothing.
    let (near, far) = UnixStream::pair().unwrap();
    let path = dir.path().join("other");
    thread::scope(|scope| {
        let sending = scope.spawn(|| source::send(far, &guest, Trap::None));
        let peer = Peer::new(near.into()).unwrap();
        let file = NewFile::create(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let error = save(&peer, file, false, &Run::new(None), &Report::silent()).unwrap_err();
        assert!(!error.to_string().contains("lost"), "{error}");
        assert_eq!(sending.join().unwrap(), Outcome::Continues);
    });
}

#[test]
fn a_signal_before_an_early_acknowledgement_leaves_the_guest_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let run = Run::new(None);
    let (near, far) = UnixStream::pair().unwrap();
    let guest = Guest::new();
    thread::scope(|scope| {
        let sending = scope.spawn(|| source::send(far, &guest, Trap::None));
        let peer = Peer::new(near.into()).unwrap();
        let path = dir.path().join("image");
        let file = NewFile::create(&path).unwrap();
        // The event is told when all but the answer is done.
        let report = Report::to(Box::new(Interrupt(run.clone())), Box::new(std::io::sink()), true);
        let error = save(&peer, file, true, &run, &report).unwrap_err();
        assert!(matches!(error, PagerError::Interrupted), "{error}");
        assert_eq!(sending.join().unwrap(), Outcome::Continues);
        assert!(!path.exists());
    });
}

/// Interrupts a run that tells something.
struct Interrupt(std::sync::Arc<Run>);

impl std::io::Write for Interrupt {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.interrupt();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
