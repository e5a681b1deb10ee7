//! Bringing an image to the disk while it is written, so that little is left to be waited for at its end.
//!
//! A thread does it: it may wait for the disk, and the threads that take pages must not.

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::thread;

use parking_lot::{Condvar, Mutex};

use crate::sys::writeback;

/// Written bytes for which it is worth to begin.
const STEP: u64 = 8 << 20;

/// Begins to write a file out whenever enough was written. Ends when it is dropped, without waiting for the disk.
pub(super) struct WriteOut(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Bytes since it began at last.
    written: u64,
    ended: bool,
}

impl WriteOut {
    /// For a file. Where there is no thread to be had, or it cannot be done, all is left to the end.
    pub fn start(file: &File) -> io::Result<Self> {
        let file = file.try_clone()?;
        // From its start, 0 bytes are all of it.
        Ok(Self::start_with(move || writeback::begin(&file, 0, 0)))
    }

    fn start_with(begin: impl Fn() -> io::Result<()> + Send + 'static) -> Self {
        let shared = Arc::<Shared>::default();
        let of_thread = Arc::clone(&shared);
        let run = move || {
            while of_thread.wait() {
                if begin().is_err() {
                    return;
                }
            }
        };
        // One that cannot be started only makes the end longer.
        let _ = thread::Builder::new().name("write-out".to_owned()).spawn(run);
        Self(shared)
    }

    /// So many bytes were written.
    pub fn wrote(&self, bytes: u64) {
        let mut state = self.0.state.lock();
        let before = state.written;
        state.written += bytes;
        if before < STEP && state.written >= STEP {
            self.0.changed.notify_one();
        }
    }
}

impl Shared {
    /// Waits until enough is written; false at the end.
    fn wait(&self) -> bool {
        let mut state = self.state.lock();
        while state.written < STEP && !state.ended {
            self.changed.wait(&mut state);
        }
        state.written = 0;
        !state.ended
    }
}

impl Drop for WriteOut {
    fn drop(&mut self) {
        self.0.state.lock().ended = true;
        self.0.changed.notify_one();
    }
}

impl fmt::Debug for WriteOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteOut").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    /// Nothing takes longer.
    const PATIENCE: Duration = Duration::from_secs(30);

    #[test]
    fn it_begins_for_each_step_and_ends_with_its_owner() {
        let (tell, told) = mpsc::channel();
        let out = WriteOut::start_with(move || {
            tell.send(()).unwrap();
            Ok(())
        });
        for _ in 0..3 {
            (0..STEP / 4096).for_each(|_| out.wrote(4096));
            told.recv_timeout(PATIENCE).unwrap();
        }
        out.wrote(STEP - 1);
        drop(out);
        // What is less than a step is left to the end.
        assert_eq!(told.recv_timeout(PATIENCE), Err(mpsc::RecvTimeoutError::Disconnected));
    }

    #[test]
    fn a_file_that_cannot_be_written_out_early_is_not_tried_again() {
        let (tell, told) = mpsc::channel();
        let out = WriteOut::start_with(move || {
            tell.send(()).unwrap();
            Err(io::ErrorKind::Unsupported.into())
        });
        out.wrote(STEP);
        told.recv_timeout(PATIENCE).unwrap();
        assert_eq!(told.recv_timeout(PATIENCE), Err(mpsc::RecvTimeoutError::Disconnected));
        out.wrote(STEP);
    }
}
