//! Reading a file from front to back, passing over what is of no interest.

use std::io::{self, Read, Seek};

use vmstate::wire::{WireError, WireRead, WireReader};

/// Large enough that the pages of a plain stream are read, not sought, past.
const BUFFER: usize = 1 << 20;

/// A file as a stream whose end is known.
pub(crate) struct FileReader<R> {
    inner: WireReader<R>,
    len: u64,
}

impl<R: Read + Seek> FileReader<R> {
    /// At the start of `file`, which has `len` bytes.
    pub fn new(mut file: R, len: u64) -> io::Result<Self> {
        file.rewind()?;
        Ok(Self { inner: WireReader::with_capacity(file, BUFFER), len })
    }

    /// Bytes from here to the end of the file.
    pub fn left(&self) -> u64 {
        self.len.saturating_sub(self.inner.offset())
    }
}

impl<R: Read + Seek> WireRead for FileReader<R> {
    fn offset(&self) -> u64 {
        self.inner.offset()
    }

    fn peek(&mut self, len: usize, what: &'static str) -> Result<&[u8], WireError> {
        self.inner.peek(len, what)
    }

    fn take(&mut self, len: usize) {
        self.inner.take(len);
    }

    fn read_exact(&mut self, buf: &mut [u8], what: &'static str) -> Result<(), WireError> {
        self.inner.read_exact(buf, what)
    }

    fn buffered(&self) -> &[u8] {
        self.inner.buffered()
    }

    fn read_ahead(&mut self) -> io::Result<bool> {
        self.inner.read_ahead()
    }

    fn skip(&mut self, len: u64, what: &'static str) -> Result<(), WireError> {
        if len > self.left() {
            return Err(WireError::Truncated { offset: self.len, what });
        }
        // Reading on costs less than a system call when it is only a little.
        while len > self.inner.buffered().len() as u64 && len <= BUFFER as u64 / 4 {
            match self.inner.read_ahead() {
                Ok(true) => {}
                Ok(false) => return Err(WireError::Truncated { offset: self.len, what }),
                Err(source) => {
                    return Err(WireError::Io { offset: self.inner.offset(), what, source });
                }
            }
        }
        let offset = self.inner.offset();
        self.inner.seek_forward(len).map_err(|source| WireError::Io { offset, what, source })
    }
}
