//! Lines of one kind in a row, as events of `tracing`.

use std::fmt;
use std::sync::Arc;

use program::log::{Kind, Limit};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{self, Context};

/// Whether this line is told. What the operator asked for to find a fault is.
fn admits(limit: &Limit, event: &Event<'_>) -> bool {
    let metadata = event.metadata();
    if *metadata.level() > Level::INFO {
        return true;
    }
    let mut fields = Fields::default();
    event.record(&mut fields);
    // Lines of the `log` crate share a place, and say theirs in fields.
    let kind = match &fields.target {
        Some(target) => Kind::new(target.clone(), fields.line),
        None => {
            let place = metadata.file().unwrap_or_else(|| metadata.target());
            Kind::new(place, metadata.line().unwrap_or_default().into())
        }
    };
    limit.admits(kind, *metadata.level(), || {
        let target = fields.target.unwrap_or_else(|| metadata.target().to_owned());
        (target, fields.message)
    })
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
            self.message = format!("{value:?}");
        }
    }
}

/// The limit as a part of the subscriber.
pub(super) struct Layer(pub(super) Arc<Limit>);

impl<S: Subscriber> layer::Layer<S> for Layer {
    fn event_enabled(&self, event: &Event<'_>, _context: Context<'_, S>) -> bool {
        admits(&self.0, event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use program::log::{FIRST, Form};
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
