//! Pages over channels of their own, beside the main one.

#[cfg(feature = "zstd")]
mod compressed;
mod incoming;

use super::*;
use crate::channel::Sink;
use crate::channel::faulty::Faulty;
use crate::handler::LoadHandler;
use crate::ram::PageChannels;
use crate::stream::{
    CAPABILITY_MULTIFD, Encoding, Greeting, PACKET_PAGES, PacketHead, RAM_VERSION, SectionKind,
    put_end_of_section, put_list, put_multifd_flush,
};
use crate::test_support::{Slow, SlowReader};
use std::io::{Read, Write};
use vmstate::wire::WireReader;

const UUID: [u8; 16] = [0x17; 16];

fn multifd() -> Configuration {
    Configuration {
        capabilities: vec![CAPABILITY_MULTIFD.to_owned()],
        uuid: Some(UUID),
        ..Configuration::new("test")
    }
}

/// Both ends of so many channels.
fn pairs(count: usize) -> (Vec<UnixStream>, Vec<UnixStream>) {
    (0..count).map(|_| UnixStream::pair().unwrap()).unzip()
}

fn channels(streams: Vec<UnixStream>, progress: &Arc<Progress>) -> PageChannels {
    let channel = |stream| Channel::new(stream, Arc::clone(progress)).unwrap();
    PageChannels::new(streams.into_iter().map(channel).collect()).unwrap()
}

/// What both sides came to.
struct Both {
    sent: Result<MigrationInfo, OutgoingError>,
    taken: Outcome,
    source: Vec<&'static str>,
    destination: Vec<&'static str>,
}

/// Migrates over channels that are made for each side's migration.
fn migrate_over_channels(
    (from, to): (&Side, &Side),
    script: &Script,
    source: Witness,
    configuration: Configuration,
    near: impl FnOnce(&Arc<Progress>) -> PageChannels,
    far: impl FnOnce(&Arc<Progress>) -> PageChannels + Send,
) -> Both {
    let both = (configuration.clone(), configuration);
    migrate_configured((from, to), script, source, both, near, far)
}

/// The same, where the two sides may differ.
fn migrate_configured(
    (from, to): (&Side, &Side),
    script: &Script,
    source: Witness,
    (configuration, theirs): (Configuration, Configuration),
    near: impl FnOnce(&Arc<Progress>) -> PageChannels,
    far: impl FnOnce(&Arc<Progress>) -> PageChannels + Send,
) -> Both {
    let (main_near, main_far) = UnixStream::pair().unwrap();
    let destination = Witness::default();
    let (sent, taken) = thread::scope(|scope| {
        let taking = scope.spawn(|| {
            let progress = Arc::new(Progress::new());
            let options = ListOptions::default();
            let ram = RamLoad::new(Arc::clone(&to.blocks), options, Arc::clone(&progress));
            let incoming = Incoming {
                configuration: theirs,
                guest: &destination,
                handlers: vec![Box::new(ram.with_channels(far(&progress)))],
                devices: &mut NoDevices,
                postcopy: None,
                progress: Arc::clone(&progress),
            };
            incoming.run(Channel::new(main_far, progress).unwrap())
        });
        let progress = Arc::new(Progress::new());
        let tracker = |block: &MigrationBlock| -> Box<dyn DirtyTracker> {
            if block.id() == "vmem0" { Box::new(script.clone()) } else { Box::<Script>::default() }
        };
        let options = ListOptions::default();
        let ram = RamSave::new(&from.blocks, options, Arc::clone(&progress), tracker).unwrap();
        let outgoing = Outgoing {
            parameters: Parameters::new(configuration),
            guest: &source,
            handlers: vec![Box::new(ram.with_channels(near(&progress)))],
            devices: &mut NoDevices,
            postcopy: None,
            progress: Arc::clone(&progress),
        };
        let sent = outgoing.run(Channel::new(main_near, Arc::clone(&progress)).unwrap());
        (sent.map(|()| progress.snapshot()), taking.join().unwrap())
    });
    Both { sent, taken, source: source.log(), destination: destination.log() }
}

/// Migrates over so many pairs of sockets.
fn migrate_over(count: usize, sides: (&Side, &Side), script: &Script, source: Witness) -> Both {
    let (near, far) = pairs(count);
    migrate_over_channels(
        sides,
        script,
        source,
        multifd(),
        |progress| channels(near, progress),
        |progress| channels(far, progress),
    )
}

