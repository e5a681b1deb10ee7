//! A multifd channel: packets of pages into the image, and marks at which all channels wait for each other.

use std::io::Read;
use std::sync::Arc;

use migration::stream::{self, Encoding};
use vmstate::wire::{WireRead, WireReader};

use crate::error::PagerError;
use crate::image::pages::Pages;

/// What a packet was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packet {
    /// Pages, which are in the file now.
    Pages,
    /// A mark: nothing more is to be read until all channels and the main one have come to it.
    Sync,
}

/// Reads packets. Holds the pages of one.
#[derive(Debug, Default)]
pub(super) struct Packets {
    packets: stream::Packets,
    bytes: Vec<u8>,
}

impl Packets {
    /// Reads the next packet, and takes its pages over. `pages` gives where they go to, once that is known.
    ///
    /// # Errors
    ///
    /// When the packet is impossible, the channel ends or fails, or the file does not take the pages.
    pub fn next<R: Read>(
        &mut self,
        reader: &mut WireReader<R>,
        pages: &mut dyn FnMut() -> Result<Arc<Pages>, PagerError>,
    ) -> Result<Packet, PagerError> {
        let head = self.packets.read_head(reader)?;
        if head.encoding != Encoding::Plain {
            let what =
                "pages that are compressed are not understood; switch multifd-compression off";
            return Err(PagerError::Protocol(what.to_owned()));
        }
        if head.has_pages() {
            let pages = pages()?;
            let block = self.packets.block(&head, &*pages)?;
            self.take(reader, &pages, block, head.payload)?;
        }
        Ok(if head.sync { Packet::Sync } else { Packet::Pages })
    }

    fn take<R: Read>(
        &mut self,
        reader: &mut WireReader<R>,
        pages: &Pages,
        block: usize,
        payload: usize,
    ) -> Result<(), PagerError> {
        self.bytes.resize(payload, 0);
        reader.read_exact(&mut self.bytes, "the pages of a packet")?;
        let mut rest = &self.bytes[..];
        for run in self.packets.normal_runs() {
            let (bytes, after) = rest.split_at(run.len() as usize);
            pages.write(block, run.start(), bytes)?;
            rest = after;
        }
        for run in self.packets.zero_runs() {
            pages.zero(block, run.start(), run.len())?;
        }
        Ok(())
    }
}
