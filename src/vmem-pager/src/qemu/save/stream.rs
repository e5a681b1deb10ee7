//! A whole stream from readers, as files have it.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use migration::Progress;
use migration::stream::{Greeting, ReturnMessage};
use vmstate::wire::WireReader;

use super::incoming::{self, Peer};
use super::multifd::{Packet, Packets};
use crate::error::PagerError;
use crate::image::pages::Pages;
use crate::image::writer::{NewFile, WholeImage};

/// Takes a whole stream, with its multifd channels if it has any, into an image that is to be at `path`; it
/// lacks only its name then. Also what would be said back to the source.
///
/// # Errors
///
/// Why there is no image: the stream, or the file.
pub fn receive_stream<R: Read>(
    stream: R,
    channels: Vec<R>,
    path: &Path,
    progress: &Arc<Progress>,
) -> (Result<WholeImage, PagerError>, Vec<ReturnMessage>) {
    let channels = channels.into_iter().map(|channel| (WireReader::new(channel), false)).collect();
    let mut peer = Streams { channels, pages: None, has_return_path: false, replies: Vec::new() };
    let mut reader = WireReader::new(stream);
    let image = NewFile::create(path)
        .and_then(|file| incoming::receive(&mut reader, &mut peer, file, progress));
    (image, peer.replies)
}

/// Takes the rest of a stream that broke off in postcopy, with what was kept of it, as [`receive_stream`] does the
/// whole.
///
/// # Errors
///
/// Why there is no image: what was kept, the stream, or the file.
pub fn recover_stream<R: Read>(
    kept: &[u8],
    stream: R,
    path: &Path,
    progress: &Arc<Progress>,
) -> (Result<WholeImage, PagerError>, Vec<ReturnMessage>) {
    let mut peer = Streams::<R> {
        channels: Vec::new(),
        pages: None,
        has_return_path: false,
        replies: Vec::new(),
    };
    let mut reader = WireReader::new(stream);
    let image = NewFile::create(path)
        .and_then(|file| incoming::recover(kept, &mut reader, &mut peer, file, progress));
    (image, peer.replies)
}

/// No source that could be asked anything.
struct Streams<R> {
    /// And whether it has introduced itself.
    channels: Vec<(WireReader<R>, bool)>,
    pages: Option<Arc<Pages>>,
    has_return_path: bool,
    replies: Vec<ReturnMessage>,
}

impl<R: Read> Peer for Streams<R> {
    fn open_return_path(&mut self) {
        self.has_return_path = true;
    }

    fn has_return_path(&self) -> bool {
        self.has_return_path
    }

    fn reply(&mut self, message: &ReturnMessage) -> Result<(), PagerError> {
        self.replies.push(message.clone());
        Ok(())
    }

    fn keep(&mut self, _bytes: &[u8]) -> Result<(), PagerError> {
        Ok(())
    }

    fn reply_nothing_received(&mut self, block: &str, _nr_pages: u64) -> Result<(), PagerError> {
        self.replies.push(ReturnMessage::RecvBitmap { block: block.to_owned() });
        Ok(())
    }

    fn blocks_known(&mut self, pages: &Arc<Pages>) {
        self.pages = Some(Arc::clone(pages));
    }

    fn postcopy_advised(&mut self) {}

    fn guest_taken(&mut self) {}

    fn channels(&mut self) -> Result<usize, PagerError> {
        Ok(self.channels.len())
    }

    /// One after the other, each up to its next mark.
    fn sync(&mut self) -> Result<(), PagerError> {
        let pages = &self.pages;
        let mut give = || {
            pages.clone().ok_or_else(|| PagerError::Protocol("no list of RAM blocks".to_owned()))
        };
        for (reader, greeted) in &mut self.channels {
            if !*greeted {
                Greeting::read(reader)?;
                *greeted = true;
            }
            let mut packets = Packets::default();
            while packets.next(reader, &mut give)? != Packet::Sync {}
        }
        Ok(())
    }

    /// What has come may be all that there is.
    fn is_quiet(&mut self) -> Result<bool, PagerError> {
        Ok(true)
    }
}
