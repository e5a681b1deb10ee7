//! The connection.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::SendFlags;
use serde_json::{Value, json};
use vmstate::printable;

use crate::cli::report::Report;
use crate::error::PagerError;
use crate::run::{POLL, Run};
use crate::socket::{Address, connect};

/// For an answer of QEMU's.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest message, bytes.
const MESSAGE_MAX: usize = 4 << 20;
/// Events that are kept until they are asked for; older ones go.
const EVENTS_MAX: usize = 256;

/// Something that happened in QEMU.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// As "MIGRATION".
    pub name: String,
    /// What it is about; null when it says no more.
    pub data: Value,
}

/// How long a wait may last.
#[derive(Clone, Copy, Debug)]
struct Bound {
    patience: Duration,
    until: Instant,
    /// Whether the end of the run ends it, too.
    ends_with_run: bool,
}

impl Bound {
    fn new(patience: Duration, ends_with_run: bool) -> Self {
        Self { patience, until: Instant::now() + patience, ends_with_run }
    }
}

/// An open control connection, in command mode.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    run: Arc<Run>,
    /// What was read and is not a whole message.
    buffer: Vec<u8>,
    /// So much of it has no line's end.
    searched: usize,
    events: VecDeque<Event>,
    next_id: u64,
    out_of_band: bool,
}

impl Qmp {
    /// Connects to QEMU's control socket, and takes all the capabilities that this client can use.
    ///
    /// # Errors
    ///
    /// When QEMU does not listen there, says something else, or nothing.
    pub fn connect(path: &Path, run: &Arc<Run>, report: &Report) -> Result<Self, PagerError> {
        let address = Address::Unix(path.to_owned());
        let fd: OwnedFd = connect(&address, run, report, Some(PATIENCE))?;
        Self::over(fd.into(), run)
    }

    /// As [`Qmp::connect`], on a connection that there is.
    ///
    /// # Errors
    ///
    /// As [`Qmp::connect`].
    pub fn over(stream: UnixStream, run: &Arc<Run>) -> Result<Self, PagerError> {
        stream.set_nonblocking(true).map_err(PagerError::system("set up a socket"))?;
        let mut qmp = Self {
            stream,
            run: Arc::clone(run),
            buffer: Vec::new(),
            searched: 0,
            events: VecDeque::new(),
            next_id: 0,
            out_of_band: false,
        };
        let greeting = qmp.message(Bound::new(PATIENCE, true), "QEMU's greeting")?;
        let Some(offered) = greeting.pointer("/QMP/capabilities").and_then(Value::as_array) else {
            return Err(failed("the other side does not greet as QEMU does"));
        };
        let out_of_band = offered.iter().any(|capability| capability == "oob");
        let enable = if out_of_band { json!(["oob"]) } else { json!([]) };
        qmp.execute("qmp_capabilities", &json!({ "enable": enable }))?;
        qmp.out_of_band = out_of_band;
        Ok(qmp)
    }

