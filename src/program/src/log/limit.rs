//! Lines of one kind in a row: some are told, then only how many there were.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tracing::Level;

use super::form::Form;

/// Lines of one kind that are told one by one. Their reasons may differ.
pub const FIRST: u32 = 30;

/// Between two counts. A kind that was quiet for as long begins anew.
pub(super) const INTERVAL: Duration = Duration::from_secs(10);

/// Kinds that are told apart; there are fewer places that log.
pub const KINDS: usize = 1024;

/// Characters that are kept of a message.
const MESSAGE: usize = 200;

/// What has been logged lately.
#[derive(Default)]
pub struct Limit {
    kinds: Mutex<HashMap<Kind, Count>>,
    /// Lines that were only counted, since the start.
    counted: AtomicU64,
    /// Those of them that are of kinds for which there was no room, and not told yet.
    others: AtomicU64,
}

/// Lines of one place in the code.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kind {
    file: Cow<'static, str>,
    line: u64,
}

impl Kind {
    /// Those of this line of this file.
    pub fn new(file: impl Into<Cow<'static, str>>, line: u64) -> Self {
        Self { file: file.into(), line }
    }
}

struct Count {
    level: Level,
    target: String,
    message: String,
    told: u32,
    untold: u64,
    quiet: bool,
}

impl Limit {
    /// Whether a line of this kind is told; otherwise it is counted. `first` is asked, once for a kind, for the
    /// target and the message that stand for it.
    pub fn admits(
        &self,
        kind: Kind,
        level: Level,
        first: impl FnOnce() -> (String, String),
    ) -> bool {
        let mut kinds = self.kinds.lock();
        if kinds.len() >= KINDS && !kinds.contains_key(&kind) {
            self.counted.fetch_add(1, Ordering::Relaxed);
            self.others.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        let count = kinds.entry(kind).or_insert_with(|| {
            let (target, message) = first();
            let message = message.escape_debug().take(MESSAGE).collect();
            Count { level, target, message, told: 0, untold: 0, quiet: false }
        });
        count.quiet = false;
        if count.told < FIRST {
            count.told += 1;
            return true;
        }
        count.untold += 1;
        self.counted.fetch_add(1, Ordering::Relaxed);
        false
    }

    /// Lines that were only counted, since the start.
    pub fn counted(&self) -> u64 {
        self.counted.load(Ordering::Relaxed)
    }

    /// Whether nothing was logged lately.
    pub fn is_idle(&self) -> bool {
        self.kinds.lock().is_empty()
    }

    /// The counts since the last call, as lines.
    pub fn repeated(&self, form: Form) -> Vec<Vec<u8>> {
        let mut lines = Vec::new();
        self.kinds.lock().retain(|_, count| {
            if count.untold != 0 {
                let text = format!("{} more like this: {}", count.untold, count.message);
                lines.push(form.notice(count.level, &count.target, &text, Some(count.untold)));
                count.untold = 0;
            }
            !std::mem::replace(&mut count.quiet, true)
        });
        let others = self.others.swap(0, Ordering::Relaxed);
        if others != 0 {
            let text = format!("{others} lines of kinds of which too many were logged at once");
            lines.push(form.notice(Level::WARN, "log", &text, Some(others)));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flood(limit: &Limit, line: u64, times: u32) -> u32 {
        let first = || ("place".to_owned(), format!("{line}\n"));
        let admitted = || limit.admits(Kind::new("a file", line), Level::WARN, first);
        (0..times).map(|_| u32::from(admitted())).sum()
    }

    fn repeated(limit: &Limit) -> Vec<String> {
        let lines = limit.repeated(Form::default()).into_iter();
        lines.map(|line| String::from_utf8(line).unwrap()).collect()
    }

    #[test]
    fn a_flood_of_one_kind_is_counted_after_the_first_lines() {
        let limit = Limit::default();
        assert_eq!(flood(&limit, 1, 1000), FIRST);
        assert_eq!(flood(&limit, 2, 3), 3);
        let [line] = &repeated(&limit)[..] else { panic!("one kind") };
        assert!(line.ends_with("WARN place: 970 more like this: 1\\n\n"), "{line}");
        assert_eq!(limit.counted(), 970);
        // Begins anew after a quiet interval.
        assert!(repeated(&limit).is_empty() && limit.is_idle());
        assert_eq!(flood(&limit, 1, 3), 3);
    }

    #[test]
    fn lines_of_more_kinds_than_are_told_apart_are_counted_and_told() {
        let limit = Limit::default();
        for line in 0..KINDS as u64 {
            assert_eq!(flood(&limit, line, 1), 1);
        }
        assert_eq!(flood(&limit, u64::MAX, 7), 0);
        assert_eq!(limit.counted(), 7);
        let lines = repeated(&limit);
        assert!(lines[0].contains(" WARN log: 7 lines of kinds of which"), "{lines:?}");
        assert!(repeated(&limit).is_empty(), "told twice");
    }
}
