//! Finding out which pages are written while they are sent.

use std::io;

use super::page_bitmap::PageBitmap;
use crate::ByteRange;

/// Finds out which pages of one RAM block are written. Ranges are bytes from the start of the
/// block; pages are target pages.
///
/// A write is never missed: what a tracker cannot tell apart it reports.
pub trait DirtyTracker: Send {
    /// Starts to log writes to `populated`. The rest of the block is discarded, and must not be
    /// made to cost anything.
    ///
    /// # Errors
    ///
    /// When writes cannot be logged; nothing is then.
    fn start(&mut self, populated: &[ByteRange]) -> io::Result<()>;

    /// Adds the pages written since logging started, or since they were reported or cleared last.
    ///
    /// # Errors
    ///
    /// When the log cannot be read.
    fn sync(&mut self, dirty: &mut PageBitmap) -> io::Result<()>;

    /// Makes sure that writes to `range` from now on are reported: called before its pages are
    /// read. What was written before may be forgotten.
    ///
    /// # Errors
    ///
    /// When the log cannot be cleared.
    fn clear(&mut self, range: ByteRange) -> io::Result<()>;

    /// Ends logging.
    ///
    /// # Errors
    ///
    /// When it cannot be ended.
    fn stop(&mut self) -> io::Result<()>;
}

/// The tracker of memory that nobody writes: the guest is stopped.
#[derive(Clone, Copy, Debug, Default)]
pub struct NeverWritten;

impl DirtyTracker for NeverWritten {
    fn start(&mut self, _populated: &[ByteRange]) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self, _dirty: &mut PageBitmap) -> io::Result<()> {
        Ok(())
    }

    fn clear(&mut self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
}