/// A guest of three blocks, which writes to some pages immediately before it stops.
fn guest() -> (Side, Script, Witness) {
    let from = Side::new(&[1, 4, 5]);
    for page in 64..128 {
        fill(&from.region, page..page + 1, page as u8);
    }
    fill(&from.region, 300..310, 8);
    fill(&from.region, 310..314, 0);
    // Written although it is discarded.
    fill(&from.region, 640..643, 9);
    fill(&from.boot, 3..5, 5);
    let script = Script::default();
    let writing = (script.clone(), from.region.try_clone().unwrap());
    let last_words: Box<dyn FnOnce() + Send> = Box::new(move || {
        for page in (64..128).step_by(3) {
            writing.0.write(&writing.1, page, 0x70);
        }
        writing.0.write(&writing.1, 80, 0);
        writing.0.write(&writing.1, 311, 0x31);
        writing.0.write(&writing.1, 700, 0xdd);
    });
    let source = Witness { last_words: Mutex::new(Some(last_words)), ..Witness::default() };
    (from, script, source)
}

#[test]
fn a_guest_goes_over_any_number_of_channels_as_over_one() {
    let mut of_one = None;
    for count in [1, 2, 4, 64] {
        let (from, script, source) = guest();
        let to = Side::new(&[1, 4, 5]);
        fill(&to.region, 64..200, 0xee);
        let before = from.resident();
        let both = migrate_over(count, (&from, &to), &script, source);
        both.taken.unwrap();
        let sent = both.sent.unwrap();
        assert_eq!((both.source.last(), both.destination), (Some(&"stop"), vec!["run"]));
        for page in (64..128).chain(256..384) {
            assert_eq!(to.page(page), from.page(page), "page {page} over {count}");
        }
        let mut boot = vec![0; 4096];
        to.boot.read_exact_at(&mut boot, 4 * PAGE).unwrap();
        assert_eq!(boot, [5; 4096]);
        // Nothing for holes, zeros and what is discarded, at either side.
        assert_eq!(from.resident(), (before.0 + 1, before.1));
        assert_eq!(to.resident(), (64 + 10 + 1 - 1, 2));
        // A thread may look at a page when it was written once more already, and find zeros or content.
        let counted = sent.normal + sent.duplicate;
        assert_eq!(*of_one.get_or_insert(counted), counted);
        assert_eq!((sent.discarded, sent.dirty_while_discarded), (13 * 64, 1));
        // All of it is counted, with a head of 1344 bytes for every packet and barrier.
        assert!(sent.transferred > sent.normal * PAGE, "{}", sent.transferred);
    }
}

#[test]
fn a_section_counts_all_that_its_channels_write_as_a_limit_of_the_bandwidth_has_it() {
    let side = Side::new(&[1, 4, 5]);
    fill(&side.region, 64..128, 7);
    let progress = Arc::new(Progress::new());
    let options = ListOptions::default();
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Script>::default() };
    let ram = RamSave::new(&side.blocks, options, Arc::clone(&progress), tracker).unwrap();
    let (near, far) = pairs(4);
    let mut ram = ram.with_channels(channels(near, &progress));
    let (main, main_far) = UnixStream::pair().unwrap();
    let mut out = Channel::new(main, Arc::clone(&progress)).unwrap();
    thread::scope(|scope| {
        for stream in far.into_iter().chain([main_far]) {
            scope.spawn(move || io::copy(&mut &stream, &mut io::sink()));
        }
        ram.configure(&multifd()).unwrap();
        ram.setup(&mut out).unwrap();
        for _ in 0..4 {
            let before = out.written();
            ram.iterate(&mut out, 16 * PAGE).unwrap();
            assert!(out.written() - before >= 16 * PAGE, "{}", out.written() - before);
        }
        drop(ram);
        drop(out);
    });
}

#[test]
fn pages_that_are_written_again_arrive_as_they_were_last_whatever_channel_they_come_by() {
    for round in 0..20u8 {
        let (from, to) = (Side::new(&[0, 1]), Side::new(&[0, 1]));
        fill(&from.region, 0..128, round + 1);
        let script = Script::default();
        // In each round all pages again, for as long as it can be told from the last.
        let writing = (script.clone(), from.region.try_clone().unwrap());
        let last_words: Box<dyn FnOnce() + Send> = Box::new(move || {
            (0..128).for_each(|page| writing.0.write(&writing.1, page, 0x80 + (page % 100) as u8));
        });
        (0..128).step_by(2).for_each(|page| script.dirty.lock().unwrap().push(page));
        let source = Witness { last_words: Mutex::new(Some(last_words)), ..Witness::default() };
        let both = migrate_over(3, (&from, &to), &script, source);
        both.sent.unwrap();
        both.taken.unwrap();
        for page in 0..128 {
            assert_eq!(to.page(page), [0x80 + (page % 100) as u8; 4096], "page {page}");
        }
    }
}

