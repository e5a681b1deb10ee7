//! What was done, how often, and what was found to be wrong.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Display;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Actions that are kept for the file about a violation.
const KEPT: usize = 5000;
/// Those that are printed.
const PRINTED: usize = 40;

/// The record of one run, which ends with its time or with the first violation.
pub(super) struct Journal {
    start: Instant,
    end: Duration,
    records: Mutex<Records>,
}

#[derive(Default)]
struct Records {
    last: VecDeque<String>,
    counts: BTreeMap<&'static str, u64>,
    violation: Option<String>,
}

impl Journal {
    pub(super) fn new(end: Duration) -> Self {
        Self { start: Instant::now(), end, records: Mutex::default() }
    }

    /// An action or fault of a `kind`, which is counted.
    pub(super) fn did(&self, kind: &'static str, detail: impl Display) {
        let mut records = self.records();
        *records.counts.entry(kind).or_default() += 1;
        if records.last.len() == KEPT {
            records.last.pop_front();
        }
        let line = format!("{:9.3} {kind}: {detail}", self.start.elapsed().as_secs_f64());
        records.last.push_back(line);
    }

    /// Something that is counted and not told.
    pub(super) fn count(&self, kind: &'static str, times: u64) {
        *self.records().counts.entry(kind).or_default() += times;
    }

    /// An invariant that does not hold. The first one is reported.
    pub(super) fn violated(&self, invariant: &str, detail: impl Display) {
        let at = self.start.elapsed().as_secs_f64();
        let violation = format!("{at:9.3} {invariant}: {detail}");
        self.records().violation.get_or_insert(violation);
    }

    pub(super) fn violation(&self) -> Option<String> {
        self.records().violation.clone()
    }

    pub(super) fn is_over(&self) -> bool {
        self.start.elapsed() >= self.end || self.records().violation.is_some()
    }

    /// Sleeps, but not past the end.
    pub(super) fn sleep(&self, time: Duration) {
        let until = Instant::now() + time;
        while !self.is_over() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            thread::sleep(left.min(Duration::from_millis(50)));
        }
    }

    pub(super) fn progress(&self) -> String {
        let records = self.records();
        let actions: u64 = records.counts.values().sum();
        let last = records.last.back().map_or("", String::as_str);
        let elapsed = self.start.elapsed().as_secs();
        format!("{elapsed:4} s of {} s, {actions} actions; {last}", self.end.as_secs())
    }

    /// The actions that are printed, and all that are kept.
    pub(super) fn last_actions(&self) -> (String, String) {
        let records = self.records();
        let lines =
            |skip| records.last.iter().skip(skip).map(|line| format!("  {line}\n")).collect();
        (lines(records.last.len().saturating_sub(PRINTED)), lines(0))
    }

    pub(super) fn summary(&self) -> String {
        let line = |(kind, count): (&&str, &u64)| format!("  {kind:<44}{count:>10}\n");
        self.records().counts.iter().map(line).collect()
    }

    fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_violation_ends_the_run_and_is_kept() {
        let journal = Journal::new(Duration::from_secs(3600));
        (0..50).for_each(|number| journal.did("step", number));
        assert!(!journal.is_over());
        journal.violated("first", 1);
        journal.violated("second", 2);
        assert!(journal.is_over() && journal.violation().unwrap().contains("first: 1"));
        let (last, all) = journal.last_actions();
        assert!(last.contains("step: 49") && !last.contains("step: 9\n"));
        assert!(all.contains("step: 0\n"));
        assert!(journal.summary().contains("50"));
    }
}
