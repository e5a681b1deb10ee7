//! Pages that are compressed on their channels.

use super::incoming::{Begun, greeting, packet, sync};
use super::*;
use crate::ParameterChange;
use crate::stream::{CAPABILITY_MULTIFD_ZSTD, Packets};
use vmstate::wire::WireRead;

fn with_zstd() -> Configuration {
    let mut configuration = multifd();
    configuration.capabilities.push(CAPABILITY_MULTIFD_ZSTD.to_owned());
    configuration
}

fn migrate_compressed(
    count: usize,
    sides: (&Side, &Side),
    script: &Script,
    source: Witness,
) -> Both {
    let (near, far) = pairs(count);
    let (near, far) = (|p: &Arc<Progress>| channels(near, p), |p: &Arc<Progress>| channels(far, p));
    migrate_over_channels(sides, script, source, with_zstd(), near, far)
}

/// Pages without a pattern.
fn fill_with_noise(side: &Side, pages: std::ops::Range<u64>) {
    let mut state = pages.start | 1;
    let mut bytes = vec![0; ((pages.end - pages.start) * PAGE) as usize];
    for byte in &mut bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = (state >> 32) as u8;
    }
    side.region.write_all_at(&bytes, pages.start * PAGE).unwrap();
}

fn handler(side: &Side, progress: &Arc<Progress>) -> RamSave {
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Script>::default() };
    RamSave::new(&side.blocks, ListOptions::default(), Arc::clone(progress), tracker).unwrap()
}

/// A payload, by zstd itself.
fn zstd_of(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![0; zstd_safe::compress_bound(bytes.len())];
    let len = zstd_safe::compress(&mut out[..], bytes, 3).unwrap();
    out[..len].to_vec()
}

/// A packet of one page or several, with this for its payload.
fn compressed(number: u64, pages: &[u64], payload: &[u8]) -> Vec<u8> {
    let head = PacketHead {
        at: 0,
        number,
        sync: false,
        encoding: Encoding::Zstd,
        block: "vmem0".to_owned(),
        normal: pages.len(),
        zero: 0,
        payload: payload.len(),
    };
    let mut bytes = Vec::new();
    head.put(&pages.iter().map(|page| page * PAGE).collect::<Vec<_>>(), &mut bytes);
    bytes.extend_from_slice(payload);
    bytes
}

#[test]
fn a_compressed_guest_goes_over_any_number_of_channels_and_costs_less_than_its_pages() {
    for count in [1, 2, 4] {
        let (from, script, source) = guest();
        // Some that compression makes no smaller.
        fill_with_noise(&from, 320..370);
        let to = Side::new(&[1, 4, 5]);
        let before = from.resident();
        let both = migrate_compressed(count, (&from, &to), &script, source);
        both.taken.unwrap();
        let sent = both.sent.unwrap();
        assert_eq!((both.source.last(), both.destination), (Some(&"stop"), vec!["run"]));
        for page in (64..128).chain(256..384) {
            assert_eq!(to.page(page), from.page(page), "page {page} over {count}");
        }
        let mut boot = vec![0; 4096];
        to.boot.read_exact_at(&mut boot, 4 * PAGE).unwrap();
        assert_eq!(boot, [5; 4096]);
        assert_eq!(from.resident(), (before.0 + 1, before.1));
        assert_eq!(to.resident(), (64 + 10 + 50 + 1 - 1, 2));
        assert!(sent.normal >= 126 && sent.transferred < (50 + 20) * PAGE, "{sent:?}");
    }
}

/// What goes over one channel: of each packet with normal pages its encoding, how many, and its payload.
fn on_the_wire(
    side: &Side,
    progress: &Arc<Progress>,
    steer: impl Fn(usize),
) -> Vec<(Encoding, usize, Vec<u8>)> {
    let mut ram = handler(side, progress);
    let (near, far) = pairs(1);
    ram = ram.with_channels(channels(near, progress));
    ram.configure(&with_zstd()).unwrap();
    let reading = thread::spawn(move || {
        let mut reader = WireReader::new(&far[0]);
        Greeting::read(&mut reader).unwrap();
        let (mut packets, mut seen) = (Packets::default(), Vec::new());
        while !reader.is_at_end().unwrap() {
            let head = packets.read_head(&mut reader).unwrap();
            let len = head.payload as u64;
            let payload = reader.bytes(len, len, "pages").unwrap();
            if head.normal != 0 {
                seen.push((head.encoding, head.normal, payload));
            }
        }
        seen
    });
    let mut main = crate::test_utils::KeptStream::new().unwrap();
    ram.setup(&mut main).unwrap();
    // A packet in each section.
    for section in 0.. {
        steer(section);
        if ram.dirty_pages() == 0 {
            break;
        }
        ram.iterate(&mut main, PACKET_PAGES as u64 * PAGE).unwrap();
    }
    ram.complete(&mut main).unwrap();
    reading.join().unwrap()
}

