//! The end of a ring's worker, of which the crate tells nothing.

use std::cell::RefCell;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::confinement;
use crate::metrics::Metrics;

/// Ends the connection of a worker that ended without having been told to: nothing would serve the
/// ring any more, and the guest would wait for good.
pub struct Watch {
    /// A duplicate of the front-end's socket.
    front: UnixStream,
    metrics: Arc<Metrics>,
    planned: AtomicBool,
    lost: AtomicBool,
}

thread_local! {
    static WATCHED: RefCell<Option<Watched>> = const { RefCell::new(None) };
}

/// Lives as long as the thread that it was made in.
struct Watched(Arc<Watch>);

impl Watch {
    /// Over the connection whose other end is at `front`.
    pub fn new(front: UnixStream, metrics: Arc<Metrics>) -> Self {
        Self { front, metrics, planned: AtomicBool::new(false), lost: AtomicBool::new(false) }
    }

    /// From now on, the end of the calling thread is watched, also by a panic.
    pub fn attend(self: &Arc<Self>) {
        WATCHED.with_borrow_mut(|watched| {
            watched.get_or_insert_with(|| {
                sandbox::confine_thread(confinement::WORKER);
                self.metrics.worker_begins();
                Watched(Arc::clone(self))
            });
        });
    }

    /// The worker is about to end, as it should.
    pub fn plan(&self) {
        self.planned.store(true, Ordering::Release);
    }

    /// Whether the connection was ended here.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let watch = &self.0;
        watch.metrics.worker_ends();
        if watch.planned.load(Ordering::Acquire) {
            return;
        }
        watch.lost.store(true, Ordering::Release);
        watch.metrics.worker_lost();
        // Fails when the front-end was faster.
        let _ = watch.front.shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::thread;

    use vhost_user_backend::VhostUserBackend;
    use virtio_mem::controller::{InitialState, MemController};
    use virtio_mem::device::{Geometry, VirtioMem};
    use vmm_sys_util::epoll::EventSet;

    use crate::backend::{END_EVENT, MemBackend};
    use crate::queue::{AtomicMemory, Memory};

    fn watch() -> (Arc<Watch>, UnixStream) {
        let (front, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (Arc::new(Watch::new(front, Arc::default())), theirs)
    }

    #[test]
    fn a_worker_that_ends_by_an_error_or_a_panic_ends_its_connection() {
        for panics in [false, true] {
            let (watch, mut theirs) = watch();
            let watched = Arc::clone(&watch);
            let worker = thread::spawn(move || {
                watched.attend();
                watched.attend();
                assert_eq!(watched.metrics.workers(), 1);
                assert!(!panics, "as expected");
            });
            assert_eq!(worker.join().is_err(), panics);
            assert_eq!(watch.metrics.workers(), 0);
            assert!(watch.is_lost());
            assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        }
    }

    #[test]
    fn a_worker_that_is_told_to_end_does_not() {
        let (watch, mut theirs) = watch();
        let watched = Arc::clone(&watch);
        let worker = thread::spawn(move || {
            watched.attend();
            watched.plan();
        });
        worker.join().unwrap();
        assert!(!watch.is_lost());
        assert_eq!(theirs.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    }

    /// A back-end whose worker is watched, and the front-end's end of the connection.
    fn backend() -> (MemBackend, UnixStream) {
        let geometry = Geometry::new(1 << 32, 1 << 30, 2 << 20, None).unwrap();
        let start = InitialState::volatile(VirtioMem::new(geometry, 0).unwrap());
        let memory = AtomicMemory::new(Memory::new());
        let controller = Arc::new(MemController::new(start));
        let backend = MemBackend::new(controller, Arc::default(), Arc::default(), memory).unwrap();
        let (front, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (backend.watch_worker(Watch::new(front, Arc::default())), theirs)
    }

    #[test]
    fn a_worker_of_the_device_is_watched_from_its_first_event_to_the_end_of_the_connection() {
        for ends in [false, true] {
            let (backend, mut theirs) = backend();
            let served = backend.clone();
            let worker = thread::spawn(move || {
                served.handle_event(7, EventSet::IN, &[], 0).unwrap();
                if ends {
                    served.handle_event(END_EVENT, EventSet::IN, &[], 0).unwrap_err();
                }
            });
            worker.join().unwrap();
            assert_eq!(backend.worker_lost(), !ends);
            let read = theirs.read(&mut [0]).map_err(|error| error.kind());
            assert_eq!(read, if ends { Err(std::io::ErrorKind::WouldBlock) } else { Ok(0) });
        }
    }
}