/// Of migrations whose channel 1 breaks after so many bytes each, those that broke; each ended on both sides with
/// its reason, and the guest runs on.
fn broken_after(configuration: &Configuration, bytes: &[u64]) -> usize {
    let mut broke = 0;
    for &after in bytes {
        let (from, script, source) = guest();
        let to = Side::new(&[1, 4, 5]);
        let (near, far) = pairs(2);
        let faulty = move |progress: &Arc<Progress>| {
            let over = |(index, stream): (usize, UnixStream)| {
                let faulty = Faulty::new(stream, 4096);
                let faulty = if index == 1 { faulty.fails_after(after) } else { faulty };
                Channel::over(Arc::new(faulty), Arc::clone(progress))
            };
            PageChannels::new(near.into_iter().enumerate().map(over).collect()).unwrap()
        };
        let both = migrate_over_channels(
            (&from, &to),
            &script,
            source,
            configuration.clone(),
            faulty,
            |p| channels(far, p),
        );
        match both.sent {
            Err(failed) => {
                broke += 1;
                assert_eq!(failed.guest, GuestAfter::RunsHere);
                let text = failed.to_string();
                let expected = "channel 1 for pages: cannot send pages: the cable was cut";
                assert!(text.contains(expected), "{after}: {text}");
                both.taken.unwrap_err();
                assert!(both.destination.is_empty());
            }
            Ok(_) => both.taken.unwrap(),
        }
    }
    broke
}

#[test]
fn whichever_channel_breaks_wherever_ends_both_sides_with_its_reason_and_the_guest_runs_on() {
    let broke = broken_after(&multifd(), &[0, 63, 64, 1000, 1408, 1409, 200_000, 300_000]);
    assert!(broke >= 6, "{broke}");
}

#[test]
fn a_destination_that_refuses_a_channel_says_so_to_the_source() {
    let (from, script, source) = guest();
    let to = Side::new(&[1, 4, 5]);
    let (near, mut far) = pairs(3);
    // The source has three, of which one goes nowhere.
    let _nowhere = far.pop();
    let both = migrate_over_channels(
        (&from, &to),
        &script,
        source,
        multifd(),
        |progress| channels(near, progress),
        |progress| channels(far, progress),
    );
    let refused = both.taken.unwrap_err().to_string();
    let expected = "the source has 3 channels, and 2 are connected here";
    assert!(refused.contains(expected), "{refused}");
    let failed = both.sent.unwrap_err();
    assert!(matches!(failed.error, MigrationError::Refused { .. }), "{failed}");
    assert!(failed.to_string().contains(expected), "{failed}");
    assert!(!failed.to_string().contains("unexpected message"), "{failed}");
    assert_eq!(failed.guest, GuestAfter::RunsHere);
}

