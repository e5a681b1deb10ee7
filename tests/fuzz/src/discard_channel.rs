//! Both ends of the discard channel with a hostile other end: messages out of place, edited, cut,
//! or bytes.
//!
//! What is promised: no panic, and no wait without an end. The daemon goes on to serve the guest
//! and its other clients, who are told what the guest was answered. A client tells its listeners
//! of blocks of its region only, and once that the daemon is gone.

mod client;
mod server;

use std::ops::Range;
use std::time::Duration;

use ram_discard::Section;
use virtio_mem::device::Geometry;
use virtio_mem::discard_channel::wire::Message;

use crate::input::Input;

const ADDR: u64 = 1 << 32;
const BLOCK: u64 = 4096;
const NR: usize = 200;

/// Bounds the time of one input.
const STEPS: usize = 32;
/// For what happens at once, unless it does not happen at all.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a hostile end waits for a message.
const MOMENT: Duration = Duration::from_millis(2);

fn geometry() -> Geometry {
    Geometry::new(ADDR, NR as u64 * BLOCK, BLOCK, None).unwrap()
}

/// The blocks of a section.
fn blocks(section: Section, block_size: u64) -> Range<usize> {
    let index = |at: u64| usize::try_from(at / block_size).unwrap();
    index(section.start())..index(section.end())
}

/// The frame of a message, right more often than not.
fn frame(message: &impl Message, input: &mut Input<'_>) -> Vec<u8> {
    let mut frame = message.to_frame();
    let choice = input.u8();
    match choice % 16 {
        0 | 1 => {
            for _ in 0..=choice >> 4 & 3 {
                let (at, value) = (usize::from(input.u8()), input.u8());
                let at = at % frame.len();
                frame[at] = value;
            }
        }
        2 => frame.truncate(usize::from(choice >> 4)),
        3 => frame = input.bytes(usize::from(choice >> 4)).to_vec(),
        _ => {}
    }
    frame
}

/// Runs one input.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    if input.u8() & 1 == 0 { client::run(&mut input) } else { server::run(&mut input) }
}
