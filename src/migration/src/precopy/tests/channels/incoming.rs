//! The destination of pages over several channels, with a source that does as a test says.

use super::*;

/// A destination that has begun to load RAM, with two channels whose other ends a test writes to.
pub(super) struct Begun {
    pub(super) to: Side,
    pub(super) ram: RamLoad,
    pub(super) far: Vec<UnixStream>,
}

impl Begun {
    fn new() -> Self {
        Self::configured(&multifd())
    }

    pub(super) fn configured(configuration: &Configuration) -> Self {
        let to = Side::new(&[1, 4, 5]);
        let progress = Arc::new(Progress::new());
        let options = ListOptions::default();
        let (near, far) = pairs(2);
        let channel = |stream| {
            let mut channel = Channel::new(stream, Arc::clone(&progress)).unwrap();
            channel.set_write_patience(Duration::from_millis(300));
            channel
        };
        let near = PageChannels::new(near.into_iter().map(channel).collect()).unwrap();
        let ram = RamLoad::new(Arc::clone(&to.blocks), options, Arc::clone(&progress));
        let mut ram = ram.with_channels(near);
        ram.configure(configuration).unwrap();
        ram.load_setup().unwrap();
        let mut list = Vec::new();
        put_list(&mut list, &to.blocks.list(options).unwrap());
        put_end_of_section(&mut list);
        let mut begun = Self { to, ram, far };
        begun.load(SectionKind::Start, &list).unwrap();
        begun
    }

    fn load(&mut self, kind: SectionKind, bytes: &[u8]) -> Outcome {
        self.ram.load(kind, RAM_VERSION, &mut WireReader::new(bytes))
    }

    /// Says which channel each is.
    fn greeted() -> Self {
        let mut begun = Self::new();
        (0..2).for_each(|id| begun.send(id, &greeting(UUID, id as u8, 2)));
        begun
    }

    pub(super) fn send(&mut self, channel: usize, bytes: &[u8]) {
        self.far[channel].write_all(bytes).unwrap();
    }

    /// The last section, with a barrier.
    pub(super) fn end(&mut self) -> Outcome {
        let mut section = Vec::new();
        put_multifd_flush(&mut section);
        put_end_of_section(&mut section);
        self.load(SectionKind::End, &section)
    }
}

pub(super) fn greeting(uuid: [u8; 16], id: u8, channels: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    Greeting { uuid, id, channels }.put(&mut bytes);
    bytes
}

pub(super) fn packet(
    number: u64,
    sync: bool,
    block: &str,
    pages: &[(u64, u8)],
    zeros: &[u64],
) -> Vec<u8> {
    let (normal, zero) = (pages.len(), zeros.len());
    let payload = normal * PAGE as usize;
    let (encoding, block) = (Encoding::Plain, block.to_owned());
    let head = PacketHead { at: 0, number, sync, encoding, block, normal, zero, payload };
    let mut offsets: Vec<u64> = pages.iter().map(|(page, _)| page * PAGE).collect();
    offsets.extend(zeros.iter().map(|page| page * PAGE));
    let mut bytes = Vec::new();
    head.put(&offsets, &mut bytes);
    pages.iter().for_each(|(_, byte)| bytes.extend([*byte; PAGE as usize]));
    bytes
}

pub(super) fn sync(number: u64) -> Vec<u8> {
    packet(number, true, "", &[], &[])
}

#[test]
fn pages_of_the_next_round_wait_for_those_of_this_one() {
    let mut begun = Begun::greeted();
    // The second channel is two rounds ahead.
    let second =
        [packet(2, true, "vmem0", &[(65, 2)], &[]), packet(3, true, "vmem0", &[(64, 3)], &[65])];
    begun.send(1, &second.concat());
    begun.send(0, &packet(1, true, "vmem0", &[(64, 1), (65, 1), (66, 1)], &[]));
    begun.send(0, &sync(9));
    let mut section = Vec::new();
    put_multifd_flush(&mut section);
    put_end_of_section(&mut section);
    begun.load(SectionKind::Part, &section).unwrap();
    begun.end().unwrap();
    begun.ram.complete().unwrap();
    let pages = [64, 65, 66].map(|page| begun.to.page(page)[0]);
    assert_eq!(pages, [3, 0, 1]);
    // What became zero again takes no memory.
    assert_eq!(begun.to.resident(), (2, 0));
}

