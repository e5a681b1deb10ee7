//! Writes pages to a channel.

use std::ops::Range;

use migration::stream::{PageHeader, PageKind, TARGET_PAGE_SIZE};
use migration::{Channel, Sink};
use vmstate::wire::WireWrite;

use super::lost::Lost;
use crate::error::PagerError;
use crate::image::{GuestImage, PageReader, is_zero};

/// A page that continues its block: header and content.
const RECORD: usize = PageHeader::LEN + TARGET_PAGE_SIZE as usize;

/// A channel on which pages are sent. Each has a block of its own that records continue.
pub(super) struct PageWriter<'a> {
    image: &'a GuestImage,
    channel: Channel,
    current: Option<usize>,
    /// Whether pages of the image that are zeros are sent.
    zeros: bool,
    /// What is to be sent, up to `len`; behind that is what was sent before, which costs nothing to keep.
    bytes: Vec<u8>,
    len: usize,
}

impl<'a> PageWriter<'a> {
    /// On which no page was sent.
    pub fn new(image: &'a GuestImage, channel: Channel) -> Self {
        Self { image, channel, current: None, zeros: true, bytes: Vec::new(), len: 0 }
    }

    /// As [`new`](Self::new); pages of the image that turn out to be zeros are left out.
    pub fn without_zeros(image: &'a GuestImage, channel: Channel) -> Self {
        Self { zeros: false, ..Self::new(image, channel) }
    }

    /// Appends bytes of the stream that are no pages.
    pub fn put(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
    }

    /// Appends a page of zeros.
    pub fn zeros(&mut self, block: usize, page: u64) {
        self.header(block, page, PageKind::Zero);
        self.put(&[0]);
    }

    /// Appends pages of a block that the image has.
    ///
    /// # Errors
    ///
    /// When they cannot be read.
    pub fn pages(
        &mut self,
        block: usize,
        mut pages: Range<u64>,
        reader: &mut PageReader<'_>,
    ) -> Result<(), PagerError> {
        let of = &self.image.blocks()[block];
        while self.current != Some(block) && !pages.is_empty() {
            let mut content = [0; TARGET_PAGE_SIZE as usize];
            reader.read_apart(of, pages.start..pages.start + 1, &mut content)?;
            match (is_zero(&content), self.zeros) {
                (true, true) => self.zeros(block, pages.start),
                (true, false) => {}
                (false, _) => {
                    self.header(block, pages.start, PageKind::Normal);
                    self.put(&content);
                }
            }
            pages.start += 1;
        }
        let (start, sends_zeros) = (self.len, self.zeros);
        let records = self.room((pages.end - pages.start) as usize * RECORD);
        if let Err(error) = reader.read_apart(of, pages.clone(), records) {
            self.len = start;
            return Err(error);
        }
        // A page of zeros is a header alone: what follows it moves up.
        let mut to = 0;
        for (page, from) in pages.zip((0..).step_by(RECORD)) {
            let (offset, content) = (page * TARGET_PAGE_SIZE, from + PageHeader::LEN);
            if is_zero(&records[content..from + RECORD]) {
                if !sends_zeros {
                    continue;
                }
                let word = PageHeader::page_word(PageKind::Zero, offset, true);
                records[to..to + PageHeader::LEN].copy_from_slice(&word.to_be_bytes());
                to += PageHeader::LEN + 1;
                records[to - 1] = 0;
                continue;
            }
            if to != from {
                records.copy_within(content..from + RECORD, to + PageHeader::LEN);
            }
            let word = PageHeader::page_word(PageKind::Normal, offset, true);
            records[to..to + PageHeader::LEN].copy_from_slice(&word.to_be_bytes());
            to += RECORD;
        }
        self.len = start + to;
        Ok(())
    }

    fn header(&mut self, block: usize, page: u64, kind: PageKind) {
        let continued = self.current == Some(block);
        let mut header = Vec::new();
        header.put_be64(PageHeader::page_word(kind, page * TARGET_PAGE_SIZE, continued));
        if !continued {
            header.put_name(self.image.blocks()[block].id());
            self.current = Some(block);
        }
        self.put(&header);
    }

    /// Appends so many bytes, whatever is in them.
    fn room(&mut self, len: usize) -> &mut [u8] {
        let start = self.len;
        self.len += len;
        if self.bytes.len() < self.len {
            self.bytes.resize(self.len, 0);
        }
        &mut self.bytes[start..self.len]
    }

    /// Bytes that were appended, and not sent.
    pub fn unsent(&self) -> u64 {
        self.len as u64
    }

    /// Sends what was appended; how many bytes it was.
    ///
    /// # Errors
    ///
    /// When the other side does not take it.
    pub fn send(&mut self, lost: &Lost<'_>, what: &'static str) -> Result<u64, PagerError> {
        let sent = self.channel.write(&self.bytes[..self.len]);
        let len = std::mem::take(&mut self.len) as u64;
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
