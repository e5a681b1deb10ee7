//! Runs the cases of a profile, one after the other, and keeps what came of them.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::case::Case;
use crate::host;
use crate::journal::Journal;
use crate::record::{Outcome, Record};
use crate::run;
use crate::sweep::Profile;
use crate::units::{MIB, size, time};

/// Measures every case that the journal does not have; files go to `dir`.
///
/// # Errors
///
/// When the journal cannot be written. A case that fails is a record.
pub fn all(profile: Profile, journal: &mut Journal, dir: &Path) -> Result<Vec<Record>> {
    let cases = profile.cases();
    let count = cases.len();
    let due = cases.iter().filter(|case| journal.found(case).is_none());
    let mut left = Left::new(due.filter(|case| refusal(case, profile).is_none()).map(weight).sum());
    if journal.len_found() != 0 {
        eprintln!("{} of {count} cases are in the journal", journal.len_found());
    }
    let mut records = Vec::with_capacity(count);
    for (index, case) in cases.into_iter().enumerate() {
        if let Some(record) = journal.found(&case) {
            records.push(record.clone());
            continue;
        }
        let begin = Instant::now();
        let outcome = outcome(&case, profile, dir);
        if !matches!(outcome, Outcome::NotRun(_)) {
            left.done(weight(&case), begin.elapsed());
        }
        eprintln!("{:>4}/{count} {case}: {}{left}", index + 1, told(&outcome));
        let record = Record { case, outcome };
        journal.add(&record)?;
        records.push(record);
    }
    Ok(records)
}

fn outcome(case: &Case, profile: Profile, dir: &Path) -> Outcome {
    if let Some(reason) = refusal(case, profile) {
        return Outcome::NotRun(reason);
    }
    match run::run(case, dir) {
        Ok(figures) => Outcome::Measured(Box::new(figures)),
        Err(error) => Outcome::Failed(format!("failed: {error:#}")),
    }
}

/// Why a case is not run.
fn refusal(case: &Case, profile: Profile) -> Option<String> {
    // The rest is for the machine's other users.
    let room = host::available_memory().unwrap_or(0) / 5 * 4;
    let limit = profile.limit(case);
    let would = if case.moved() > limit {
        format!("move {}", size(case.moved()))
    } else if case.read() > limit {
        format!("read {}", size(case.read()))
    } else if case.memory() > room {
        format!("take {} of memory", size(case.memory()))
    } else {
        return None;
    };
    Some(format!("not run (would {would})"))
}

fn told(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Measured(figures) => format!(
            "{} in {}{}",
            size(figures.wire),
            time(figures.total),
            if figures.agrees == Some(false) { ", COUNTS DIFFER" } else { "" }
        ),
        Outcome::NotRun(reason) | Outcome::Failed(reason) => reason.clone(),
    }
}

/// What a case is expected to take, compared with others: its memory is filled, touched before
/// the run, read and written; and each has some cost of its own.
fn weight(case: &Case) -> u64 {
    case.touched() + 2 * case.memory() + 128 * MIB
}

/// How long the rest will take, by what has been run.
struct Left {
    weight: u64,
    done: u64,
    took: Duration,
}

impl Left {
    fn new(weight: u64) -> Self {
        Self { weight, done: 0, took: Duration::ZERO }
    }

    fn done(&mut self, weight: u64, took: Duration) {
        self.weight = self.weight.saturating_sub(weight);
        self.done += weight;
        self.took += took;
    }

    /// `None` until something has been run.
    fn time(&self) -> Option<Duration> {
        let share = self.weight as f64 / self.done as f64;
        Duration::try_from_secs_f64(self.took.as_secs_f64() * share).ok()
    }
}

impl std::fmt::Display for Left {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.time().map(|time| time.as_secs()) {
            None => Ok(()),
            Some(seconds @ 0..120) => write!(f, "; about {seconds} s left"),
            Some(seconds) => write!(f, "; about {} min left", seconds / 60),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_goes_by_weight() {
        let mut left = Left::new(100);
        assert_eq!(left.to_string(), "");
        left.done(10, Duration::from_secs(2));
        assert_eq!(left.to_string(), "; about 18 s left");
        left.done(10, Duration::from_secs(98));
        assert_eq!(left.to_string(), "; about 6 min left");
        // More than was expected.
        left.done(90, Duration::from_secs(1));
        assert_eq!(left.to_string(), "; about 0 s left");
    }
}