/// A channel may be refused before the main one has brought a byte.
#[test]
fn a_source_hears_why_its_channel_was_refused_however_early_that_was() {
    let (from, to) = (Side::new(&[1, 4]), Side::new(&[1, 4]));
    fill(&from.region, 64..128, 7);
    let (main, main_far) = UnixStream::pair().unwrap();
    let (mut left_over, taken_up) = UnixStream::pair().unwrap();
    // Of a source that has gone, with another VM.
    left_over.write_all(&incoming::greeting([1; 16], 0, 1)).unwrap();
    let (refused, failed) = thread::scope(|scope| {
        let taking = scope.spawn(|| {
            let progress = Arc::new(Progress::new());
            let ram =
                RamLoad::new(Arc::clone(&to.blocks), ListOptions::default(), Arc::clone(&progress));
            let incoming = Incoming {
                configuration: multifd(),
                guest: &Witness::default(),
                handlers: vec![Box::new(ram.with_channels(channels(vec![taken_up], &progress)))],
                devices: &mut NoDevices,
                postcopy: None,
                progress: Arc::clone(&progress),
            };
            incoming.run(Channel::new(main_far, progress).unwrap()).unwrap_err().to_string()
        });
        // It has been refused by now, as good as certainly; what follows holds in any case.
        thread::sleep(Duration::from_millis(100));
        let progress = Arc::new(Progress::new());
        let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Script>::default() };
        let ram =
            RamSave::new(&from.blocks, ListOptions::default(), Arc::clone(&progress), tracker);
        let (near, _nowhere) = pairs(1);
        let outgoing = Outgoing {
            parameters: Parameters::new(multifd()),
            guest: &Witness::default(),
            handlers: vec![Box::new(ram.unwrap().with_channels(channels(near, &progress)))],
            devices: &mut NoDevices,
            postcopy: None,
            progress: Arc::clone(&progress),
        };
        let failed = outgoing.run(Channel::new(main, progress).unwrap()).unwrap_err();
        (taking.join().unwrap(), failed)
    });
    for error in [refused, failed.to_string()] {
        let expected = "channel 0 for pages: it is of another VM: its UUID differs";
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn channels_that_the_configuration_does_not_have_are_refused_before_anything_is_sent() {
    for (configuration, with, expected) in [
        (Configuration::new("test"), true, "lacks the capability multifd"),
        (Configuration { uuid: None, ..multifd() }, true, "has no UUID"),
        (multifd(), false, "RAM has no channels"),
    ] {
        let (from, to) = (Side::new(&[1]), Side::new(&[1]));
        let progress = Arc::new(Progress::new());
        let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Script>::default() };
        let options = ListOptions::default();
        let mut save = RamSave::new(&from.blocks, options, Arc::clone(&progress), tracker).unwrap();
        let mut load = RamLoad::new(Arc::clone(&to.blocks), options, Arc::clone(&progress));
        if with {
            let (near, far) = pairs(2);
            save = save.with_channels(channels(near, &progress));
            load = load.with_channels(channels(far, &progress));
        }
        for error in [save.configure(&configuration), load.configure(&configuration)] {
            let error = error.unwrap_err().to_string();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }
    for count in [0, 65] {
        let progress = Arc::new(Progress::new());
        let channel = |stream| Channel::new(stream, Arc::clone(&progress)).unwrap();
        let error = PageChannels::new(pairs(count).0.into_iter().map(channel).collect());
        let error = error.unwrap_err().to_string();
        assert_eq!(error, format!("pages go over 1 to 64 channels, not {count}"));
    }
}

#[test]
fn channels_of_which_only_some_are_encrypted_are_refused_on_both_sides_before_anything_is_sent() {
    for encrypted in [[true, false], [false, true]] {
        let (from, to) = (Side::new(&[1]), Side::new(&[1]));
        fill(&to.region, 64..66, 3);
        let channel = |stream, encrypted: bool, progress: &Arc<Progress>| {
            let faulty = Faulty::new(stream, 1000);
            let transport = if encrypted { faulty.encrypted() } else { faulty };
            Channel::over(Arc::new(transport), Arc::clone(progress))
        };
        let progress = Arc::new(Progress::new());
        let ((main, mut main_far), (near, mut far)) =
            (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let main = channel(main, encrypted[0], &progress);
        let pages = PageChannels::new(vec![channel(near, encrypted[1], &progress)]).unwrap();
        let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Script>::default() };
        let options = ListOptions::default();
        let ram = RamSave::new(&from.blocks, options, Arc::clone(&progress), tracker).unwrap();
        let outgoing = Outgoing {
            parameters: Parameters::new(multifd()),
            guest: &Witness::default(),
            handlers: vec![Box::new(ram.with_channels(pages))],
            devices: &mut NoDevices,
            postcopy: None,
            progress,
        };
        let failed = outgoing.run(main).unwrap_err();
        assert_eq!(failed.guest, GuestAfter::RunsHere);
        let (mut sent, mut sent_there) = (Vec::new(), Vec::new());
        main_far.read_to_end(&mut sent).unwrap();
        far.read_to_end(&mut sent_there).unwrap();
        assert_eq!((sent.len(), sent_there.len()), (0, 0));

        let progress = Arc::new(Progress::new());
        let main = channel(UnixStream::pair().unwrap().0, encrypted[0], &progress);
        let pages = channel(UnixStream::pair().unwrap().0, encrypted[1], &progress);
        let ram = RamLoad::new(Arc::clone(&to.blocks), options, Arc::clone(&progress));
        let incoming = Incoming {
            configuration: multifd(),
            guest: &Witness::default(),
            handlers: vec![Box::new(ram.with_channels(PageChannels::new(vec![pages]).unwrap()))],
            devices: &mut NoDevices,
            postcopy: None,
            progress,
        };
        let refused = incoming.run(main).unwrap_err();
        assert_eq!(to.page(64), [3; 4096], "what was there is not touched yet");
        for error in [failed.to_string(), refused.to_string()] {
            assert!(error.contains("tls-creds is for all channels of a migration"), "{error}");
            let names = ["the main channel", "channel 0 for pages"];
            let encrypted = names[usize::from(encrypted[1])];
            assert!(error.contains(&format!("{encrypted} is encrypted")), "{error}");
        }
    }
}

/// RAM that goes over two channels, which hold little unread, with so much patience of the main channel.
fn over_two(
    from: &Side,
    progress: &Arc<Progress>,
    patience: Duration,
) -> (RamSave, Channel, UnixStream, Vec<UnixStream>) {
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Script>::default() };
    let options = ListOptions::default();
    let ram = RamSave::new(&from.blocks, options, Arc::clone(progress), tracker).unwrap();
    let (near, far) = pairs(2);
    for stream in &near {
        rustix::net::sockopt::set_socket_send_buffer_size(stream, 4096).unwrap();
    }
    let mut ram = ram.with_channels(channels(near, progress));
    ram.configure(&multifd()).unwrap();
    let (main, main_far) = UnixStream::pair().unwrap();
    let mut main = Channel::new(main, Arc::clone(progress)).unwrap();
    main.set_write_patience(patience);
    ram.setup(&mut main).unwrap();
    (ram, main, main_far, far)
}

