//! Where tests and benches send streams, and connections that break.

use std::fs::File;
use std::hint::black_box;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::thread;

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

/// Both ends of a connection through a relay. What comes back to the first end passes. Each piece that goes from there is
/// shown to `pass`: all of it passes, or so many bytes, after which the connection breaks.
///
/// # Errors
///
/// When there are no descriptors for it.
pub fn relay(
    mut pass: impl FnMut(&[u8]) -> ControlFlow<usize> + Send + 'static,
) -> io::Result<(UnixStream, UnixStream)> {
    let (source, mut near) = UnixStream::pair()?;
    let (mut far, destination) = UnixStream::pair()?;
    let (mut back_from, mut back_to) = (far.try_clone()?, near.try_clone()?);
    thread::spawn(move || {
        let _ = io::copy(&mut back_from, &mut back_to);
        let _ = back_to.shutdown(Shutdown::Both);
    });
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(read @ 1..) = near.read(&mut buffer) {
            let flow = pass(&buffer[..read]);
            let passing = flow.break_value().unwrap_or(read).min(read);
            if far.write_all(&buffer[..passing]).is_err() || flow.is_break() {
                break;
            }
        }
        let _ = far.shutdown(Shutdown::Both);
        let _ = near.shutdown(Shutdown::Both);
    });
    Ok((source, destination))
}

/// As [`relay`], of a connection that breaks once `limit` bytes went from the first end.
///
/// # Errors
///
/// When there are no descriptors for it.
pub fn breaking(limit: usize) -> io::Result<(UnixStream, UnixStream)> {
    let mut left = limit;
    relay(move |bytes| match left.checked_sub(bytes.len()) {
        None | Some(0) => ControlFlow::Break(left),
        Some(rest) => {
            left = rest;
            ControlFlow::Continue(())
        }
    })
}
