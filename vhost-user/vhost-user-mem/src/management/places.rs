//! The places of connections: a limited number, none of which can be held by doing nothing.

use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// The places of all connections.
pub(super) struct Places {
    limit: usize,
    taken: Vec<Weak<Place>>,
}

/// The place of a connection, for as long as it is held.
pub(super) struct Place {
    state: Mutex<State>,
    lost: Notify,
}

struct State {
    /// Requests whose answer is not over.
    served: u32,
    /// When the last answer was over, or the connection began.
    since: Instant,
    lost: bool,
}

/// A request that is served; until this is dropped, the place is not idle.
pub(super) struct Serving(Arc<Place>);

impl Places {
    /// As many as `limit`.
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, taken: Vec::new() }
    }

    /// A place for one more connection. When none is free, the connection that is idle for longest
    /// loses its own; `None` when requests are served on all.
    pub(super) fn take(&mut self) -> Option<Arc<Place>> {
        self.taken.retain(|place| place.upgrade().is_some_and(|place| !place.state.lock().lost));
        if self.taken.len() >= self.limit {
            let places = self.taken.iter().filter_map(Weak::upgrade);
            let idle = places.filter_map(|place| place.idle_since().map(|since| (since, place)));
            let (_, longest) = idle.min_by_key(|(since, _)| *since)?;
            if !longest.lose() {
                return None;
            }
        }
        let state = State { served: 0, since: Instant::now(), lost: false };
        let place = Arc::new(Place { state: Mutex::new(state), lost: Notify::new() });
        self.taken.push(Arc::downgrade(&place));
        Some(place)
    }
}

impl Place {
    fn idle_since(&self) -> Option<Instant> {
        let state = self.state.lock();
        (state.served == 0).then_some(state.since)
    }

    /// Takes the place away, unless a request came meanwhile.
    fn lose(&self) -> bool {
        let mut state = self.state.lock();
        state.lost = state.served == 0;
        if state.lost {
            self.lost.notify_one();
        }
        state.lost
    }

    /// A request has come. `None` when the place was lost before.
    pub(super) fn serve(self: &Arc<Self>) -> Option<Serving> {
        let mut state = self.state.lock();
        if state.lost {
            return None;
        }
        state.served += 1;
        Some(Serving(Arc::clone(self)))
    }

    /// Waits until the place is lost.
    pub(super) async fn lost(&self) {
        self.lost.notified().await;
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.served -= 1;
        state.since = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_lost(place: &Place) -> bool {
        place.state.lock().lost
    }

    #[test]
    fn the_place_that_is_idle_for_longest_is_lost_to_a_new_connection() {
        let mut places = Places::new(3);
        let first: Vec<_> = (0..3).map(|_| places.take().unwrap()).collect();
        // The first has asked for something since, and the second is being answered.
        drop(first[0].serve().unwrap());
        let serving = first[1].serve().unwrap();
        let fourth = places.take().unwrap();
        assert!(!is_lost(&first[0]) && !is_lost(&first[1]) && is_lost(&first[2]));
        let fifth = places.take().unwrap();
        assert!(is_lost(&first[0]) && !is_lost(&first[1]) && !is_lost(&fourth));
        let served = [fourth.serve().unwrap(), fifth.serve().unwrap()];
        assert!(places.take().is_none(), "requests are served on all");
        drop(serving);
        let sixth = places.take().unwrap();
        assert!(is_lost(&first[1]));
        assert!(first[1].serve().is_none(), "a request that comes too late");
        drop((served, sixth));
    }

    #[test]
    fn a_place_of_a_connection_that_ended_is_free() {
        let mut places = Places::new(1);
        drop(places.take().unwrap());
        let second = places.take().unwrap();
        assert!(!is_lost(&second));
    }
}
