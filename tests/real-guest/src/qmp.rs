//! A small client of QEMU's control socket.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::wait;

/// Events that came while something else was waited for; older ones are forgotten.
const EVENTS_MAX: usize = 64;

/// An open control connection.
pub struct Qmp {
    stream: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects and leaves negotiation mode.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut qmp = Self { stream: BufReader::new(stream), events: VecDeque::new() };
        qmp.message().context("QEMU did not greet")?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs one command and gives what it returns.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.stream.get_mut().write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut message = self.message().with_context(|| format!("QMP {command}"))?;
            if let Some(error) = message.get("error") {
                bail!("QMP {command}: {error}");
            }
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
            self.keep(message);
        }
    }

    /// Waits for an event that `is_it`, which may have come already; when it happened, by QEMU's clock.
    pub fn wait_event(&mut self, is_it: impl Fn(&Value) -> bool) -> Result<SystemTime> {
        let event = match self.events.iter().position(&is_it) {
            Some(at) => self.events.remove(at).unwrap_or_default(),
            None => loop {
                let message = self.message().context("waiting for an event of QEMU's")?;
                if is_it(&message) {
                    break message;
                }
                self.keep(message);
            },
        };
        let part =
            |name: &str| event["timestamp"][name].as_u64().context("an event without a time");
        Ok(UNIX_EPOCH
            + Duration::from_secs(part("seconds")?)
            + Duration::from_micros(part("microseconds")?))
    }

    fn keep(&mut self, event: Value) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// Whether the guest runs, is paused, ...
    pub fn status(&mut self) -> Result<String> {
        let answer = self.execute("query-status", &json!({}))?;
        Ok(answer["status"].as_str().unwrap_or("unknown").to_owned())
    }

    /// Stops the guest, saves it to a file as `migrate file:...` does, and lets it go on; what
    /// `query-migrate` says in the end.
    pub fn save(&mut self, file: &Path, mapped_ram: bool) -> Result<Value> {
        self.execute("stop", &json!({}))?;
        let outcome = self.migrate(&format!("file:{}", file.display()), mapped_ram)?;
        self.execute("cont", &json!({}))?;
        Ok(outcome)
    }

    /// Migrates as fast as it can; what `query-migrate` says in the end.
    pub fn migrate(&mut self, uri: &str, mapped_ram: bool) -> Result<Value> {
        self.set_mapped_ram(mapped_ram)?;
        self.execute("migrate-set-parameters", &json!({ "max-bandwidth": 0 }))?;
        self.execute("migrate", &json!({ "uri": uri }))?;
        self.wait_migrated()
    }

    /// Takes the guest from where `migrate` sends it, or listens there; see
    /// [`wait_migrated`](Self::wait_migrated).
    pub fn migrate_incoming(&mut self, uri: &str, mapped_ram: bool) -> Result<()> {
        self.set_mapped_ram(mapped_ram)?;
        self.execute("migrate-incoming", &json!({ "uri": uri })).map(drop)
    }

    /// Waits for the end of a migration, on either side.
    pub fn wait_migrated(&mut self) -> Result<Value> {
        wait::until("QEMU to move the guest", wait::LONG, || {
            let outcome = self.execute("query-migrate", &json!({}))?;
            match outcome["status"].as_str() {
                Some("completed") => Ok(Some(outcome)),
                Some("failed" | "cancelled") => bail!("QEMU did not move the guest: {outcome}"),
                _ => Ok(None),
            }
        })
    }

    fn set_mapped_ram(&mut self, mapped_ram: bool) -> Result<()> {
        let mapped_ram = json!({ "capability": "mapped-ram", "state": mapped_ram });
        self.execute("migrate-set-capabilities", &json!({ "capabilities": [mapped_ram] })).map(drop)
    }

    /// Presses the reset button.
    pub fn system_reset(&mut self) -> Result<()> {
        self.execute("system_reset", &json!({})).map(drop)
    }

    /// Ends QEMU. It may close the connection before it answers.
    pub fn quit(&mut self) {
        let _ = self.execute("quit", &json!({}));
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            bail!("QEMU closed its control socket");
        }
        Ok(serde_json::from_str(&line)?)
    }
}

/// Connects as soon as QEMU listens; gives up at once when `alive` says that it ended.
pub fn wait_for(socket: &Path, mut alive: impl FnMut() -> Result<()>) -> Result<Qmp> {
    wait::until("QEMU's control socket", wait::SHORT, || {
        alive()?;
        Ok(Qmp::connect(socket).ok())
    })
}