#[test]
fn more_pages_than_wait_for_channels_that_are_not_read_end_the_downtime_as_soon() {
    let from = Side::of_region(64 << 20);
    fill(&from.region, 0..16 * PACKET_PAGES as u64, 1);
    let (mut ram, mut main, _main_far, far) =
        over_two(&from, &Arc::default(), Duration::from_millis(30));
    let readers: Vec<_> =
        far.into_iter().map(|far| SlowReader::start(far, Slow::Trickle)).collect();
    let error = ram.complete(&mut main).unwrap_err().to_string();
    assert!(error.contains("has read nothing for 30ms"), "{error}");
    drop((ram, readers));
}

#[test]
fn the_channel_that_is_not_read_is_named() {
    let from = Side::of_region(1 << 20);
    // A packet each: nothing waits behind what is being written.
    fill(&from.region, 0..2 * PACKET_PAGES as u64, 1);
    let (mut ram, mut main, _main_far, mut far) =
        over_two(&from, &Arc::default(), Duration::from_millis(30));
    let stuck = far.pop().unwrap();
    let mut read = far.pop().unwrap();
    let reading = thread::spawn(move || read.read_to_end(&mut Vec::new()));
    let error = ram.iterate(&mut main, u64::MAX).unwrap_err().to_string();
    assert!(error.contains("channel 1 ") && error.contains("has read nothing"), "{error}");
    drop((ram, stuck));
    reading.join().unwrap().unwrap();
}

#[test]
fn a_packet_that_takes_longer_than_patience_is_waited_for_while_bytes_of_it_go() {
    const PATIENCE: Duration = Duration::from_secs(2);
    let from = Side::new(&[0, 1]);
    fill(&from.region, 0..PACKET_PAGES as u64, 1);
    let (mut ram, mut main, _main_far, far) = over_two(&from, &Arc::default(), PATIENCE);
    let readers: Vec<_> = far
        .into_iter()
        .map(|mut far| {
            thread::spawn(move || {
                // More than what is taken for gone, and less than a packet within patience.
                let mut bytes = vec![0; 16 << 10];
                while far.read_exact(&mut bytes).is_ok() {
                    thread::sleep(PATIENCE / 20);
                }
            })
        })
        .collect();
    ram.complete(&mut main).unwrap();
    drop(ram);
    readers.into_iter().for_each(|reader| reader.join().unwrap());
}

#[test]
fn a_channel_that_is_not_read_can_be_cancelled_and_ends_the_downtime_when_its_patience_does() {
    // And ends with the destination, whatever of it takes no channel up.
    for (cancels, leaves) in [(true, false), (false, false), (false, true)] {
        let from = Side::new(&[0, 1, 2]);
        fill(&from.region, 0..192, 1);
        let progress = Arc::new(Progress::new());
        let patience = Duration::from_millis(30);
        let (mut ram, mut main, _main_far, far) = over_two(&from, &progress, patience);
        let readers: Vec<_> =
            far.into_iter().map(|far| SlowReader::start(far, Slow::Trickle)).collect();
        if cancels {
            progress.cancel();
        }
        if leaves {
            progress.destination_ended();
        }
        let error = ram.complete(&mut main).unwrap_err();
        match (cancels, leaves) {
            (true, _) => assert!(matches!(error, MigrationError::Cancelled), "{error}"),
            (_, true) => assert!(matches!(error, MigrationError::ChannelClosed(_)), "{error}"),
            _ => assert!(error.to_string().contains("has read nothing for 30ms"), "{error}"),
        }
        // Threads that write still do not keep it from ending.
        drop(ram);
        drop(readers);
    }
}
