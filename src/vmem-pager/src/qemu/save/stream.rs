//! A whole stream from one reader, as a file has it.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use migration::progress::Progress;
use migration::stream::ReturnMessage;
use vmstate::wire::WireReader;

use super::incoming::{self, Peer};
use crate::error::PagerError;
use crate::image::pages::Pages;
use crate::image::writer::{NewFile, WholeImage};

/// Takes a whole stream, from one channel and to its end, into an image that is to be at `path`; it lacks
/// only its name then. Also what would be said back to the source.
///
/// # Errors
///
/// Why there is no image: the stream, or the file.
pub fn receive_stream(
    stream: impl Read,
    path: &Path,
    progress: &Arc<Progress>,
) -> (Result<WholeImage, PagerError>, Vec<ReturnMessage>) {
    let mut peer = OneWay::default();
    let mut reader = WireReader::new(stream);
    let image = NewFile::create(path)
        .and_then(|file| incoming::receive(&mut reader, &mut peer, file, progress));
    (image, peer.replies)
}

/// No source that could be asked anything.
#[derive(Default)]
struct OneWay {
    has_return_path: bool,
    replies: Vec<ReturnMessage>,
}

impl Peer for OneWay {
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

    fn blocks_known(&mut self, _pages: &Arc<Pages>) {}

    fn postcopy_advised(&mut self) {}

    fn guest_taken(&mut self) {}

    fn channels(&mut self) -> Result<usize, PagerError> {
        Ok(0)
    }

    fn sync(&mut self) -> Result<(), PagerError> {
        Ok(())
    }

    /// What has come may be all that there is.
    fn is_quiet(&mut self) -> Result<bool, PagerError> {
        Ok(true)
    }
}
