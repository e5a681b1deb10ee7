//! Inputs to start from.

use migration::stream::{
    PageHeader, PageKind, RAM_SECTION, RAM_VERSION, SectionHeader, SectionKind, put_end_of_section,
    put_footer, put_header, put_list, put_section,
};
use vmstate::wire::WireWrite;

use super::PAGE;
use super::good::good_stream;
use super::side::{Sharing, with_source};

/// The second byte of an input: what follows the bytes of a peer.
const GARBAGE: u8 = 1;
const CLOSED: u8 = 2;
const OPEN: u8 = 0xff;

/// The kind, on a socket what follows, and then edits of a good stream or file (how, where (2),
/// value) or bytes. Each as it is, and where both sides share memory.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = (2..5).map(|kind| vec![kind]).collect();
    for kind in [0, 1, 5] {
        seeds.extend([OPEN, GARBAGE, CLOSED].map(|ending| vec![kind, ending]));
    }
    seeds.push([&[0, CLOSED][..], &[0, 40, 0, 7], &[5, 9, 3, 0x80]].concat());
    seeds.push([&[2][..], &[0, 60, 0, 7], &[7, 30, 0, 0]].concat());
    // A hostile destination, which stays or leaves: PONGs of all values that matter, then that it has the
    // guest. As many bytes as the third says are there before the guest is stopped.
    let pong = |value: u8| vec![0, 2, 0, 4, 0, 0, 0, value];
    for (ending, early, code) in
        [(CLOSED, 0, 0), (OPEN, 8, 0), (CLOSED, 16, 22), (CLOSED, 24, 0), (OPEN, 4, 22)]
    {
        let shut = vec![0, 1, 0, 4, 0, 0, 0, code];
        seeds.push([vec![5, ending, early], pong(1), pong(5), shut].concat());
    }
    // Changes of block state: one that fits, one that fits and is undone, several that do not.
    let range = 1 << 3;
    seeds.push(vec![6, OPEN, range, 0, 1, 1]);
    seeds.push(vec![6, OPEN, range, 1, 6, 1, range, 0, 6, 1]);
    seeds.push(vec![6, CLOSED, 3 << 3, 0, 1, 1, 3, 1, 5, 1, range, 1, 0, 1]);
    seeds.push(vec![6, CLOSED, range | 0x20, 1, 0, 0, 0, 0, 0, 0, 0, 0xff, 1, 0]);
    seeds.push(vec![6, CLOSED, range | 0x40, 1, 6, 1, 0xff, 0xff]);
    // And a destination that says that it follows, and answers what was not sent.
    let follows = [0, 2, 0, 4, 0x56, 0x4d, 0, 2];
    let answer = [0x56, 0x4d, 0, 5, 0, 0, 0, 1, 0];
    seeds.push([&[5, CLOSED, 8][..], &follows].concat());
    seeds.push([&[5, CLOSED, 17][..], &follows, &answer].concat());
    // In postcopy: what it says was discarded, among other things.
    seeds.extend(super::answers::seeds().into_iter().map(|seed| [&[7][..], &seed].concat()));
    let shared = seeds.iter().map(|seed| [&[seed[0] | 0x80], &seed[1..]].concat());
    seeds = shared.collect::<Vec<_>>().into_iter().chain(seeds).collect();
    // Packages in packages, after a header.
    let header = b"QEVM\0\0\0\x03\x07\0\0\0\x04fuzz";
    let packaged = |len: u32| [&[8, 0, 7, 0, 4][..], &len.to_be_bytes()].concat();
    let nested = (0..10_000).rev().flat_map(|inside| packaged(inside * 9));
    seeds.push([1, CLOSED].into_iter().chain(*header).chain(nested).collect());
    // A longer block, a shorter one, one past the end of what is there, an address.
    for kind in [0, 0x80] {
        for more in [1, 0_u8.wrapping_sub(1), 0_u8.wrapping_sub(2), 6] {
            seeds.push([&[kind, OPEN][..], &resized(sharing(kind), more)].concat());
        }
    }
    let address = header_of_entry(Sharing::Firmware, "firmware") + 8 + 7;
    seeds.push([&[0x80, CLOSED][..], &edit(4, address, 1)].concat());
    // Pages of what is shared, of what nothing is used of, and of what is discarded.
    for kind in [1, 0x81] {
        for (block, page) in [("firmware", 0), ("rom", 0), ("rom", 5), ("vmem0", 4), ("vmem0", 16)]
        {
            seeds.push([&[kind, CLOSED][..], &one_page(sharing(kind), block, page)].concat());
        }
    }
    seeds
}

fn sharing(kind: u8) -> Sharing {
    if kind & 0x80 == 0 { Sharing::Nothing } else { Sharing::Firmware }
}

fn edit(how: u8, header: usize, value: u8) -> [u8; 4] {
    let [low, high] = (header as u16).to_le_bytes();
    [how, low, high, value]
}

/// Where among the bytes of headers the length of a block is.
fn header_of_entry(sharing: Sharing, id: &str) -> usize {
    let good = good_stream(sharing);
    let name = [&[id.len() as u8], id.as_bytes()].concat();
    let at = good.bytes.windows(name.len()).position(|bytes| bytes == name).unwrap() + name.len();
    good.headers.binary_search(&at).unwrap()
}

/// Edits that make the resizable block so many pages longer.
fn resized(sharing: Sharing, pages: u8) -> Vec<u8> {
    // The sum of all lengths is before the first entry; both are big-endian.
    let total = header_of_entry(sharing, "vmem0") - b"\x05vmem0".len() - 8;
    let length = header_of_entry(sharing, "rom");
    [edit(4, total + 6, pages << 4), edit(4, length + 6, pages << 4)].concat()
}

/// A stream that ends after a page.
fn one_page(sharing: Sharing, block: &str, page: u64) -> Vec<u8> {
    let mut out = Vec::new();
    put_header(&mut out, &sharing.configuration());
    let header = |kind| SectionHeader {
        kind,
        section_id: 0,
        idstr: RAM_SECTION.to_owned(),
        instance_id: 0,
        version_id: RAM_VERSION,
    };
    put_section(&mut out, &header(SectionKind::Start));
    let list = with_source(sharing, |side| side.blocks.list(sharing.options()).unwrap());
    put_list(&mut out, &list);
    out.put_be64(PageHeader::page_word(PageKind::Normal, page * PAGE, false));
    out.put_name(block);
    out.put(&[0x77; PAGE as usize]);
    put_end_of_section(&mut out);
    put_footer(&mut out, 0);
    out
}