#[test]
fn packets_that_do_not_shrink_go_plain_between_others() {
    let side = Side::of_region(4 << 20);
    for (packet, shrinks) in [true, false, true, true].into_iter().enumerate() {
        let pages = packet as u64 * 128..(packet as u64 + 1) * 128;
        match shrinks {
            true => fill(&side.region, pages, 7),
            false => fill_with_noise(&side, pages),
        }
    }
    let seen = on_the_wire(&side, &Arc::new(Progress::new()), |_| ());
    let encodings: Vec<_> = seen.iter().map(|(encoding, ..)| *encoding).collect();
    use Encoding::{Plain, Zstd};
    assert_eq!(encodings, [Zstd, Plain, Zstd, Zstd]);
    let mut noise = vec![0; 128 * PAGE as usize];
    side.region.read_exact_at(&mut noise, 128 * PAGE).unwrap();
    assert!(seen[1].2 == noise);
    // What is compressed behind them begins a stream, by zstd's number, and what follows that continues it.
    let begins: Vec<_> =
        seen.iter().map(|(.., payload)| payload.starts_with(&[0x28, 0xb5, 0x2f, 0xfd])).collect();
    assert_eq!(begins, [true, false, true, false]);
}

#[test]
fn a_level_that_is_changed_while_it_runs_holds_from_the_packet_after_the_next() {
    let side = Side::of_region(4 << 20);
    fill(&side.region, 0..5 * 128, 7);
    let progress = Arc::new(Progress::new());
    let begins = |change: Option<u8>| -> Vec<bool> {
        let seen = on_the_wire(&side, &progress, |section| {
            if section == 2 && change.is_some() {
                let change =
                    ParameterChange { multifd_zstd_level: change, ..ParameterChange::default() };
                progress.set_parameters(change).unwrap();
            }
        });
        let starts = |payload: &[u8]| payload.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]);
        seen.iter().map(|(.., payload)| starts(payload)).collect()
    };
    progress.steering.begin(&Parameters::new(with_zstd()));
    assert_eq!(begins(None), [true, false, false, false, false]);
    assert_eq!(begins(Some(1)), [true, false, false, false, false]);
    // The third ends a stream of the level before.
    assert_eq!(begins(Some(9)), [true, false, false, true, false]);
    let change = ParameterChange { multifd_zstd_level: Some(0), ..ParameterChange::default() };
    let error = progress.set_parameters(change).unwrap_err().to_string();
    assert!(error.starts_with("parameter multifd-zstd-level: 0 is not 1 to 20"), "{error}");
}

#[test]
fn compressed_and_plain_packets_arrive_in_any_mixture() {
    let mut begun = Begun::configured(&with_zstd());
    (0..2).for_each(|id| begun.send(id, &greeting(UUID, id as u8, 2)));
    let pages = |byte: u8| vec![byte; PAGE as usize];
    begun.send(0, &compressed(1, &[64, 70], &zstd_of(&[pages(1), pages(2)].concat())));
    begun.send(0, &packet(2, false, "vmem0", &[(65, 3)], &[]));
    begun.send(0, &compressed(3, &[66], &zstd_of(&pages(4))));
    // Zeros alone, of a source that says of all packets that they are compressed, as QEMU.
    let mut zeros = packet(4, false, "vmem0", &[], &[70]);
    zeros[8..12].copy_from_slice(&4u32.to_be_bytes());
    begun.send(0, &zeros);
    begun.send(0, &sync(5));
    begun.send(1, &sync(6));
    begun.end().unwrap();
    begun.ram.complete().unwrap();
    assert_eq!([64, 65, 66, 70].map(|page| begun.to.page(page)[0]), [1, 3, 4, 0]);
    assert_eq!(begun.to.resident(), (3, 0));
}