    /// Runs a command; what it returns.
    ///
    /// # Errors
    ///
    /// What QEMU says, when the connection fails, or when there is no answer in time.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, PagerError> {
        self.ask("execute", command, arguments, Bound::new(PATIENCE, true))
    }

    /// Runs a command although the run has ended, and waits for no longer than `patience`.
    ///
    /// # Errors
    ///
    /// As [`Qmp::execute`].
    pub fn execute_at_end(
        &mut self,
        command: &str,
        arguments: &Value,
        patience: Duration,
    ) -> Result<Value, PagerError> {
        self.ask("execute", command, arguments, Bound::new(patience, false))
    }

    /// Runs a command also while QEMU's main thread is busy, where QEMU offers that: of commands that
    /// allow it, as `migrate-recover` does.
    ///
    /// # Errors
    ///
    /// As [`Qmp::execute`].
    pub fn execute_out_of_band(
        &mut self,
        command: &str,
        arguments: &Value,
    ) -> Result<Value, PagerError> {
        let way = if self.out_of_band { "exec-oob" } else { "execute" };
        self.ask(way, command, arguments, Bound::new(PATIENCE, true))
    }

    fn ask(
        &mut self,
        way: &str,
        command: &str,
        arguments: &Value,
        bound: Bound,
    ) -> Result<Value, PagerError> {
        self.next_id += 1;
        let id = json!(self.next_id);
        let request = json!({ way: command, "arguments": arguments, "id": id });
        self.send(format!("{request}\n").as_bytes(), bound, command)?;
        loop {
            let what = format!("the answer to {command}");
            let mut message = self.message(bound, &what)?;
            // An error without an id is about what cannot be told from its bytes: this command.
            let is_mine = message.get("id").is_none_or(|answered| *answered == id);
            if let Some(error) = message.get("error").filter(|_| is_mine) {
                let text = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
                let (class, desc) = (text("class"), text("desc"));
                return Err(PagerError::Qmp { command: command.to_owned(), class, desc });
            }
            match message.get_mut("return") {
                Some(answer) if is_mine => return Ok(answer.take()),
                _ => self.keep_event(&mut message),
            }
        }
    }

    /// The next event that `wanted` wants, also one that has come before; others before it are forgotten.
    ///
    /// # Errors
    ///
    /// When it does not come within `patience`, the run ends, or the connection fails.
    pub fn wait_event(
        &mut self,
        what: &str,
        patience: Duration,
        mut wanted: impl FnMut(&Event) -> bool,
    ) -> Result<Event, PagerError> {
        let bound = Bound::new(patience, true);
        loop {
            while let Some(event) = self.events.pop_front() {
                if wanted(&event) {
                    return Ok(event);
                }
            }
            let mut message = self.message(bound, what)?;
            self.keep_event(&mut message);
        }
    }

    fn keep_event(&mut self, message: &mut Value) {
        let Some(name) = message["event"].as_str().map(str::to_owned) else { return };
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(Event { name, data: message["data"].take() });
    }

    fn send(&mut self, mut bytes: &[u8], bound: Bound, command: &str) -> Result<(), PagerError> {
        while !bytes.is_empty() {
            match rustix::net::send(&self.stream, bytes, SendFlags::NOSIGNAL) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, bound, command)?,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(failed(&io::Error::from(errno).to_string())),
            }
        }
        Ok(())
    }

    /// The next message, an object.
    fn message(&mut self, bound: Bound, what: &str) -> Result<Value, PagerError> {
        loop {
            let end = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n');
            if let Some(end) = end {
                let line: Vec<u8> = self.buffer.drain(..=self.searched + end).collect();
                self.searched = 0;
                if line.trim_ascii().is_empty() {
                    continue;
                }
                let message = serde_json::from_slice(&line).ok().filter(Value::is_object);
                return message.ok_or_else(|| {
                    let line = printable(&String::from_utf8_lossy(&line));
                    failed(&format!("not a message of QEMU's: {line}"))
                });
            }
            self.searched = self.buffer.len();
            if self.buffer.len() >= MESSAGE_MAX {
                return Err(failed(&format!("a message is longer than {MESSAGE_MAX} bytes")));
            }
            let mut bytes = [0; 16 << 10];
            match rustix::io::read(&self.stream, &mut bytes) {
                Ok(0) => return Err(failed(&format!("QEMU closed the connection before {what}"))),
                Ok(read) => self.buffer.extend_from_slice(&bytes[..read]),
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, bound, what)?,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(failed(&io::Error::from(errno).to_string())),
            }
        }
    }

    fn wait(&self, flags: PollFlags, bound: Bound, what: &str) -> Result<(), PagerError> {
        let waited_for = || format!("QMP: {what} has not come");
        if bound.ends_with_run {
            self.run.check(&waited_for())?;
        }
        if Instant::now() >= bound.until {
            return Err(PagerError::TimedOut { what: waited_for(), after: bound.patience });
        }
        let wait = Timespec { tv_sec: 0, tv_nsec: POLL.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&self.stream, flags)], Some(&wait)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(failed(&io::Error::from(errno).to_string())),
        }
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        let _ = self.stream.flush();
    }
}

