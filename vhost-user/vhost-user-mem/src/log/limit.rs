//! Lines of one kind in a row: some are told, then only how many there were.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{self, Context};

use super::form::Form;

/// Lines of one kind that are told one by one. Their reasons may differ.
const FIRST: u32 = 30;

/// Between two counts. A kind that was quiet for as long begins anew.
pub(super) const INTERVAL: Duration = Duration::from_secs(10);

/// Kinds that are told apart; there are fewer places that log.
const KINDS: usize = 1024;

/// Characters that are kept of a message.
const MESSAGE: usize = 200;

/// What has been logged lately.
#[derive(Default)]
pub(super) struct Limit {
    kinds: Mutex<HashMap<Kind, Count>>,
    /// Lines that were only counted, since the start.
    counted: AtomicU64,
    /// Those of them that are of kinds for which there was no room, and not told yet.
    others: AtomicU64,
}

/// Lines of one place in the code. Those of the `log` crate share places, and say theirs in fields.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Kind {
    place: Identifier,
    target: Option<String>,
    line: u64,
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
    /// Whether this line is told. What the operator asked for to find a fault is.
    fn admits(&self, event: &Event<'_>) -> bool {
        let metadata = event.metadata();
        if *metadata.level() > Level::INFO {
            return true;
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        let place = metadata.callsite();
        let kind = Kind { place, target: fields.target.clone(), line: fields.line };
        let mut kinds = self.kinds.lock();
        if kinds.len() >= KINDS && !kinds.contains_key(&kind) {
            self.counted.fetch_add(1, Ordering::Relaxed);
            self.others.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        let count = kinds.entry(kind).or_insert_with(|| Count {
            level: *metadata.level(),
            target: fields.target.unwrap_or_else(|| metadata.target().to_owned()),
            message: fields.message,
            told: 0,
            untold: 0,
            quiet: false,
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
    pub(super) fn counted(&self) -> u64 {
        self.counted.load(Ordering::Relaxed)
    }

    /// Whether nothing was logged lately.
    pub(super) fn is_idle(&self) -> bool {
        self.kinds.lock().is_empty()
    }

    /// The counts since the last call, as lines.
    pub(super) fn repeated(&self, form: Form) -> Vec<Vec<u8>> {
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

/// What tells kinds apart, and what is said of one.
#[derive(Default)]
struct Fields {
    message: String,
    target: Option<String>,
    line: u64,
}

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "log.line" {
            self.line = value;
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "log.target" {
            self.target = Some(value.to_owned());
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}").escape_debug().take(MESSAGE).collect();
        }
    }
}

/// The limit as a part of the subscriber.
pub(super) struct Layer(pub(super) std::sync::Arc<Limit>);

impl<S: Subscriber> layer::Layer<S> for Layer {
    fn event_enabled(&self, event: &Event<'_>, _context: Context<'_, S>) -> bool {
        self.0.admits(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tracing_subscriber::layer::SubscriberExt;

    /// Counts what passes.
    #[derive(Clone, Default)]
    struct Passed(Arc<Mutex<u32>>);

    impl<S: Subscriber> layer::Layer<S> for Passed {
        fn on_event(&self, _event: &Event<'_>, _context: Context<'_, S>) {
            *self.0.lock() += 1;
        }
    }

    fn limited(act: impl FnOnce(&Limit)) -> u32 {
        let (limit, passed) = (Arc::new(Limit::default()), Passed::default());
        let layers = (Layer(Arc::clone(&limit)), passed.clone());
        let subscriber = tracing_subscriber::registry().with(layers.0).with(layers.1);
        tracing::subscriber::with_default(subscriber, || act(&limit));
        *passed.0.lock()
    }

    fn repeated(limit: &Limit) -> Vec<String> {
        let lines = limit.repeated(Form::default()).into_iter();
        lines.map(|line| String::from_utf8(line).unwrap()).collect()
    }

    fn flood(times: u32) {
        for round in 0..times {
            tracing::warn!(round, "a guest does it again");
        }
    }

    #[test]
    fn a_flood_of_one_kind_is_counted_after_the_first_lines() {
        let passed = limited(|limit| {
            flood(1000);
            let [line] = &repeated(limit)[..] else { panic!("one kind") };
            let told = "970 more like this: a guest does it again\n";
            assert!(line.contains("WARN") && line.contains(module_path!()), "{line}");
            assert!(line.ends_with(told), "{line}");
            flood(5);
            assert!(repeated(limit)[0].contains(" 5 more like this"));
            assert_eq!(limit.counted(), 975);
        });
        assert_eq!(passed, FIRST);
    }

    #[test]
    fn a_kind_begins_anew_after_a_quiet_interval() {
        let passed = limited(|limit| {
            flood(1000);
            assert_eq!(repeated(limit).len(), 1);
            assert!(repeated(limit).is_empty() && limit.is_idle());
            flood(3);
        });
        assert_eq!(passed, FIRST + 3);
    }

    #[test]
    fn lines_of_more_kinds_than_are_told_apart_are_counted_and_told() {
        let passed = limited(|limit| {
            tracing::warn!("one kind");
            let (place, count) = limit.kinds.lock().drain().next().unwrap();
            for line in 0..KINDS as u64 {
                let kind = Kind { line, target: Some("a crate".to_owned()), ..place.clone() };
                let count = Count { message: String::new(), target: String::new(), ..count };
                limit.kinds.lock().insert(kind, count);
            }
            flood(7);
            assert_eq!(limit.counted(), 7);
            let lines = repeated(limit);
            assert!(lines[0].contains(" WARN log: 7 lines of kinds of which"), "{lines:?}");
            assert!(repeated(limit).is_empty(), "told twice");
        });
        assert_eq!(passed, 1);
    }

    #[test]
    fn other_kinds_and_what_is_for_finding_faults_are_told() {
        let passed = limited(|limit| {
            flood(1000);
            tracing::error!("something else");
            for _ in 0..40 {
                tracing::debug!("asked for");
            }
            assert_eq!(repeated(limit).len(), 1);
        });
        assert_eq!(passed, FIRST + 1 + 40);
    }
}
