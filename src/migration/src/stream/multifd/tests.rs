//! Packets against the bytes that QEMU writes, and what is no packet.

use super::*;
use proptest::prelude::*;
use vmstate::wire::WireReader;

const PAGE: u64 = TARGET_PAGE_SIZE;

/// Blocks of 64 pages.
struct Two;

impl PageBlocks for Two {
    type Error = FormatError;

    fn find(&self, id: &str, at: u64) -> Result<usize, FormatError> {
        let found = ["ram", "vmem0"].iter().position(|known| *known == id);
        found.ok_or(FormatError::NoBlock { offset: at })
    }

    fn id(&self, block: usize) -> &str {
        ["ram", "vmem0"][block]
    }

    fn used_length(&self, _block: usize) -> u64 {
        64 * PAGE
    }
}

fn head() -> PacketHead {
    PacketHead {
        at: 0,
        number: 7,
        sync: false,
        encoding: Encoding::Plain,
        block: "vmem0".to_owned(),
        normal: 3,
        zero: 1,
        payload: 3 * PAGE as usize,
    }
}

fn bytes(head: &PacketHead, offsets: &[u64]) -> Vec<u8> {
    let mut bytes = Vec::new();
    head.put(offsets, &mut bytes);
    bytes
}

fn read(bytes: &[u8]) -> Result<(PacketHead, Packets), FormatError> {
    let mut packets = Packets::default();
    let head = packets.read_head(&mut WireReader::new(bytes))?;
    Ok((head, packets))
}

fn refused(change: impl Fn(&mut Vec<u8>)) -> String {
    let mut bytes = bytes(&head(), &[0, PAGE, 5 * PAGE, 9 * PAGE]);
    change(&mut bytes);
    match read(&bytes) {
        Err(error) => error.to_string(),
        Ok((head, packets)) => packets.block(&head, &Two).unwrap_err().to_string(),
    }
}

#[test]
fn a_packet_has_the_layout_of_qemus() {
    let offsets = [0, PAGE, 5 * PAGE, 9 * PAGE];
    let bytes = bytes(&head(), &offsets);
    assert_eq!((bytes.len(), PACKET_HEAD), (1344, 1344));
    let start = [
        0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 128, 0, 0, 0, 3, 0, 0, 0x30, 0, 0,
        0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1,
    ];
    assert_eq!(bytes[..36], start);
    assert_eq!(&bytes[64..70], b"vmem0\0");
    assert_eq!(bytes[320 + 8..320 + 16], PAGE.to_be_bytes());
    let (found, packets) = read(&bytes).unwrap();
    assert_eq!(found, head());
    assert_eq!(packets.block(&found, &Two).unwrap(), 1);
    let range = |page, pages| ByteRange::new(page * PAGE, pages * PAGE).unwrap();
    assert_eq!(packets.normal_runs().collect::<Vec<_>>(), [range(0, 2), range(5, 1)]);
    assert_eq!(packets.zero_runs().collect::<Vec<_>>(), [range(9, 1)]);
}

#[test]
fn a_greeting_has_the_layout_of_qemus_and_the_number_of_channels_in_a_byte_that_qemu_leaves_unused()
{
    let greeting = Greeting { uuid: [0x5a; 16], id: 3, channels: 4 };
    let mut bytes = Vec::new();
    greeting.put(&mut bytes);
    assert_eq!(bytes.len(), Greeting::LEN);
    assert_eq!(bytes[..8], [0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1]);
    assert_eq!((bytes[23], bytes[24], bytes[25]), (0x5a, 3, 4));
    assert_eq!(Greeting::read(&mut WireReader::new(&bytes[..])).unwrap(), greeting);
    bytes[3] = 0x45;
    let error = Greeting::read(&mut WireReader::new(&bytes[..])).unwrap_err().to_string();
    assert!(error.contains("magic number of a multifd channel"), "{error}");
}

#[test]
fn what_is_wrong_with_a_packet_is_named() {
    let set = |at: usize, value: u32| {
        move |bytes: &mut Vec<u8>| bytes[at..at + 4].copy_from_slice(&value.to_be_bytes())
    };
    let offset = |page: usize, value: u64| {
        move |bytes: &mut Vec<u8>| {
            bytes[320 + page * 8..][..8].copy_from_slice(&value.to_be_bytes());
        }
    };
    for (error, expected) in [
        (refused(set(0, 1)), "magic number of a packet"),
        (refused(set(4, 2)), "version of a packet"),
        (refused(set(8, 1 << 1)), "compression of a packet"),
        (refused(set(8, 32 << 1)), "state of devices on multifd channels"),
        (refused(set(12, 3)), "number of pages of a packet"),
        (refused(set(16, 129)), "number of pages of a packet"),
        (refused(set(16, u32::MAX)), "number of pages of a packet"),
        (refused(set(32, u32::MAX)), "number of pages of a packet"),
        (refused(set(20, 2 * PAGE as u32)), "payload of a packet"),
        (refused(offset(2, 1)), "offset of a page in a packet"),
        (refused(offset(2, 64 * PAGE)), "is past its end"),
        (refused(offset(3, u64::MAX - (PAGE - 1))), "is past its end"),
        (refused(|bytes| bytes[64] = b'x'), "continues no block"),
        (refused(|bytes| bytes[64] = 0xff), "the block of a packet"),
        (refused(|bytes| bytes.truncate(1343)), "the offsets of a packet"),
    ] {
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let zstd = PacketHead { encoding: Encoding::Zstd, payload: PAYLOAD_MAX + 1, ..head() };
    let error = read(&bytes(&zstd, &[0; 4])).unwrap_err().to_string();
    assert!(error.contains("payload of a packet"), "{error}");
}

proptest! {
    #[test]
    fn what_is_written_is_read_and_what_is_cut_is_not(
        offsets in prop::collection::vec(0..64u64, 0..PACKET_PAGES),
        split in any::<prop::sample::Index>(),
        number in any::<u64>(),
        sync in any::<bool>(),
        cut in any::<prop::sample::Index>(),
    ) {
        let offsets: Vec<u64> = offsets.into_iter().map(|page| page * PAGE).collect();
        let normal = split.index(offsets.len() + 1);
        let payload = normal * PAGE as usize;
        let zero = offsets.len() - normal;
        let head = PacketHead { number, sync, normal, zero, payload, ..head() };
        let bytes = bytes(&head, &offsets);
        let (found, packets) = read(&bytes).unwrap();
        prop_assert_eq!(&found, &head);
        packets.block(&found, &Two).unwrap();
        let pages = |runs: Vec<ByteRange>| -> Vec<u64> {
            runs.into_iter().flat_map(|run| (run.start()..run.end()).step_by(PAGE as usize)).collect()
        };
        let mut read_back = pages(packets.normal_runs().collect());
        read_back.extend(pages(packets.zero_runs().collect()));
        prop_assert_eq!(read_back, offsets);
        prop_assert!(read(&bytes[..cut.index(bytes.len())]).is_err());
    }

    #[test]
    fn any_bytes_are_a_packet_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let mut bytes = bytes;
        if bytes.len() > 8 {
            bytes[..8].copy_from_slice(&[0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1]);
        }
        if let Ok((head, packets)) = read(&bytes) {
            let _ = packets.block(&head, &Two);
            prop_assert!(head.normal + head.zero <= PACKET_PAGES && head.payload <= PAYLOAD_MAX);
        }
    }
}
