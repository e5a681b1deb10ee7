//! A file that is written at places.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::migration::channel::Sink;
use crate::migration::error::MigrationError;
use crate::sys::GatherWrite;

/// A stream in a file, with gaps for the pages.
pub(super) struct FileSink<'a> {
    pub(super) file: &'a File,
    /// Where the stream goes on.
    pub(super) position: u64,
}

impl<'a> FileSink<'a> {
    /// At the start of an empty file: what somebody else wrote is not written over.
    pub(super) fn of_empty(file: &'a File) -> Result<Self, MigrationError> {
        let length = file.metadata().map_err(MigrationError::io("look at the file"))?.len();
        if length != 0 {
            let what = "write a snapshot to a file with content";
            return Err(MigrationError::Io { what, source: io::ErrorKind::AlreadyExists.into() });
        }
        Ok(Self { file, position: 0 })
    }
}

impl Sink for FileSink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.position)?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn write_gathered(&mut self, gathered: &mut GatherWrite) -> io::Result<()> {
        gathered.write_at(self.file, self.position)?;
        self.position += gathered.len_bytes();
        gathered.clear();
        Ok(())
    }

    fn written(&self) -> u64 {
        self.position
    }
}
