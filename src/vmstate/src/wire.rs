//! Big-endian values on a stream, in both directions.
//!
//! A reader never takes more than it was asked for from what it hands out, and reads a length
//! before anything of that length is allocated; the caller gives the limit.

use std::io::{self, Read, Seek};

use thiserror::Error;

/// The most that [`WireRead::peek`] can be asked for, bytes.
pub const PEEK_MAX: usize = 64 << 10;

/// Starts a subsection of a device's state, and of the configuration section.
pub const SUBSECTION: u8 = 0x05;

/// Why a value could not be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WireError {
    /// The stream ended within a value.
    #[error("the stream ends at byte {offset:#x}, where {what} was expected")]
    Truncated {
        /// Bytes from the start of the stream.
        offset: u64,
        /// What should have been there.
        what: &'static str,
    },
    /// The channel failed.
    #[error("cannot read {what} at byte {offset:#x}: {source}")]
    Io {
        /// Bytes from the start of the stream.
        offset: u64,
        /// What should have been there.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A length is larger than what is possible there.
    #[error("{what} of {len} bytes at byte {offset:#x}: at most {limit} are possible")]
    TooLong {
        /// Bytes from the start of the stream.
        offset: u64,
        /// What is too long.
        what: &'static str,
        /// The length on the stream.
        len: u64,
        /// The limit.
        limit: u64,
    },
    /// A name is not UTF-8.
    #[error("{what} at byte {offset:#x} is not text")]
    NotText {
        /// Bytes from the start of the stream.
        offset: u64,
        /// What should have been text.
        what: &'static str,
    },
}

impl WireError {
    /// Bytes from the start of the stream at which it went wrong.
    pub fn offset(&self) -> u64 {
        match *self {
            Self::Truncated { offset, .. }
            | Self::Io { offset, .. }
            | Self::TooLong { offset, .. }
            | Self::NotText { offset, .. } => offset,
        }
    }
}

/// A stream of big-endian values that can be looked at before they are taken.
pub trait WireRead {
    /// Bytes taken so far, counted from the start of the stream.
    fn offset(&self) -> u64;