#[test]
fn what_a_source_does_wrong_on_a_channel_is_refused_by_name() {
    type Wrong = Box<dyn Fn(&mut Begun)>;
    let says =
        |channel, bytes: Vec<u8>| -> Wrong { Box::new(move |begun| begun.send(channel, &bytes)) };
    let after_greetings = |bytes: Vec<u8>| -> Wrong {
        Box::new(move |begun| {
            (0..2).for_each(|id| begun.send(id, &greeting(UUID, id as u8, 0)));
            begun.send(1, &bytes);
        })
    };
    let cut = |bytes: Vec<u8>, len: usize| -> Wrong {
        Box::new(move |begun| {
            (0..2).for_each(|id| begun.send(id, &greeting(UUID, id as u8, 2)));
            begun.send(1, &bytes[..len]);
            begun.far[1].shutdown(std::net::Shutdown::Write).unwrap();
        })
    };
    let page = packet(1, false, "vmem0", &[(64, 1)], &[]);
    let cases: [(Wrong, &str); 16] = [
        (says(0, greeting([1; 16], 0, 2)), "of another VM: its UUID differs"),
        (says(0, greeting(UUID, 2, 2)), "its number is 2, and 2 channels are connected here"),
        (says(0, greeting(UUID, 0, 3)), "the source has 3 channels, and 2 are connected here"),
        (
            Box::new(|begun| (0..2).for_each(|id| begun.send(id, &greeting(UUID, 1, 2)))),
            "its number is 1, as that of another",
        ),
        (says(1, b"QEVM\0\0\0\x03".repeat(8)), "magic number of a multifd channel"),
        (
            after_greetings([packet(5, false, "", &[], &[]), page.clone()].concat()),
            "they are out of order",
        ),
        (after_greetings(packet(1, false, "rom", &[(0, 1)], &[])), "block \"rom\", which is not"),
        (after_greetings(packet(1, false, "vmem0", &[(1024, 1)], &[])), "is past its end"),
        (after_greetings(packet(1, false, "vmem0", &[(0, 1)], &[])), "lies in a discarded range"),
        (after_greetings(packet(1, false, "vmem0", &[], &[65, 128])), "lies in a discarded range"),
        (after_greetings(vec![0; 1344]), "magic number of a packet"),
        (
            {
                let mut bytes = packet(1, false, "vmem0", &[(64, 1)], &[]);
                bytes[8..12].copy_from_slice(&4u32.to_be_bytes());
                after_greetings(bytes)
            },
            "its pages are compressed, which was not agreed on",
        ),
        (cut(page.clone(), 0), "closed the channel while pages were outstanding on it"),
        (cut(page.clone(), 700), "channel 1 for pages"),
        (cut(page.clone(), 2000), "the pages of a packet"),
        (after_greetings(Vec::new()), "nothing comes on it"),
    ];
    for (wrong, expected) in cases {
        let mut begun = Begun::new();
        let main = crate::channel::Interrupt::default();
        begun.ram.interrupt_on_failure(&main);
        wrong(&mut begun);
        let error = begun.end().unwrap_err();
        assert!(matches!(error, MigrationError::Channel { .. }), "{expected}: {error}");
        assert!(error.to_string().contains(expected), "{expected}: {error}");
        assert_eq!(begun.to.resident(), (0, 0), "{expected}");
    }
}

