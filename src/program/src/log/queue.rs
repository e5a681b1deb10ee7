//! The queue of lines, and the thread that writes them.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Once};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::Level;

use super::form::Form;
use super::limit::{INTERVAL, Kind, Limit};

/// Lines that wait, at most.
const LINES: usize = 1024;

/// Nothing is waited for longer.
const LONGEST: Duration = Duration::from_secs(3600);

/// Between two looks at a queue that is full.
const RETRY: Duration = Duration::from_millis(5);

/// The queue.
pub struct Queue {
    entries: SyncSender<Entry>,
    limit: Arc<Limit>,
    lost: Arc<Lost>,
    form: Form,
    begun: Once,
    /// What the thread does, until there is one.
    thread: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

enum Entry {
    Line(Vec<u8>),
    /// Everything before it was written once this is answered.
    Flush(SyncSender<()>),
}

/// Lines that were not written.
#[derive(Default)]
struct Lost {
    total: AtomicU64,
    told: AtomicU64,
}

impl Queue {
    /// A queue to `sink`, which may block and fail. A thread of its own calls `begin` and then writes; it starts
    /// with the first line, or with [`start`](Self::start).
    pub fn new(
        sink: impl Write + Send + 'static,
        limit: Arc<Limit>,
        form: Form,
        begin: impl FnOnce() + Send + 'static,
    ) -> Self {
        let (entries, taken) = sync_channel(LINES);
        let lost = Arc::new(Lost::default());
        let counting = Arc::clone(&limit);
        let mut thread = Thread { sink, limit, form, lost: Arc::clone(&lost), torn: false };
        let run = move || {
            begin();
            thread.run(&taken);
        };
        let thread = Mutex::new(Some(Box::new(run) as Box<dyn FnOnce() + Send>));
        Self { entries, limit: counting, lost, form, begun: Once::new(), thread }
    }

    /// Starts the thread, if it has not been.
    ///
    /// # Errors
    ///
    /// When there is no thread to be had. All lines are lost then.
    pub fn start(&self) -> io::Result<()> {
        let mut started = Ok(());
        self.begun.call_once(|| {
            if let Some(run) = self.thread.lock().take() {
                started = thread::Builder::new().name("log".to_owned()).spawn(run).map(drop);
            }
        });
        started
    }

    /// How its lines look.
    pub fn form(&self) -> Form {
        self.form
    }

    /// Puts a line in, or counts it as lost. Never waits.
    pub fn push(&self, level: Level, line: &[u8]) {
        self.put(self.form.line(level, line));
    }

    /// Puts in a line that says `text`, unless there were many of its kind: then it is counted.
    pub fn say(&self, kind: Kind, level: Level, target: &str, text: &str) {
        let admitted = self.limit.admits(kind, level, || (target.to_owned(), text.to_owned()));
        if admitted {
            self.put(self.form.notice(level, target, text, None));
        }
    }

