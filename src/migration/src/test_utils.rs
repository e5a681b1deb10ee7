//! Where tests and benches send streams.

use std::fs::File;
use std::hint::black_box;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::MemfdFlags;

use crate::channel::{GatherWrite, Sink};

/// A stream that is kept, in a file in memory.
#[derive(Debug)]
pub struct KeptStream {
    file: File,
    written: u64,
}

impl KeptStream {
    /// An empty one.
    ///
    /// # Errors
    ///
    /// When there is no memory for it.
    pub fn new() -> io::Result<Self> {
        let file = rustix::fs::memfd_create("stream", MemfdFlags::CLOEXEC)?;
        Ok(Self { file: file.into(), written: 0 })
    }

    /// The stream, to be read from its start.
    pub fn into_file(self) -> File {
        self.file
    }

    /// All that was written.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn bytes(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.written as usize];
        self.file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }
}

impl Sink for KeptStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.written)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn write_gathered(&mut self, gathered: &mut GatherWrite) -> io::Result<()> {
        gathered.write_at(&self.file, self.written)?;
        self.written += gathered.len_bytes();
        gathered.clear();
        Ok(())
    }

    fn written(&self) -> u64 {
        self.written
    }
}

/// A stream of which only the length is kept.
#[derive(Clone, Copy, Debug, Default)]
pub struct CountedStream(u64);

impl Sink for CountedStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0 += bytes.len() as u64;
        Ok(())
    }

    fn write_gathered(&mut self, gathered: &mut GatherWrite) -> io::Result<()> {
        self.0 += gathered.len_bytes();
        black_box(&*gathered);
        gathered.clear();
        Ok(())
    }

    fn written(&self) -> u64 {
        self.0
    }
}
