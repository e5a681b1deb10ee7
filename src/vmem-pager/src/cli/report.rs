//! What is told while a run lasts: a bar on a terminal, lines of JSON when asked, otherwise what goes wrong.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use migration::MigrationInfo;
use parking_lot::Mutex;
use serde_json::{Value, json};

/// Between lines of JSON about progress.
const LINE_EVERY: Duration = Duration::from_secs(1);
/// Between updates of a bar.
const DRAW_EVERY: Duration = Duration::from_millis(100);

type Output = Arc<Mutex<Box<dyn Write + Send>>>;

/// Where a run tells what happens.
#[derive(Clone)]
pub struct Report {
    json: bool,
    interactive: bool,
    out: Output,
    err: Output,
    /// The outcome was told, which is the last line.
    over: Arc<AtomicBool>,
    bar: Arc<Mutex<Option<ProgressBar>>>,
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
    /// To this process's terminal, or as JSON.
    pub fn of_process(json: bool) -> Self {
        let interactive = !json && std::io::stderr().is_terminal();
        Self {
            interactive,
            ..Self::to(Box::new(std::io::stdout()), Box::new(std::io::stderr()), json)
        }
    }

    /// To elsewhere, which is no terminal.
    pub fn to(out: Box<dyn Write + Send>, err: Box<dyn Write + Send>, json: bool) -> Self {
        let output = |output| Arc::new(Mutex::new(output));
        let (out, err) = (output(out), output(err));
        Self { json, interactive: false, out, err, over: Arc::default(), bar: Arc::default() }
    }

    /// Nothing is told.
    pub fn silent() -> Self {
        Self::to(Box::new(std::io::sink()), Box::new(std::io::sink()), false)
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
        if !self.json {
            return;
        }
        let mut line = json!({ "event": name });
        if let (Some(line), Some(details)) = (line.as_object_mut(), details.as_object()) {
            line.extend(details.clone());
        }
        let mut out = self.out.lock();
        if self.over.fetch_or(last, Ordering::Relaxed) {
            return;
        }
        // A reader that has gone does not end a save.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }

    /// Something is odd, and the run continues.
    pub fn warn(&self, text: &str) {
        self.complain("warning", text);
    }

    /// The run has failed.
    pub fn fail(&self, text: &str) {
        self.complain("error", text);
    }

    fn complain(&self, kind: &str, text: &str) {
        let line = match (self.json, kind) {
            (true, _) => json!({ kind: text }).to_string(),
            (false, "error") => format!("vmem-pager: {text}"),
            (false, _) => format!("vmem-pager: {kind}: {text}"),
        };
        let write = || drop(writeln!(self.err.lock(), "{line}"));
        match &*self.bar.lock() {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
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
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn without_a_terminal_only_what_goes_wrong_is_told() {
        let (out, err) = told(false);
        assert_eq!(out, "");
        assert_eq!(err, "vmem-pager: warning: odd\nvmem-pager: broken\n");
    }
}
