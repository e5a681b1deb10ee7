//! A file that is written at places.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::OFlags;

use crate::channel::Sink;
use crate::error::MigrationError;
use crate::sys::GatherWrite;

/// A stream in a file, with gaps for the pages.
pub(super) struct FileSink<'a> {
    pub(super) file: &'a File,
    /// Where the stream goes on.
    pub(super) position: u64,
    /// How large the file becomes at least, bytes.
    needed: u64,
}

impl<'a> FileSink<'a> {
    /// At the start of an empty file: what another program wrote is not written over.
    pub(super) fn of_empty(file: &'a File) -> Result<Self, MigrationError> {
        let length = file.metadata().map_err(MigrationError::io("look at the file"))?.len();
        if length != 0 {
            let what = "write a snapshot to a file with content";
            return Err(MigrationError::Io { what, source: io::ErrorKind::AlreadyExists.into() });
        }
        let flags = rustix::fs::fcntl_getfl(file)
            .map_err(|errno| MigrationError::io("read the flags of the file")(errno.into()))?;
        if flags.contains(OFlags::APPEND) {
            let why = "each page has its place in the file: open it without O_APPEND";
            let source = io::Error::new(io::ErrorKind::InvalidInput, why);
            let what = "write a snapshot to a file that is open for appending only";
            return Err(MigrationError::Io { what, source });
        }
        Ok(Self { file, position: 0, needed: 0 })
    }

    /// Says how large the file becomes at least, bytes.
    pub(super) fn will_need(&mut self, needed: u64) {
        self.needed = self.needed.max(needed);
    }

    /// Waits until what was written is on the disk, so that what is written next cannot be there without
    /// it.
    pub(super) fn sync(&self) -> Result<(), MigrationError> {
        match self.file.sync_data() {
            // Memory, and what cannot be synced.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            synced => synced.map_err(MigrationError::io("sync the snapshot")),
        }
    }

    /// Says of a file that may not become as large what its size comes from.
    fn explain(&self, error: io::Error) -> io::Error {
        if error.kind() != io::ErrorKind::FileTooLarge {
            return error;
        }
        let needed = self.needed.max(self.position);
        let what = format!(
            "{error}: each page has its place, so that the file is as large as all RAM blocks ({needed:#x} bytes), \
             though mostly holes; use a file system that allows files of this size"
        );
        io::Error::new(io::ErrorKind::FileTooLarge, what)
    }
}

impl Sink for FileSink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.position).map_err(|error| self.explain(error))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn write_gathered(&mut self, gathered: &mut GatherWrite) -> io::Result<()> {
        gathered.write_at(self.file, self.position).map_err(|error| self.explain(error))?;
        self.position += gathered.len_bytes();
        gathered.clear();
        Ok(())
    }

    fn written(&self) -> u64 {
        self.position
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_may_not_become_as_large_is_told_with_the_size_and_why() {
        let file = tempfile::tempfile().unwrap();
        if file.set_len(17 << 40).is_ok() {
            return eprintln!("skipped: files of 17 TiB are allowed here");
        }
        let mut sink = FileSink::of_empty(&file).unwrap();
        sink.will_need((17 << 40) + 4096);
        sink.position = 17 << 40;
        let error = sink.write(&[1]).unwrap_err().to_string();
        assert!(error.contains("0x110000001000 bytes"), "{error}");
        assert!(error.contains("as large as all RAM blocks"), "{error}");
    }
}