#[test]
fn the_main_channel_is_ended_by_a_channel_that_fails_beside_it() {
    let (main_near, main_far) = UnixStream::pair().unwrap();
    let (mut near, far) = pairs(2);
    let to = Side::new(&[1]);
    let guest = Witness::default();
    let progress = Arc::new(Progress::new());
    // A source that says nothing on the main channel, and nonsense on another.
    near[1].write_all(&[0; 64]).unwrap();
    let options = ListOptions::default();
    let ram = RamLoad::new(Arc::clone(&to.blocks), options, Arc::clone(&progress));
    let incoming = Incoming {
        configuration: multifd(),
        guest: &guest,
        handlers: vec![Box::new(ram.with_channels(channels(far, &progress)))],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    let error = incoming.run(Channel::new(main_far, progress).unwrap()).unwrap_err().to_string();
    assert!(error.contains("channel 1 for pages: magic number"), "{error}");
    drop(main_near);
}

#[test]
fn the_last_section_has_a_barrier_and_nothing_comes_after_it() {
    let mut begun = Begun::greeted();
    let mut end = Vec::new();
    put_end_of_section(&mut end);
    let error = begun.load(SectionKind::End, &end).unwrap_err().to_string();
    assert!(error.contains("the section ends without a flush"), "{error}");

    let mut begun = Begun::greeted();
    let page = packet(2, false, "vmem0", &[(64, 1)], &[]);
    begun.send(0, &[sync(1), page[..1500].to_vec()].concat());
    begun.send(1, &sync(1));
    let error = begun.end().unwrap_err().to_string();
    assert!(error.contains("pages come after the last barrier"), "{error}");
    assert_eq!(begun.to.resident(), (0, 0));
}

#[test]
fn pages_on_the_main_channel_beside_others_are_refused() {
    let mut begun = Begun::greeted();
    let mut section = crate::stream::PageHeader::page_word(crate::stream::PageKind::Zero, 0, false)
        .to_be_bytes()
        .to_vec();
    section.extend(b"\x05vmem0\0");
    put_end_of_section(&mut section);
    let error = begun.load(SectionKind::Part, &section).unwrap_err().to_string();
    assert!(error.contains("a page on the main channel, beside channels for pages"), "{error}");
}

#[test]
fn a_packet_has_no_more_pages_than_qemus() {
    let from = Side::of_region(4 << 20);
    fill(&from.region, 0..1024, 3);
    let progress = Arc::new(Progress::new());
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Script>::default() };
    let options = ListOptions::default();
    let ram = RamSave::new(&from.blocks, options, Arc::clone(&progress), tracker).unwrap();
    let (near, far) = pairs(1);
    let mut ram = ram.with_channels(channels(near, &progress));
    ram.configure(&multifd()).unwrap();
    let mut main = crate::test_utils::KeptStream::new().unwrap();
    let reading = thread::spawn(move || {
        let mut reader = WireReader::new(&far[0]);
        let greeting = Greeting::read(&mut reader).unwrap();
        let (mut packets, mut seen) = (crate::stream::Packets::default(), Vec::new());
        while !reader.is_at_end().unwrap() {
            let head = packets.read_head(&mut reader).unwrap();
            vmstate::wire::WireRead::skip(&mut reader, head.payload as u64, "pages").unwrap();
            seen.push((head.normal, head.sync));
        }
        (greeting, seen)
    });
    ram.setup(&mut main).unwrap();
    ram.complete(&mut main).unwrap();
    let (greeting, seen) = reading.join().unwrap();
    assert_eq!(greeting, Greeting { uuid: UUID, id: 0, channels: 1 });
    let mut expected = vec![(PACKET_PAGES, false); 8];
    expected.push((0, true));
    assert_eq!(seen, expected);
    // On the main channel, besides the list: where the barrier is, and the end.
    let bytes = main.bytes().unwrap();
    let ends: Vec<u8> = [0x200u64, 0x10].iter().flat_map(|word| word.to_be_bytes()).collect();
    assert_eq!(bytes[bytes.len() - 16..], ends);
    assert!(main.written() < 200);
}
