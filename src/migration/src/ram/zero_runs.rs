//! Zero pages that follow each other, zeroed at once.

use ram_discard::ByteRange;

/// A run of zero pages of one block.
#[derive(Debug, Default)]
pub(super) struct ZeroRun(Option<ByteRange>);

impl ZeroRun {
    /// Adds a page; false when it does not follow the ones before.
    pub(super) fn push(&mut self, page: ByteRange) -> bool {
        match self.0 {
            None => self.0 = Some(page),
            Some(run) if run.end() == page.start() => {
                self.0 = ByteRange::from_bounds(run.start(), page.end());
            }
            Some(_) => return false,
        }
        true
    }

    /// The run, which starts anew.
    pub(super) fn take(&mut self) -> Option<ByteRange> {
        self.0.take()
    }
}
