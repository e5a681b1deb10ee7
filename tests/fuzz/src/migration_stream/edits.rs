//! Good bytes with a few of them changed, mostly where headers are.

use crate::input::Input;

/// Bounds the time of one input.
const EDITS: usize = 64;

/// As many equal bytes belong to a page or to a hole, not to a header.
const RUN: usize = 32;

/// Bytes that were changed, and what they were before.
pub(super) type Before = Vec<(usize, u8)>;

/// Something good, and where its headers are.
pub(super) struct Good {
    pub(super) bytes: Vec<u8>,
    /// The offset of every byte that is of a header: of no page's content, and of no hole.
    pub(super) headers: Vec<usize>,
}

impl Good {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        let (mut headers, mut at) = (Vec::new(), 0);
        for run in bytes.chunk_by(|one, next| one == next) {
            if run.len() < RUN {
                headers.extend(at..at + run.len());
            }
            at += run.len();
        }
        Self { bytes, headers }
    }
}

/// Changes bytes, mostly those of headers, and cuts. Returns what was there before, and how long
/// the rest is; [`undo`] takes it.
pub(super) fn edit(bytes: &mut [u8], headers: &[usize], input: &mut Input<'_>) -> (Before, usize) {
    let (mut before, mut rest) = (Vec::new(), bytes.len());
    for _ in 0..EDITS {
        if input.is_empty() {
            break;
        }
        let (how, at, value) = (input.u8(), usize::from(input.u16()), input.u8());
        let (header, anywhere) = (headers[at % headers.len()], at * 37 % bytes.len());
        let (at, value) = match how % 8 {
            0..=3 => (header, value),
            4 => (header, bytes[header].wrapping_add(value)),
            5 => (anywhere, value ^ bytes[anywhere]),
            6 => {
                rest = rest.min(header);
                continue;
            }
            _ => {
                rest = rest.min(anywhere);
                continue;
            }
        };
        if at < rest {
            before.push((at, bytes[at]));
            bytes[at] = value;
        }
    }
    (before, rest)
}

/// A copy of what is good, with edits.
pub(super) fn edited(good: &Good, input: &mut Input<'_>) -> Vec<u8> {
    let mut bytes = good.bytes.clone();
    let (_, rest) = edit(&mut bytes, &good.headers, input);
    bytes.truncate(rest);
    bytes
}

pub(super) fn undo(bytes: &mut [u8], before: &[(usize, u8)]) {
    before.iter().rev().for_each(|&(at, value)| bytes[at] = value);
}
