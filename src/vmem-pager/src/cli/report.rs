//! What is told while a run lasts: a bar on a terminal, lines of JSON when asked, otherwise what goes wrong.
//!
//! The reader of that may stop, and a guest waits for its memory meanwhile: lines are put into queues, and nothing
//! waits for them but the end of the run, for a moment.

use std::io::{IsTerminal, Write};
use std::panic::Location;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use migration::MigrationInfo;
use parking_lot::Mutex;
use program::log::{Form, Format, Kind, Limit, Queue, Stderr, Stdout, is_journal};
use serde_json::{Value, json};
use tracing::Level;

/// Between lines of JSON about progress.
const LINE_EVERY: Duration = Duration::from_secs(1);
/// Between updates of a bar.
const DRAW_EVERY: Duration = Duration::from_millis(100);

/// How long the end of a run waits for what was told last.
const FLUSH: Duration = Duration::from_secs(1);
/// The place that lines of a log name.
const TARGET: &str = "vmem_pager";
/// The program, as it names itself.
const NAME: &str = "vmem-pager";

/// Where a run tells what happens.
#[derive(Clone)]
pub struct Report {
    json: bool,
    interactive: bool,
    /// Nothing, of a run that tells nothing.
    outputs: Option<Arc<Outputs>>,
    bar: Bar,
}

type Bar = Arc<Mutex<Option<ProgressBar>>>;

struct Outputs {
    events: Queue,
    log: Queue,
    /// Each line is waited for.
    waits: bool,
    /// The outcome was told, which is the last event.
    over: Mutex<bool>,
}

/// Lines that were not told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Untold {
    /// Since they were not taken in time, or could not be written.
    pub lost: u64,
    /// Since there were many of their kind, which was told with their number.
    pub suppressed: u64,
}

/// How far a run has got.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Bytes that are done.
    pub done: u64,
    /// Bytes in all, where that is known.
    pub total: Option<u64>,
    /// Beside the bar.
    pub message: String,
    /// What else a line of JSON has: an object.
    pub details: Value,
}

impl Figures {
    /// Of a save, which does not know how much there is.
    pub fn of_save(info: &MigrationInfo) -> Self {
        Self {
            done: info.transferred,
            total: None,
            message: format!("{} pages, {} of zeros", info.normal, info.duplicate),
            details: json!({
                "status": info.status.name(),
                "pages": info.normal,
                "zero_pages": info.duplicate,
            }),
        }
    }
}

impl Report {
    /// To this process's terminal, or as JSON. What goes wrong is told as `log` says, and otherwise as commands do.
    pub fn of_process(json: bool, log: Option<Format>) -> Self {
        let interactive = !json && std::io::stderr().is_terminal();
        let bar = Bar::default();
        let form = match log {
            None => Form { json, command: Some(NAME), ..Form::default() },
            Some(format) => Form { json: format == Format::Json, ..Form::default() },
        };
        let form = Form { journal: is_journal(), ..form };
        let err = BesideBar { bar: Arc::clone(&bar), err: Stderr };
        let outputs = Outputs::new(Stdout, err, form, false);
        Self { json, interactive, outputs: Some(Arc::new(outputs)), bar }
    }

    /// To elsewhere, which is no terminal; each line is waited for.
    pub fn to(out: Box<dyn Write + Send>, err: Box<dyn Write + Send>, json: bool) -> Self {
        let form = Form { json, command: Some(NAME), ..Form::default() };
        let outputs = Outputs::new(out, err, form, true);
        Self { json, interactive: false, outputs: Some(Arc::new(outputs)), bar: Bar::default() }
    }

    /// Nothing is told.
    pub fn silent() -> Self {
        Self { json: false, interactive: false, outputs: None, bar: Bar::default() }
    }

    /// Something has happened: a line of JSON `{"event": name, ...details}`, nothing otherwise, and nothing after the
    /// outcome.
    pub fn event(&self, name: &str, details: &Value) {
        self.line(name, details, false);
    }

