//! How far a resize has got, as it goes.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use program::size::format_size;

use super::Console;

/// Between lines when there is no bar.
const LINE_EVERY: Duration = Duration::from_secs(1);

/// A bar on a terminal, lines elsewhere, nothing with JSON.
pub(super) enum Progress {
    Bar(ProgressBar),
    Lines { last: Option<Instant>, shown: Option<u64> },
    None,
}

/// A way from one plugged size to another, up or down.
#[derive(Clone, Copy)]
pub(super) struct Way {
    pub(super) from: u64,
    pub(super) to: u64,
}

impl Progress {
    pub(super) fn new(console: &Console<'_>, way: Way) -> Self {
        if console.json {
            return Self::None;
        }
        if !console.interactive {
            return Self::Lines { last: None, shown: None };
        }
        let bar = ProgressBar::new(way.to.abs_diff(way.from));
        if let Ok(style) = ProgressStyle::with_template("{bar:40} {percent:>3}%  {msg}") {
            bar.set_style(style);
        }
        // Shows that it is alive when the guest takes its time.
        bar.enable_steady_tick(Duration::from_millis(500));
        Self::Bar(bar)
    }

    /// Shows this much as plugged, and its pace.
    pub(super) fn show(&mut self, console: &mut Console<'_>, way: Way, plugged: u64, pace: &str) {
        let text = || format!("plugged {} of {}{pace}", format_size(plugged), format_size(way.to));
        match self {
            Self::Bar(bar) => {
                let length = way.to.abs_diff(way.from);
                bar.set_position(length.saturating_sub(plugged.abs_diff(way.to)));
                bar.set_message(text());
            }
            Self::Lines { last, shown } => {
                let due = last.is_none_or(|last| last.elapsed() >= LINE_EVERY);
                if due && *shown != Some(plugged) {
                    console.complain(&text());
                    *last = Some(Instant::now());
                    *shown = Some(plugged);
                }
            }
            Self::None => {}
        }
    }

    /// Shows what is in the way.
    pub(super) fn note(&mut self, console: &mut Console<'_>, note: &str) {
        match self {
            Self::Bar(bar) => bar.set_message(note.to_owned()),
            Self::Lines { .. } => console.complain(note),
            Self::None => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}