    fn put(&self, line: Vec<u8>) {
        let _ = self.start();
        if self.entries.try_send(Entry::Line(line)).is_err() {
            self.lost.total.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Lines that were only counted, since there were many of their kind.
    pub fn counted(&self) -> u64 {
        self.limit.counted()
    }

    /// Lines that were lost.
    pub fn lost(&self) -> u64 {
        self.lost.total.load(Ordering::Relaxed)
    }

    /// Waits until the lines before are written, at most for `bound`.
    pub fn flush(&self, bound: Duration) {
        if !self.begun.is_completed() {
            return;
        }
        // A bound past all times is none.
        let deadline = Instant::now() + bound.min(LONGEST);
        let (done, waiter) = sync_channel(1);
        let mut entry = Entry::Flush(done);
        while let Err(TrySendError::Full(back)) = self.entries.try_send(entry) {
            if Instant::now() >= deadline {
                return;
            }
            entry = back;
            thread::sleep(RETRY);
        }
        let _ = waiter.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }
}

struct Thread<W> {
    sink: W,
    limit: Arc<Limit>,
    form: Form,
    lost: Arc<Lost>,
    /// A line was written in part.
    torn: bool,
}

impl<W: Write> Thread<W> {
    fn run(&mut self, entries: &Receiver<Entry>) {
        let mut due = Instant::now() + INTERVAL;
        loop {
            // While nothing is counted, nothing is ever due.
            let entry = if self.limit.is_idle() {
                let entry = entries.recv();
                due = due.max(Instant::now() + INTERVAL);
                entry.map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                entries.recv_timeout(due.saturating_duration_since(Instant::now()))
            };
            if Instant::now() >= due {
                due = Instant::now() + INTERVAL;
                self.tell_repeated();
            }
            match entry {
                Ok(Entry::Line(line)) => {
                    self.tell_lost();
                    self.write(&line);
                }
                Ok(Entry::Flush(done)) => {
                    self.tell_repeated();
                    self.tell_lost();
                    let _ = done.try_send(());
                }
                Err(RecvTimeoutError::Timeout) => self.tell_lost(),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn tell_repeated(&mut self) {
        for line in self.limit.repeated(self.form) {
            self.write(&line);
        }
    }

    fn tell_lost(&mut self) {
        let total = self.lost.total.load(Ordering::Relaxed);
        let lines = total - self.lost.told.load(Ordering::Relaxed);
        if lines == 0 {
            return;
        }
        let text = format!("{lines} lines were lost: they were not taken in time");
        if self.put(&self.form.notice(Level::WARN, "log", &text, Some(lines))).is_ok() {
            self.lost.told.store(total, Ordering::Relaxed);
        }
    }

    fn write(&mut self, line: &[u8]) {
        if self.put(line).is_err() {
            self.lost.total.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn put(&mut self, line: &[u8]) -> io::Result<()> {
        if self.torn {
            self.sink.write_all(b"\n")?;
        }
        // How much of it was written is not known after an error.
        self.torn = true;
        self.sink.write_all(line)?;
        self.torn = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::{Mutex, MutexGuard};

    /// Takes what the test lets it take.
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<(Vec<u8>, bool)>>);

    impl Sink {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().0.clone()).unwrap()
        }
    }

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut inner: MutexGuard<'_, _> = self.0.lock();
            if inner.1 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            inner.0.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn queue(sink: &Sink) -> Queue {
        Queue::new(sink.clone(), Arc::default(), Form::default(), || ())
    }

    #[test]
    fn lines_that_do_not_fit_are_counted_and_told_while_the_writer_is_stuck() {
        let sink = Sink::default();
        let queue = queue(&sink);
        let stuck = sink.0.lock();
        // One more may be in the hands of the thread.
        for _ in 0..LINES + 1 + 50 {
            queue.push(Level::INFO, b"a line\n");
        }
        let lost = queue.lost();
        assert!((50..=51).contains(&lost), "{lost}");
        drop(stuck);
        queue.flush(Duration::from_secs(60));
        let told = format!("{lost} lines were lost");
        assert!(sink.text().contains(&told), "{}", sink.text());
        assert_eq!(sink.text().matches("a line\n").count() as u64, LINES as u64 + 51 - lost);
    }

    #[test]
    fn errors_are_survived_counted_and_told() {
        let sink = Sink::default();
        let queue = queue(&sink);
        sink.0.lock().1 = true;
        for _ in 0..3 {
            queue.push(Level::INFO, b"lost\n");
        }
        queue.flush(Duration::from_secs(60));
        assert_eq!(queue.lost(), 3);
        sink.0.lock().1 = false;
        queue.push(Level::INFO, b"written\n");
        queue.flush(Duration::from_secs(60));
        let text = sink.text();
        assert!(text.contains("3 lines were lost") && text.ends_with("written\n"), "{text}");
        assert!(!text.contains("lost\n"), "{text}");
    }

    #[test]
    fn what_is_said_often_is_counted_in_the_words_of_the_others() {
        let sink = Sink::default();
        let form = Form { command: Some("tool"), ..Form::default() };
        let queue = Queue::new(sink.clone(), Arc::default(), form, || ());
        let kind = Kind::new("a file", 7);
        for _ in 0..100 {
            queue.say(kind.clone(), Level::WARN, "a", "odd");
        }
        queue.say(Kind::new("a file", 8), Level::ERROR, "a", "broken");
        queue.flush(Duration::from_secs(60));
        let text = sink.text();
        assert_eq!(text.matches("tool: warning: odd\n").count(), 30, "{text}");
        let end = "tool: broken\ntool: warning: 70 more like this: odd\n";
        assert!(text.ends_with(end), "{text}");
        assert_eq!((queue.counted(), queue.lost()), (70, 0));
    }

    #[test]
    fn its_thread_begins_with_the_first_line_and_once() {
        let begun = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&begun);
        let begin = move || {
            count.fetch_add(1, Ordering::SeqCst);
        };
        let queue = Queue::new(Sink::default(), Arc::default(), Form::default(), begin);
        queue.push(Level::INFO, b"a line\n");
        queue.start().unwrap();
        queue.flush(Duration::from_secs(60));
        assert_eq!(begun.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_stuck_writer_does_not_hold_up_a_flush() {
        let sink = Sink::default();
        let queue = queue(&sink);
        let _stuck = sink.0.lock();
        for _ in 0..2 * LINES {
            queue.push(Level::INFO, b"a line\n");
        }
        queue.flush(Duration::from_millis(1));
    }
}
