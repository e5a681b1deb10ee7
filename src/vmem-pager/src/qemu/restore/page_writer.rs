//! Writes pages to a channel.

use migration::stream::{PageHeader, PageKind, TARGET_PAGE_SIZE};
use migration::{Channel, Sink};
use vmstate::wire::WireWrite;

use super::lost::Lost;
use crate::error::PagerError;
use crate::image::GuestImage;

/// A channel on which pages are sent. Each has a block of its own that records continue.
pub(super) struct PageWriter<'a> {
    image: &'a GuestImage,
    channel: Channel,
    current: Option<usize>,
    bytes: Vec<u8>,
}

impl<'a> PageWriter<'a> {
    /// On which no page was sent.
    pub fn new(image: &'a GuestImage, channel: Channel) -> Self {
        Self { image, channel, current: None, bytes: Vec::new() }
    }

    /// Appends bytes of the stream that are no pages.
    pub fn put(&mut self, bytes: &[u8]) {
        self.bytes.put(bytes);
    }

    /// Appends a page of a block: its bytes, or `None` for zeros.
    pub fn page(&mut self, block: usize, page: u64, content: Option<&[u8]>) {
        let continued = self.current == Some(block);
        let kind = if content.is_some() { PageKind::Normal } else { PageKind::Zero };
        self.bytes.put_be64(PageHeader::page_word(kind, page * TARGET_PAGE_SIZE, continued));
        if !continued {
            self.bytes.put_name(self.image.blocks()[block].id());
            self.current = Some(block);
        }
        match content {
            Some(content) => self.bytes.put(content),
            None => self.bytes.put_u8(0),
        }
    }

    /// Sends what was appended; how many bytes it was.
    ///
    /// # Errors
    ///
    /// When the other side does not take it.
    pub fn send(&mut self, lost: &Lost<'_>, what: &'static str) -> Result<u64, PagerError> {
        let sent = self.channel.write(&self.bytes);
        let len = self.bytes.len() as u64;
        self.bytes.clear();
        sent.map(|()| len).map_err(|error| lost.io(what, error))
    }

    /// Bytes sent so far.
    pub fn written(&self) -> u64 {
        self.channel.written()
    }

    /// The channel.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }
}
