//! Clients that were dropped, and when they may come again.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::sys::peer_cred::PeerCred;

/// The longest pause, as a multiple of the first.
const LONGEST: u32 = 64;

/// So many times a user may have clients dropped before that counts for all of its processes: one
/// that comes again as another process does not escape the pause.
const USER_GRACE: u32 = 3;

/// Processes, and users, that are remembered.
const REMEMBERED: usize = 64;

/// Remembers which processes and users had clients dropped for a fault. Each time doubles the pause
/// before the next client of theirs is let in; as long again without a fault, and it is forgotten.
#[derive(Debug)]
pub(super) struct Admission {
    /// The first pause.
    pause: Duration,
    tables: Mutex<Tables>,
}

#[derive(Debug, Default)]
struct Tables {
    processes: Table<(u32, i32)>,
    users: Table<u32>,
}

#[derive(Debug)]
struct Table<K>(HashMap<K, Record>);

impl<K> Default for Table<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

#[derive(Clone, Copy, Debug)]
struct Record {
    /// Clients that were dropped.
    drops: u32,
    /// When the next one is let in.
    until: Instant,
    /// When it is forgotten that there was one.
    forget: Instant,
}

impl Admission {
    pub(super) fn new(pause: Duration) -> Self {
        Self { pause, tables: Mutex::default() }
    }

    /// For how long a client of this process is not let in.
    pub(super) fn pause(&self, cred: PeerCred, now: Instant) -> Option<Duration> {
        let tables = self.tables.lock();
        let process = tables.processes.0.get(&(cred.uid, cred.pid));
        let user = tables.users.0.get(&cred.uid);
        let until = process.into_iter().chain(user).map(|record| record.until).max()?;
        let left = until.saturating_duration_since(now);
        (!left.is_zero()).then_some(left)
    }

    /// A client of this process was dropped for its fault.
    pub(super) fn dropped(&self, cred: PeerCred, now: Instant) {
        if self.pause.is_zero() {
            return;
        }
        let mut tables = self.tables.lock();
        tables.processes.note((cred.uid, cred.pid), now, self.pause, 0);
        tables.users.note(cred.uid, now, self.pause, USER_GRACE);
    }
}

impl<K: Copy + Eq + Hash> Table<K> {
    fn note(&mut self, key: K, now: Instant, pause: Duration, grace: u32) {
        self.0.retain(|_, record| record.forget > now);
        if self.0.len() >= REMEMBERED
            && !self.0.contains_key(&key)
            && let Some(first) =
                self.0.iter().min_by_key(|(_, record)| record.until).map(|(&key, _)| key)
        {
            self.0.remove(&first);
        }
        let drops = self.0.get(&key).map_or(0, |record| record.drops).saturating_add(1);
        let longest = pause * LONGEST;
        let pause = match drops.checked_sub(grace + 1) {
            None => Duration::ZERO,
            Some(times) => {
                2u32.checked_pow(times).map_or(longest, |times| pause * times.min(LONGEST))
            }
        };
        let until = now + pause;
        self.0.insert(key, Record { drops, until, forget: until + longest });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn cred(pid: i32, uid: u32) -> PeerCred {
        PeerCred { pid, uid }
    }

    #[test]
    fn the_pause_grows_with_each_fault_and_is_forgotten_in_the_end() {
        let admission = Admission::new(SECOND);
        let mut now = Instant::now();
        assert_eq!(admission.pause(cred(7, 0), now), None);
        for expected in [1, 2, 4, 8, 16, 32, 64, 64] {
            admission.dropped(cred(7, 0), now);
            assert_eq!(admission.pause(cred(7, 0), now), Some(expected * SECOND));
            now += expected * SECOND;
            assert_eq!(admission.pause(cred(7, 0), now), None, "{expected}");
        }
        now += 64 * SECOND;
        admission.dropped(cred(8, 1), now);
        admission.dropped(cred(7, 0), now);
        assert_eq!(admission.pause(cred(7, 0), now), Some(SECOND), "forgotten");
    }

    #[test]
    fn a_user_whose_processes_take_turns_is_paused_as_a_whole_and_others_are_not() {
        let admission = Admission::new(SECOND);
        let now = Instant::now();
        for pid in 1..=3 {
            admission.dropped(cred(pid, 1000), now);
            assert_eq!(admission.pause(cred(99, 1000), now), None, "{pid} faults are forgiven");
        }
        admission.dropped(cred(4, 1000), now);
        assert_eq!(admission.pause(cred(99, 1000), now), Some(SECOND));
        admission.dropped(cred(5, 1000), now);
        assert_eq!(admission.pause(cred(99, 1000), now), Some(2 * SECOND));
        assert_eq!(admission.pause(cred(99, 1001), now), None);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_does_not_push_out_the_user() {
        let admission = Admission::new(SECOND);
        let now = Instant::now();
        for pid in 0..10_000 {
            admission.dropped(cred(pid, 1000), now);
        }
        let tables = admission.tables.lock();
        assert_eq!((tables.processes.0.len(), tables.users.0.len()), (REMEMBERED, 1));
        drop(tables);
        assert_eq!(admission.pause(cred(-1, 1000), now), Some(64 * SECOND));
    }
}