    /// The next `len` bytes, which stay to be taken.
    ///
    /// # Errors
    ///
    /// When the stream ends before, or fails.
    ///
    /// # Panics
    ///
    /// When `len` exceeds [`PEEK_MAX`].
    fn peek(&mut self, len: usize, what: &'static str) -> Result<&[u8], WireError>;

    /// Takes bytes that were peeked.
    ///
    /// # Panics
    ///
    /// When they were not.
    fn take(&mut self, len: usize);

    /// Fills `buf`.
    ///
    /// # Errors
    ///
    /// When the stream ends before, or fails.
    fn read_exact(&mut self, buf: &mut [u8], what: &'static str) -> Result<(), WireError>;

    /// Passes over `len` bytes.
    ///
    /// # Errors
    ///
    /// When the stream ends before, or fails.
    fn skip(&mut self, len: u64, what: &'static str) -> Result<(), WireError> {
        let mut left = len;
        while left != 0 {
            let step = left.min(PEEK_MAX as u64);
            self.peek(step as usize, what)?;
            self.take(step as usize);
            left -= step;
        }
        Ok(())
    }

    /// What has been read ahead and not taken.
    fn buffered(&self) -> &[u8];

    /// Reads ahead as much as the stream gives at once; whether there was anything.
    ///
    /// # Errors
    ///
    /// When the stream fails.
    fn read_ahead(&mut self) -> io::Result<bool>;

    /// A byte.
    ///
    /// # Errors
    ///
    /// When the stream ends before, or fails.
    fn u8(&mut self, what: &'static str) -> Result<u8, WireError> {
        let mut bytes = [0; 1];
        self.read_exact(&mut bytes, what)?;
        Ok(bytes[0])
    }

    /// 16 bits, big-endian.
    ///
    /// # Errors
    ///
    /// When the stream ends before, or fails.
    fn be16(&mut self, what: &'static str) -> Result<u16, WireError> {
        let mut bytes = [0; 2];
        self.read_exact(&mut bytes, what)?;
        Ok(u16::from_be_bytes(bytes))
    }

    /// 32 bits, big-endian.
    ///
    /// # Errors
    ///
    /// When the stream ends before, or fails.
    fn be32(&mut self, what: &'static str) -> Result<u32, WireError> {
        let mut bytes = [0; 4];
        self.read_exact(&mut bytes, what)?;
        Ok(u32::from_be_bytes(bytes))
    }

    /// 64 bits, big-endian.
    ///
    /// # Errors
    ///
    /// When the stream ends before, or fails.
    fn be64(&mut self, what: &'static str) -> Result<u64, WireError> {
        let mut bytes = [0; 8];
        self.read_exact(&mut bytes, what)?;
        Ok(u64::from_be_bytes(bytes))
    }

    /// `len` bytes, refused before allocation when there are more than `limit`.
    ///
    /// # Errors
    ///
    /// When they are too many, or the stream ends before, or fails.
    fn bytes(&mut self, len: u64, limit: u64, what: &'static str) -> Result<Vec<u8>, WireError> {
        let offset = self.offset();
        if len > limit {
            return Err(WireError::TooLong { offset, what, len, limit });
        }
        // In steps, so that a stream which lies about a length costs no more than it sends.
        const STEP: u64 = 1 << 20;
        let mut bytes = Vec::new();
        let mut left = len;
        while left != 0 {
            let step = left.min(STEP);
            let start = bytes.len();
            bytes.resize(start + step as usize, 0);
            self.read_exact(&mut bytes[start..], what)?;
            left -= step;
        }
        Ok(bytes)
    }

    /// A name: a length byte and as many bytes of UTF-8.
    ///
    /// # Errors
    ///
    /// When it is not text, or the stream ends before, or fails.
    fn name(&mut self, what: &'static str) -> Result<String, WireError> {
        let offset = self.offset();
        let len = self.u8(what)?;
        let bytes = self.bytes(u64::from(len), 255, what)?;
        String::from_utf8(bytes).map_err(|_| WireError::NotText { offset, what })
    }
}

/// Reads values off a byte stream through a buffer.
#[derive(Debug)]
pub struct WireReader<R> {
    inner: R,
    buffer: Vec<u8>,
    /// As long as `buffer` may become, bytes.
    capacity: usize,
    /// The bytes of `buffer` that are read and not taken.
    start: usize,
    end: usize,
    offset: u64,
}

impl<R: Read> WireReader<R> {
    /// A reader at the start of `inner`.
    pub fn new(inner: R) -> Self {
        Self::with_capacity(inner, PEEK_MAX)
    }

    /// A reader whose buffer holds up to `capacity` bytes, and at least [`PEEK_MAX`]: it grows with
    /// a stream that fills it, so that a short one costs no more than it is long.
    pub fn with_capacity(inner: R, capacity: usize) -> Self {
        let capacity = capacity.max(PEEK_MAX);
        Self { inner, buffer: vec![0; PEEK_MAX], capacity, start: 0, end: 0, offset: 0 }
    }

    /// The stream underneath; what was read ahead is lost.
    pub fn into_inner(self) -> R {
        self.inner
    }

    /// The stream underneath.
    pub fn get_ref(&self) -> &R {
        &self.inner
    }

    /// The stream underneath, which must not be read.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.inner
    }

    /// The same stream from here on by way of another handle; what was read ahead stays.
    pub fn map<S>(self, other: impl FnOnce(R) -> S) -> WireReader<S> {
        let Self { inner, buffer, capacity, start, end, offset } = self;
        WireReader { inner: other(inner), buffer, capacity, start, end, offset }
    }

    /// Moves what was read and not taken to the front of a buffer that was full, or of a longer one.
    fn make_room(&mut self) {
        let unread = self.start..self.end;
        (self.start, self.end) = (0, unread.len());
        if self.buffer.len() == self.capacity {
            return self.buffer.copy_within(unread, 0);
        }
        // Memory that is new is zeros already; what a buffer is resized by would be written first.
        let mut longer = vec![0; self.capacity.min(2 * self.buffer.len())];
        longer[..unread.len()].copy_from_slice(&self.buffer[unread]);
        self.buffer = longer;
    }

    /// Whether the stream has ended here.
    ///
    /// # Errors
    ///
    /// When it fails.
    pub fn is_at_end(&mut self) -> io::Result<bool> {
        Ok(self.start == self.end && !self.read_ahead()?)
    }

    fn fail(&self, what: &'static str, source: Option<io::Error>) -> WireError {
        let offset = self.offset + (self.end - self.start) as u64;
        match source {
            None => WireError::Truncated { offset, what },
            Some(source) => WireError::Io { offset, what, source },
        }
    }
}

impl<R: Read + Seek> WireReader<R> {
    /// Goes `len` bytes on without reading what lies between; nothing says whether it is there.
    ///
    /// # Errors
    ///
    /// When that is nowhere, or the stream fails.
    pub fn seek_forward(&mut self, len: u64) -> io::Result<()> {
        let buffered = (self.end - self.start) as u64;
        if len <= buffered {
            self.take(len as usize);
            return Ok(());
        }
        let far = || io::Error::from(io::ErrorKind::InvalidInput);
        let offset = self.offset.checked_add(len).ok_or_else(far)?;
        let beyond = i64::try_from(len - buffered).map_err(|_| far())?;
        self.inner.seek_relative(beyond)?;
        (self.start, self.end, self.offset) = (0, 0, offset);
        Ok(())
    }
}

impl<R: Read> WireRead for WireReader<R> {
    fn buffered(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    fn read_ahead(&mut self) -> io::Result<bool> {
        if self.end == self.buffer.len() {
            self.make_room();
            if self.end == self.buffer.len() {
                return Ok(true);
            }
        } else if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        loop {
            match self.inner.read(&mut self.buffer[self.end..]) {
                Ok(read) => {
                    self.end += read;
                    return Ok(read != 0);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn offset(&self) -> u64 {
        self.offset
    }

    fn peek(&mut self, len: usize, what: &'static str) -> Result<&[u8], WireError> {
        assert!(len <= PEEK_MAX, "more is peeked than a buffer holds");
        if self.start + len > self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        while self.end - self.start < len {
            match self.read_ahead() {
                Ok(true) => {}
                Ok(false) => return Err(self.fail(what, None)),
                Err(error) => return Err(self.fail(what, Some(error))),
            }
        }
        Ok(&self.buffer[self.start..self.start + len])
    }

    fn take(&mut self, len: usize) {
        assert!(len <= self.end - self.start, "bytes are taken that were not read");
        self.start += len;
        self.offset += len as u64;
    }

    fn read_exact(&mut self, buf: &mut [u8], what: &'static str) -> Result<(), WireError> {
        let mut done = 0;
        while done < buf.len() {
            if self.start == self.end {
                match self.read_ahead() {
                    Ok(true) => {}
                    Ok(false) => return Err(self.fail(what, None)),
                    Err(error) => return Err(self.fail(what, Some(error))),
                }
            }
            let len = (buf.len() - done).min(self.end - self.start);
            buf[done..done + len].copy_from_slice(&self.buffer[self.start..self.start + len]);
            self.take(len);
            done += len;
        }
        Ok(())
    }
}

/// Appends big-endian values to bytes that will be sent.
pub trait WireWrite {
    /// Bytes as they are.
    fn put(&mut self, bytes: &[u8]);

    /// A byte.
    fn put_u8(&mut self, value: u8) {
        self.put(&[value]);
    }

    /// 16 bits, big-endian.
    fn put_be16(&mut self, value: u16) {
        self.put(&value.to_be_bytes());
    }

    /// 32 bits, big-endian.
    fn put_be32(&mut self, value: u32) {
        self.put(&value.to_be_bytes());
    }

    /// 64 bits, big-endian.
    fn put_be64(&mut self, value: u64) {
        self.put(&value.to_be_bytes());
    }

    /// A name: a length byte and the bytes.
    ///
    /// # Panics
    ///
    /// When it is longer than 255 bytes, which is checked where a name is registered.
    fn put_name(&mut self, name: &str) {
        self.put_u8(u8::try_from(name.len()).expect("names have at most 255 bytes"));
        self.put(name.as_bytes());
    }
}

impl WireWrite for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests;
