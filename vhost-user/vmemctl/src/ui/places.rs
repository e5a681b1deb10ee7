//! How many browsers are served, and who waits for a place.
//!
//! Every program of this host can connect. A connection that has not shown the token is one of few, which are of
//! no use to hold: the one that has waited longest goes when another comes. One that has shown it has a place
//! until it ends.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// Browsers' connections at a time. A page has three or four. The daemon serves 64 clients in all.
pub(super) const CONNECTIONS: usize = 24;

/// Connections at a time that have not shown the token.
pub(super) const UNPROVEN: usize = 16;

/// All places.
#[derive(Debug)]
pub(super) struct Places {
    free: Arc<Semaphore>,
    unproven: Mutex<VecDeque<Arc<Waiting>>>,
}

/// One connection.
#[derive(Debug, Default)]
struct Waiting {
    ousted: Notify,
    place: OnceLock<OwnedSemaphorePermit>,
    answered: AtomicBool,
}

/// One connection's place, or its wait for one; given up when dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    waiting: Arc<Waiting>,
}

impl Places {
    pub(super) fn new() -> Arc<Self> {
        let free = Arc::new(Semaphore::new(CONNECTIONS));
        Arc::new(Self { free, unproven: Mutex::default() })
    }

    /// A connection that has shown nothing. One that has waited for longer may be ousted.
    pub(super) fn enter(self: &Arc<Self>) -> Place {
        let waiting = Arc::new(Waiting::default());
        let mut unproven = self.unproven();
        unproven.push_back(Arc::clone(&waiting));
        if unproven.len() > UNPROVEN
            && let Some(longest) = unproven.pop_front()
        {
            longest.ousted.notify_one();
        }
        Place { places: Arc::clone(self), waiting }
    }

    fn unproven(&self) -> MutexGuard<'_, VecDeque<Arc<Waiting>>> {
        self.unproven.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self, waiting: &Arc<Waiting>) {
        self.unproven().retain(|other| !Arc::ptr_eq(other, waiting));
    }
}

impl Place {
    /// The connection has shown the token. False when all places are taken.
    pub(super) fn prove(&self) -> bool {
        if self.is_proven() {
            return true;
        }
        let Ok(place) = Arc::clone(&self.places.free).try_acquire_owned() else { return false };
        let _ = self.waiting.place.set(place);
        self.places.forget(&self.waiting);
        true
    }

    /// Whether it has shown the token, and has a place.
    pub(super) fn is_proven(&self) -> bool {
        self.waiting.place.get().is_some()
    }

    /// Something is answered from now on.
    pub(super) fn answer(&self) {
        self.waiting.answered.store(true, Ordering::Relaxed);
    }

    /// Whether something was answered.
    pub(super) fn is_answered(&self) -> bool {
        self.waiting.answered.load(Ordering::Relaxed)
    }

    /// Waits until the connection has to make room for others.
    pub(super) async fn ousted(&self) {
        self.waiting.ousted.notified().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.forget(&self.waiting);
    }
}