    /// The run has come to its end: an event that is the last, whatever else is being told.
    pub fn outcome(&self, name: &str, details: &Value) {
        self.line(name, details, true);
    }

    fn line(&self, name: &str, details: &Value, last: bool) {
        let Some(outputs) = self.outputs.as_ref().filter(|_| self.json) else { return };
        let mut line = json!({ "event": name });
        if let (Some(line), Some(details)) = (line.as_object_mut(), details.as_object()) {
            line.extend(details.clone());
        }
        let mut over = outputs.over.lock();
        if *over {
            return;
        }
        *over = last;
        if last {
            // There is to be room for this one.
            outputs.events.flush(FLUSH);
        }
        outputs.events.push(Level::INFO, line.to_string().as_bytes());
        if outputs.waits {
            outputs.events.flush(Duration::MAX);
        }
    }

    /// Something is odd, and the run continues.
    #[track_caller]
    pub fn warn(&self, text: &str) {
        self.complain(Level::WARN, text);
    }

    /// The run has failed.
    #[track_caller]
    pub fn fail(&self, text: &str) {
        self.complain(Level::ERROR, text);
    }

    #[track_caller]
    fn complain(&self, level: Level, text: &str) {
        let Some(outputs) = &self.outputs else { return };
        let place = Location::caller();
        outputs.log.say(Kind::new(place.file(), place.line().into()), level, TARGET, text);
        if outputs.waits {
            outputs.log.flush(Duration::MAX);
        }
    }

    /// Waits until all of it is written, but not for long: it may not be read.
    pub fn flush(&self) {
        if let Some(outputs) = &self.outputs {
            outputs.log.flush(FLUSH);
            outputs.events.flush(FLUSH);
        }
    }

    /// What was not told so far.
    pub fn untold(&self) -> Untold {
        let Some(outputs) = &self.outputs else { return Untold::default() };
        let Outputs { events, log, .. } = &**outputs;
        Untold { lost: events.lost() + log.lost(), suppressed: log.counted() }
    }

    /// Shows how far the run has got, until the result is dropped.
    pub fn follow(&self, figures: impl Fn() -> Figures + Send + 'static) -> Following {
        let (end, ended) = mpsc::channel::<()>();
        if !self.json && !self.interactive {
            return Following { end: Some(end), thread: None };
        }
        let report = self.clone();
        let follow = move || {
            let bar = report.interactive.then(|| {
                let bar = ProgressBar::no_length();
                *report.bar.lock() = Some(bar.clone());
                bar
            });
            let every = if bar.is_some() { DRAW_EVERY } else { LINE_EVERY };
            let mut has_length = None;
            while ended.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                let Figures { done, total, message, details } = figures();
                match &bar {
                    Some(bar) => {
                        if has_length != Some(total.is_some()) {
                            has_length = Some(total.is_some());
                            bar.set_style(style(total.is_some()));
                        }
                        if let Some(total) = total {
                            bar.set_length(total);
                        }
                        bar.set_position(done);
                        bar.set_message(message);
                        bar.tick();
                    }
                    None => {
                        let mut line = json!({ "bytes": done, "total_bytes": total });
                        if let (Some(line), Some(more)) =
                            (line.as_object_mut(), details.as_object())
                        {
                            line.extend(more.clone());
                        }
                        report.event("progress", &line);
                    }
                }
            }
            if let Some(bar) = bar {
                *report.bar.lock() = None;
                bar.finish_and_clear();
            }
        };
        // Without a thread there is nothing to be seen, and no harm done.
        let thread = thread::Builder::new().name("progress".to_owned()).spawn(follow).ok();
        Following { end: Some(end), thread }
    }
}

impl Outputs {
    /// Their threads start with the first line, confined as the thread that tells it.
    fn new(
        out: impl Write + Send + 'static,
        err: impl Write + Send + 'static,
        form: Form,
        waits: bool,
    ) -> Self {
        let of_events = Form { json: true, command: Some(NAME), ..Form::default() };
        let events = Queue::new(out, Arc::new(Limit::default()), of_events, || ());
        let log = Queue::new(err, Arc::new(Limit::default()), form, || ());
        Self { events, log, waits, over: Mutex::new(false) }
    }
}

