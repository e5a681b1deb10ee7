//! Changes of block state within a good stream.

use vmstate::wire::WireWrite;

use super::good::good_stream;
use super::side::Sharing;
use super::{BLOCK, PAGE};
use crate::input::Input;

/// The command, and the kinds of it.
const BLOCK_STATE: u16 = 0x564d;
const KINDS: [u8; 3] = [1, 2, 3];

/// The good stream with changes between the list of RAM blocks and the first pages: each a byte that says how it is
/// wrong, if it is, its kind, and up to three ranges by a byte of blocks and a byte of their number.
pub(super) fn with_changes(sharing: Sharing, input: &mut Input<'_>) -> Vec<u8> {
    let good = &good_stream(sharing).bytes;
    let list = find(good, b"\x03ram\0\0\0\0", 0);
    let footer = b"\x7e\0\0\0\0";
    let at = find(good, footer, list) + footer.len();
    let mut bytes = good[..at].to_vec();
    let mut number = 0;
    while !input.is_empty() && number < 16 {
        let how = input.u8();
        number += 1;
        let mut data = Vec::new();
        data.put_be32(if how & 1 == 0 { number } else { input.u32() });
        data.put_u8(KINDS[usize::from(input.u8() % 3)]);
        data.put_name(["vmem0", "rom", "firmware", "none"][usize::from(how >> 1 & 3)]);
        for _ in 0..(how >> 3 & 3).min(3) {
            let (start, len) = match how & 0x20 {
                0 => (u64::from(input.u8() % 16) * BLOCK, u64::from(input.u8() % 16) * BLOCK),
                _ => (input.u64(), u64::from(input.u16()) * PAGE),
            };
            data.put_be64(start);
            data.put_be64(len);
        }
        let len = if how & 0x40 == 0 { data.len() as u16 } else { input.u16() };
        bytes.put_u8(8);
        bytes.put_be16(BLOCK_STATE);
        bytes.put_be16(len);
        bytes.extend(data);
    }
    bytes.extend_from_slice(&good[at..]);
    bytes
}

fn find(bytes: &[u8], what: &[u8], from: usize) -> usize {
    let found = bytes[from..].windows(what.len()).position(|part| part == what);
    from + found.expect("a good stream has it")
}
