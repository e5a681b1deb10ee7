//! Several trackers of one block, for writers that no single one sees.

use std::io;

use ram_discard::{ByteRange, try_all};

use super::DirtyTracker;
use crate::page_bitmap::PageBitmap;

/// Reports what any of its trackers reports.
#[derive(Default)]
pub struct Merged(Vec<Box<dyn DirtyTracker>>);

impl Merged {
    /// All of `trackers`, which track the same block.
    pub fn new(trackers: Vec<Box<dyn DirtyTracker>>) -> Self {
        Self(trackers)
    }
}

impl DirtyTracker for Merged {
    fn start(&mut self, populated: &[ByteRange]) -> io::Result<()> {
        let all = 0..self.0.len();
        try_all(
            &mut *self.0,
            all,
            |trackers, index| trackers[index].start(populated),
            // What cannot be stopped only costs.
            |trackers, index| drop(trackers[index].stop()),
        )
    }

    fn sync(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
        self.0.iter_mut().try_for_each(|tracker| tracker.sync(dirty))
    }

    fn clear(&mut self, range: ByteRange) -> io::Result<()> {
        self.0.iter_mut().try_for_each(|tracker| tracker.clear(range))
    }

    fn populate(&mut self, range: ByteRange) -> io::Result<()> {
        let all = 0..self.0.len();
        try_all(
            &mut *self.0,
            all,
            |trackers, index| trackers[index].populate(range),
            |trackers, index| drop(trackers[index].discard(range)),
        )
    }

    fn discard(&mut self, range: ByteRange) -> io::Result<()> {
        self.0.iter_mut().try_for_each(|tracker| tracker.discard(range))
    }

    /// Stops all of them, whatever some of them say; the first error is returned.
    fn stop(&mut self) -> io::Result<()> {
        let mut result = Ok(());
        for tracker in &mut self.0 {
            result = result.and(tracker.stop());
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use std::sync::Arc;

    /// Reports one page, or fails, and writes down what it is asked.
    struct Scripted {
        name: &'static str,
        page: u64,
        fails: bool,
        calls: Arc<Mutex<Vec<String>>>,
    }

    impl Scripted {
        fn call(&self, what: &str) -> io::Result<()> {
            self.calls.lock().push(format!("{what} {}", self.name));
            if self.fails { Err(io::Error::other(self.name)) } else { Ok(()) }
        }
    }

    impl DirtyTracker for Scripted {
        fn start(&mut self, _: &[ByteRange]) -> io::Result<()> {
            self.call("start")
        }

        fn sync(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
            dirty.set(self.page);
            self.call("sync")
        }

        fn clear(&mut self, range: ByteRange) -> io::Result<()> {
            self.call(&format!("clear {range}"))
        }

        fn populate(&mut self, _: ByteRange) -> io::Result<()> {
            self.call("populate")
        }

        fn discard(&mut self, _: ByteRange) -> io::Result<()> {
            self.call("discard")
        }

        fn stop(&mut self) -> io::Result<()> {
            self.call("stop")
        }
    }

    fn merged(fails: [bool; 3]) -> (Merged, Arc<Mutex<Vec<String>>>) {
        let calls = Arc::new(Mutex::new(Vec::new()));
        let tracker = |page: usize| -> Box<dyn DirtyTracker> {
            let name = ["a", "b", "c"][page];
            let calls = Arc::clone(&calls);
            Box::new(Scripted { name, page: page as u64, fails: fails[page], calls })
        };
        (Merged::new((0..3).map(tracker).collect()), calls)
    }

    #[test]
    fn pages_that_any_tracker_reports_are_reported() {
        let (mut merged, calls) = merged([false; 3]);
        let mut dirty = PageBitmap::new(8);
        merged.start(&[]).unwrap();
        merged.sync(&mut dirty).unwrap();
        assert!(dirty.runs(0..8).eq(std::iter::once(0..3)));
        calls.lock().clear();
        merged.clear(ByteRange::new(0, 4096).unwrap()).unwrap();
        assert_eq!(calls.lock().len(), 3);
    }

    #[test]
    fn trackers_that_started_are_stopped_when_one_cannot_start() {
        let (mut merged, calls) = merged([false, false, true]);
        assert_eq!(merged.start(&[]).unwrap_err().to_string(), "c");
        assert_eq!(*calls.lock(), ["start a", "start b", "start c", "stop b", "stop a"]);
    }

    #[test]
    fn what_one_cannot_track_is_discarded_again_by_those_that_could() {
        let range = ByteRange::new(0, 4096).unwrap();
        let (mut some, calls) = merged([false, false, true]);
        assert_eq!(some.populate(range).unwrap_err().to_string(), "c");
        let expected = ["populate a", "populate b", "populate c", "discard b", "discard a"];
        assert_eq!(*calls.lock(), expected);
        let (mut all, calls) = merged([false; 3]);
        all.populate(range).unwrap();
        all.discard(range).unwrap();
        assert_eq!(calls.lock().len(), 6);
    }

    #[test]
    fn all_are_stopped_though_one_fails() {
        let (mut merged, calls) = merged([true, false, true]);
        assert_eq!(merged.stop().unwrap_err().to_string(), "a");
        assert_eq!(*calls.lock(), ["stop a", "stop b", "stop c"]);
    }
}