/// A terminal on which a bar may be shown.
struct BesideBar {
    bar: Bar,
    err: Stderr,
}

impl Write for BesideBar {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let bar = self.bar.lock().clone();
        let mut write = || self.err.write(bytes);
        match bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn style(has_length: bool) -> ProgressStyle {
    let template = match has_length {
        true => "{bar:40} {percent:>3}%  {bytes} of {total_bytes}, {bytes_per_sec}  {msg}",
        false => "{spinner}  {bytes}, {bytes_per_sec}  {msg}",
    };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Shows progress until it is dropped.
pub struct Following {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Following {
    /// Waits for the thread, but not for long: it draws on a terminal, which may be stopped.
    fn drop(&mut self) {
        drop(self.end.take());
        let Some(thread) = self.thread.take() else { return };
        let deadline = Instant::now() + FLUSH;
        while !thread.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        if thread.is_finished() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_that_is_stopped_does_not_hold_up_the_end_of_a_run() {
        let (goes_on, stopped) = mpsc::channel::<()>();
        let thread = thread::spawn(move || {
            let _ = stopped.recv_timeout(Duration::from_secs(60));
        });
        drop(Following { end: None, thread: Some(thread) });
        // Nothing has let it continue, or ended it.
        goes_on.send(()).expect("it still draws");
    }

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn told(json: bool) -> (String, String) {
        let (out, err) = (Kept::default(), Kept::default());
        let report = Report::to(Box::new(out.clone()), Box::new(err.clone()), json);
        report.event("connected", &json!({ "channels": 3 }));
        report.warn("odd");
        report.fail("broken");
        drop(report.follow(Figures::default));
        let text = |kept: Kept| String::from_utf8(kept.0.lock().clone()).unwrap();
        (text(out), text(err))
    }

    #[test]
    fn events_are_lines_of_json_and_only_that() {
        let (out, err) = told(true);
        assert_eq!(out, "{\"channels\":3,\"event\":\"connected\"}\n");
        assert_eq!(err, "{\"warning\":\"odd\"}\n{\"error\":\"broken\"}\n");
    }

    #[test]
    fn nothing_follows_the_outcome() {
        let out = Kept::default();
        let report = Report::to(Box::new(out.clone()), Box::new(Kept::default()), true);
        report.event("connected", &json!({}));
        report.outcome("saved", &json!({ "pages": 2 }));
        report.clone().event("progress", &json!({}));
        report.outcome("saved", &json!({}));
        let text = String::from_utf8(out.0.lock().clone()).unwrap();
        assert_eq!(text, "{\"event\":\"connected\"}\n{\"event\":\"saved\",\"pages\":2}\n");
    }

    #[test]
    fn a_flood_of_warnings_is_counted_and_others_are_told() {
        let err = Kept::default();
        let report = Report::to(Box::new(Kept::default()), Box::new(err.clone()), false);
        for number in 0..50 {
            report.warn(&format!("odd {number}"));
        }
        report.warn("something else");
        let text = String::from_utf8(err.0.lock().clone()).unwrap();
        assert!(
            text.contains("vmem-pager: warning: odd 29\n") && !text.contains("odd 30"),
            "{text}"
        );
        // Each line is waited for here, with the counts up to then.
        assert_eq!(text.matches("warning: 1 more like this: odd 0\n").count(), 20, "{text}");
        assert!(text.contains("vmem-pager: warning: something else\n"), "{text}");
        assert_eq!(report.untold(), Untold { lost: 0, suppressed: 20 });
    }

    #[test]
    fn without_a_terminal_only_what_goes_wrong_is_told() {
        let (out, err) = told(false);
        assert_eq!(out, "");
        assert_eq!(err, "vmem-pager: warning: odd\nvmem-pager: broken\n");
    }
}