#[test]
fn payloads_that_are_not_their_pages_end_all_channels_and_no_page_of_them_is_written() {
    let page = vec![7; PAGE as usize];
    let good = zstd_of(&page);
    let bomb = zstd_of(&vec![0; 1 << 30]);
    let with = |more: &[u8]| [&good, more].concat();
    let packet = compressed(1, &[64], &good);
    let unfinished = good[..good.len() - 1].to_vec();
    for (bytes, expected) in [
        (compressed(1, &[64], &bomb), "more than its 4096 bytes of pages"),
        (compressed(1, &[64, 65], &good), "end within a block, after 4096 of 8192 bytes"),
        (compressed(1, &[64], &unfinished), "end within a block, after 0 of 4096 bytes"),
        (compressed(1, &[64], &with(&good)), "more than its 4096 bytes of pages"),
        (compressed(1, &[64], &with(&[0x28])), "end within a block, after 4096 of 4096 bytes"),
        (
            compressed(1, &[64], &with(&[1])),
            "the pages of packet 1: zstd: Unknown frame descriptor",
        ),
        (compressed(1, &[64], &[0; 100]), "the pages of packet 1: zstd: Unknown frame descriptor"),
        (compressed(1, &[64], &vec![0; 2 << 20])[..2000].to_vec(), "payload of a packet"),
        (compressed(1, &[64], &[]), "payload of a packet"),
        // Right, but for where the pages go.
        (compressed(1, &[0], &good), "lies in a discarded range"),
        (compressed(1, &[1024], &bomb), "is past its end"),
        (packet[..packet.len() - 1].to_vec(), "the pages of a packet"),
    ] {
        let mut begun = Begun::configured(&with_zstd());
        let main = crate::channel::Interrupt::default();
        begun.ram.interrupt_on_failure(&main);
        (0..2).for_each(|id| begun.send(id, &greeting(UUID, id as u8, 2)));
        begun.send(1, &bytes);
        begun.far[1].shutdown(std::net::Shutdown::Write).unwrap();
        let error = begun.end().unwrap_err();
        assert!(matches!(error, MigrationError::Channel { number: 1, .. }), "{expected}: {error}");
        assert!(error.to_string().contains(expected), "{expected}: {error}");
        assert_eq!(begun.to.resident(), (0, 0), "{expected}");
    }
}

#[test]
fn whichever_compressed_channel_breaks_wherever_ends_both_sides_with_its_reason() {
    let bytes = [0, 63, 64, 1000, 1408, 1409, 1450, 2800, 1 << 20];
    let broke = broken_after(&with_zstd(), &bytes);
    assert!((6..9).contains(&broke), "{broke}");
}

#[test]
fn a_destination_that_does_not_decompress_refuses_before_any_page_and_the_guest_runs_on() {
    for (source, destination) in [(with_zstd(), multifd()), (multifd(), with_zstd())] {
        let (from, to) = (Side::new(&[1]), Side::new(&[1]));
        fill(&from.region, 0..64, 7);
        let guest = Witness::default();
        let (near, far) = pairs(2);
        let both = migrate_configured(
            (&from, &to),
            &Script::default(),
            guest,
            (source, destination),
            |progress| channels(near, progress),
            |progress| channels(far, progress),
        );
        let refused = both.taken.unwrap_err().to_string();
        assert!(refused.contains("capabilities: \"multifd"), "{refused}");
        let failed = both.sent.unwrap_err();
        assert_eq!(failed.guest, GuestAfter::RunsHere, "{failed}");
        assert!(failed.to_string().contains("refused the migration"), "{failed}");
        assert!(failed.to_string().contains("capabilities: \"multifd"), "{failed}");
        assert_ne!(both.source.last(), Some(&"stop"));
        assert_eq!(to.resident(), (0, 0));
    }
}

#[test]
fn compression_without_channels_is_refused_before_anything_is_sent() {
    let side = Side::new(&[1]);
    let progress = Arc::new(Progress::new());
    let mut configuration = with_zstd();
    configuration.capabilities.remove(0);
    let options = ListOptions::default();
    let mut save = handler(&side, &progress);
    let mut load = RamLoad::new(Arc::clone(&side.blocks), options, Arc::clone(&progress));
    for error in [save.configure(&configuration), load.configure(&configuration)] {
        let error = error.unwrap_err().to_string();
        assert!(error.contains("x-multifd-zstd, and RAM has no channels"), "{error}");
    }
    let (near, far) = pairs(1);
    let mut save = handler(&side, &progress).with_channels(channels(near, &progress));
    drop(far);
    let error = save.configure(&configuration).unwrap_err().to_string();
    assert!(error.contains("the configuration lacks the capability multifd"), "{error}");
}
