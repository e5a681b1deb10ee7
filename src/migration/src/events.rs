//! What happens to a migration, as a channel that is subscribed to.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::progress::Status;

/// What has happened, under QEMU's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The state has changed (QEMU's event MIGRATION). The first event of each subscriber is the state at that moment.
    Status(Status),
    /// Dirty pages were collected the n-th time (MIGRATION_PASS).
    Pass(u64),
    /// vCPUs are kept from running for so many percent of the time from now on.
    Throttle(u8),
    /// The guest, which stood still for so long, continues: at the destination, or here beside a background
    /// snapshot.
    Switchover(Duration),
    /// The subscriber was slow: so many events before this one are lost. The state is `status` now.
    Dropped {
        /// How many events are lost.
        events: u64,
        /// The state after them.
        status: Status,
    },
}

/// Events of a migration, in their order. A bounded number waits to be taken; when there are more, the oldest
/// give way to [`Event::Dropped`], and the migration goes on.
#[derive(Debug)]
pub struct Events {
    queue: Arc<Queue>,
}

#[derive(Debug)]
struct Queue {
    waiting: Mutex<Waiting>,
    arrived: Condvar,
}

#[derive(Debug)]
struct Waiting {
    events: VecDeque<Event>,
    capacity: usize,
    /// Events lost before those that wait.
    dropped: u64,
    /// The state after those.
    status: Status,
    /// Whether there will be no more.
    ended: bool,
}

impl Waiting {
    fn push(&mut self, event: Event) {
        if self.events.len() == self.capacity
            && let Some(oldest) = self.events.pop_front()
        {
            self.dropped += 1;
            if let Event::Status(status) = oldest {
                self.status = status;
            }
        }
        self.events.push_back(event);
    }

    fn take(&mut self) -> Option<Event> {
        if self.dropped != 0 {
            let events = std::mem::take(&mut self.dropped);
            return Some(Event::Dropped { events, status: self.status });
        }
        self.events.pop_front()
    }
}

impl Events {
    /// The next event, if one waits.
    pub fn try_next(&self) -> Option<Event> {
        self.queue.waiting.lock().take()
    }

    /// Waits for the next event; `None` when `patience` has ended, or the migration's
    /// [`Progress`](crate::Progress) is gone and there are no more.
    pub fn next_within(&self, patience: Duration) -> Option<Event> {
        let deadline = Instant::now().checked_add(patience);
        let mut waiting = self.queue.waiting.lock();
        loop {
            let next = waiting.take();
            if next.is_some() || waiting.ended {
                return next;
            }
            match deadline {
                Some(deadline) => {
                    if self.queue.arrived.wait_until(&mut waiting, deadline).timed_out() {
                        return waiting.take();
                    }
                }
                None => self.queue.arrived.wait(&mut waiting),
            }
        }
    }
}

/// All events until the migration's [`Progress`](crate::Progress) is gone.
impl Iterator for Events {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        self.next_within(Duration::MAX)
    }
}

/// Tells all subscribers; waits for none.
#[derive(Debug, Default)]
pub(crate) struct Publisher {
    subscribers: Mutex<Vec<Weak<Queue>>>,
}

impl Publisher {
    /// The most events that wait, whatever is asked for.
    const CAPACITY_MAX: usize = 1 << 16;

    /// A new subscriber, who is told `status` first.
    pub(crate) fn subscribe(&self, capacity: usize, status: Status) -> Events {
        let capacity = capacity.clamp(1, Self::CAPACITY_MAX);
        let events = VecDeque::from([Event::Status(status)]);
        let waiting = Waiting { events, capacity, dropped: 0, status, ended: false };
        let queue = Arc::new(Queue { waiting: Mutex::new(waiting), arrived: Condvar::new() });
        self.subscribers.lock().push(Arc::downgrade(&queue));
        Events { queue }
    }

    pub(crate) fn tell(&self, event: Event) {
        self.for_each(|queue| queue.waiting.lock().push(event));
    }

    /// Forgets those that have gone.
    fn for_each(&self, tell: impl Fn(&Queue)) {
        self.subscribers.lock().retain(|subscriber| {
            let Some(queue) = subscriber.upgrade() else { return false };
            tell(&queue);
            queue.arrived.notify_all();
            true
        });
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.for_each(|queue| queue.waiting.lock().ended = true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_subscriber_is_told_the_state_first_and_then_all_in_order_until_the_end() {
        let publisher = Publisher::default();
        let early = publisher.subscribe(8, Status::None);
        publisher.tell(Event::Status(Status::Setup));
        let late = publisher.subscribe(8, Status::Setup);
        assert_eq!(early.try_next(), Some(Event::Status(Status::None)));
        publisher.tell(Event::Pass(1));
        let waits = std::thread::spawn(move || late.collect::<Vec<_>>());
        publisher.tell(Event::Throttle(20));
        publisher.tell(Event::Status(Status::Completed));
        drop(publisher);
        let rest = [
            Event::Status(Status::Setup),
            Event::Pass(1),
            Event::Throttle(20),
            Event::Status(Status::Completed),
        ];
        assert_eq!(waits.join().unwrap(), rest);
        assert_eq!(early.collect::<Vec<_>>(), rest);
    }

    #[test]
    fn a_slow_subscriber_is_told_what_it_lost_and_the_state_after_that() {
        let publisher = Publisher::default();
        let slow = publisher.subscribe(2, Status::None);
        for event in [Event::Status(Status::Setup), Event::Status(Status::Active)] {
            publisher.tell(event);
        }
        (1..=10).for_each(|pass| publisher.tell(Event::Pass(pass)));
        // The first state, two changes and eight passes.
        let dropped = Event::Dropped { events: 11, status: Status::Active };
        let told: Vec<_> = std::iter::from_fn(|| slow.try_next()).collect();
        assert_eq!(told, [dropped, Event::Pass(9), Event::Pass(10)]);
        // It may be slow again.
        (11..=13).for_each(|pass| publisher.tell(Event::Pass(pass)));
        let dropped = Event::Dropped { events: 1, status: Status::Active };
        assert_eq!(slow.try_next(), Some(dropped));
        assert_eq!(slow.next_within(Duration::ZERO), Some(Event::Pass(12)));
    }

    #[test]
    fn a_subscriber_that_has_gone_is_forgotten_and_none_asks_for_more_than_there_may_be() {
        let publisher = Publisher::default();
        let gone = publisher.subscribe(usize::MAX, Status::None);
        assert_eq!(gone.queue.waiting.lock().capacity, Publisher::CAPACITY_MAX);
        assert_eq!(publisher.subscribe(0, Status::None).queue.waiting.lock().capacity, 1);
        drop(gone);
        publisher.tell(Event::Pass(1));
        assert!(publisher.subscribers.lock().is_empty());
    }
}