fn failed(what: &str) -> PagerError {
    PagerError::QmpChannel(what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::thread::{self, JoinHandle};

    const GREETING: &str = r#"{"QMP": {"version": {}, "capabilities": ["oob"]}}"#;

    /// A QEMU that gives to each request what `script` has for it; what it was asked.
    fn qemu(
        greeting: &str,
        script: &'static [&'static str],
    ) -> (UnixStream, JoinHandle<Vec<Value>>) {
        let (near, far) = UnixStream::pair().unwrap();
        let greeting = format!("{greeting}\r\n");
        let thread = thread::spawn(move || {
            let mut asked = Vec::new();
            let mut lines = BufReader::new(far.try_clone().unwrap());
            let mut far = far;
            far.write_all(greeting.as_bytes()).unwrap();
            for answers in script {
                let mut line = String::new();
                if lines.read_line(&mut line).unwrap() == 0 {
                    break;
                }
                let request: Value = serde_json::from_str(&line).unwrap();
                let answers = answers.replace("ID", &request["id"].to_string());
                asked.push(request);
                far.write_all(answers.as_bytes()).unwrap();
            }
            asked
        });
        (near, thread)
    }

    fn run() -> Arc<Run> {
        Run::new(None)
    }

    #[test]
    fn commands_are_answered_by_their_id_and_events_are_kept() {
        let (stream, qemu) = qemu(
            GREETING,
            &[
                "{\"return\": {}, \"id\": ID}\r\n",
                concat!(
                    "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"setup\"}}\r\n",
                    "{\"return\": {\"other\": 1}, \"id\": \"elsewhere\"}\r\n",
                    "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"active\"}}\r\n",
                    "{\"return\": {\"status\": \"running\"}, \"id\": ID}\r\n",
                ),
                "{\"return\": {}, \"id\": ID}\r\n",
            ],
        );
        let mut qmp = Qmp::over(stream, &run()).unwrap();
        let answer = qmp.execute("query-status", &json!({})).unwrap();
        assert_eq!(answer, json!({ "status": "running" }));
        let active = |event: &Event| event.data["status"] == "active";
        let event = qmp.wait_event("a migration", PATIENCE, active).unwrap();
        assert_eq!(event.name, "MIGRATION");
        qmp.execute_out_of_band("migrate-recover", &json!({ "uri": "unix:x" })).unwrap();
        let asked = qemu.join().unwrap();
        assert_eq!(asked[0]["arguments"], json!({ "enable": ["oob"] }));
        assert_eq!(asked[1]["execute"], "query-status");
        assert_eq!(asked[2]["exec-oob"], "migrate-recover");
    }

    #[test]
    fn an_error_of_qemus_is_handed_on_word_for_word() {
        let (stream, qemu) = qemu(
            GREETING,
            &[
                "{\"return\": {}, \"id\": ID}\n",
                "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no, not now\"}, \"id\": ID}\n",
            ],
        );
        let mut qmp = Qmp::over(stream, &run()).unwrap();
        let error = qmp.execute("migrate", &json!({ "uri": "unix:x" })).unwrap_err();
        assert_eq!(error.to_string(), "QEMU refused migrate: GenericError: no, not now");
        assert_eq!(error.exit_status(), 1);
        drop(qmp);
        qemu.join().unwrap();
    }

    #[test]
    fn a_qemu_without_out_of_band_commands_is_asked_in_band() {
        let (stream, qemu) = qemu(
            r#"{"QMP": {"capabilities": []}}"#,
            &["{\"return\": {}, \"id\": ID}\n", "{\"return\": {}, \"id\": ID}\n"],
        );
        let mut qmp = Qmp::over(stream, &run()).unwrap();
        qmp.execute_out_of_band("migrate-recover", &json!({})).unwrap();
        let asked = qemu.join().unwrap();
        assert_eq!(asked[0]["arguments"], json!({ "enable": [] }));
        assert_eq!(asked[1]["execute"], "migrate-recover");
    }

    #[test]
    fn what_is_not_qemu_is_refused() {
        for greeting in ["{}", "[]", "SSH-2.0", r#"{"QMP": 1}"#, "\u{1b}[31m"] {
            let (stream, qemu) = qemu(greeting, &[]);
            let error = Qmp::over(stream, &run()).unwrap_err();
            assert!(matches!(error, PagerError::QmpChannel(_)), "{greeting}: {error}");
            qemu.join().unwrap();
        }
    }

    #[test]
    fn a_message_without_an_end_is_refused_and_a_closed_connection_named() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let writer = thread::spawn(move || while far.write_all(&[b'x'; 1 << 16]).is_ok() {});
        let error = Qmp::over(near, &run()).unwrap_err();
        assert!(error.to_string().contains("longer than"), "{error}");
        writer.join().unwrap();

        let (near, far) = UnixStream::pair().unwrap();
        drop(far);
        let error = Qmp::over(near, &run()).unwrap_err();
        assert!(error.to_string().contains("closed the connection"), "{error}");
    }

    #[test]
    fn the_end_of_the_run_ends_a_wait_and_a_last_command_goes_all_the_same() {
        let (stream, qemu) = qemu(
            GREETING,
            &["{\"return\": {}, \"id\": ID}\n", "", "{\"return\": 1, \"id\": ID}\n"],
        );
        let run = run();
        let mut qmp = Qmp::over(stream, &run).unwrap();
        run.interrupt();
        let error = qmp.execute("query-migrate", &json!({})).unwrap_err();
        assert!(matches!(error, PagerError::Interrupted), "{error}");
        let answer = qmp.execute_at_end("migrate_cancel", &json!({}), PATIENCE).unwrap();
        assert_eq!(answer, json!(1));
        qemu.join().unwrap();
    }

    #[test]
    fn an_answer_that_does_not_come_is_a_timeout() {
        let (stream, qemu) = qemu(GREETING, &["{\"return\": {}, \"id\": ID}\n", "", ""]);
        let mut qmp = Qmp::over(stream, &run()).unwrap();
        let error = qmp.execute_at_end("stop", &json!({}), Duration::ZERO).unwrap_err();
        assert_eq!(error.exit_status(), 3);
        assert!(error.to_string().contains("the answer to stop has not come"), "{error}");
        drop(qmp);
        qemu.join().unwrap();
    }
}
