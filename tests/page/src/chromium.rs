//! A headless Chromium, spoken to in its DevTools protocol over two pipes: messages in JSON that end with
//! a zero byte.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long anything may take: two cores may be busy with much else.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks at the page.
const LOOK: Duration = Duration::from_millis(50);

/// A browser with one tab. It ends with its pipe.
pub struct Chromium {
    child: Child,
    commands: ChildStdin,
    messages: Receiver<Value>,
    session: String,
    last_id: u64,
    /// What went wrong on the page by itself: exceptions, and what its policy refused.
    complaints: Vec<String>,
    _profile: TempDir,
}

impl Chromium {
    /// Starts it, with an empty profile.
    pub fn start(program: &str) -> Result<Self> {
        let profile = tempfile::tempdir()?;
        // The shell puts the ends of the pipes where Chromium expects them.
        let mut child = Command::new("sh")
            .args([
                "-c",
                r#"exec "$0" "$@" 3<&0 4>&1 0</dev/null 1>/dev/null 2>/dev/null"#,
                program,
            ])
            .args(["--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu"])
            // Its own sandbox needs what a root user in a container does not have; the pages are ours.
            .args(["--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start sh")?;
        let commands = child.stdin.take().context("no pipe to the browser")?;
        let said = child.stdout.take().context("no pipe from the browser")?;
        let (sender, messages) = mpsc::channel();
        thread::spawn(move || {
            for message in BufReader::new(said).split(0) {
                let Ok(message) = message
                    .map_err(drop)
                    .and_then(|bytes| serde_json::from_slice::<Value>(&bytes).map_err(drop))
                else {
                    return;
                };
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        let (session, last_id, complaints) = Default::default();
        let mut browser =
            Self { child, commands, messages, session, last_id, complaints, _profile: profile };
        browser.attach().with_context(|| format!("{program} does not answer"))?;
        Ok(browser)
    }

    fn attach(&mut self) -> Result<()> {
        let targets = self.call("Target.getTargets", json!({}))?;
        let tab = targets["targetInfos"].as_array().into_iter().flatten();
        let tab = tab.clone().find(|target| target["type"] == "page").context("no tab")?;
        let asked = json!({ "targetId": tab["targetId"], "flatten": true });
        let attached = self.call("Target.attachToTarget", asked)?;
        self.session = attached["sessionId"].as_str().context("no session")?.to_owned();
        for domain in ["Page", "Runtime", "Log"] {
            self.call(&format!("{domain}.enable"), json!({}))?;
        }
        Ok(())
    }

    /// A command of the protocol; its result.
    pub fn call(&mut self, method: &str, parameters: Value) -> Result<Value> {
        self.last_id += 1;
        let mut message = json!({ "id": self.last_id, "method": method, "params": parameters });
        if !self.session.is_empty() {
            message["sessionId"] = json!(self.session);
        }
        let mut bytes = serde_json::to_vec(&message)?;
        bytes.push(0);
        self.commands
            .write_all(&bytes)
            .with_context(|| format!("{method}: the browser has gone"))?;
        let until = Instant::now() + PATIENCE;
        loop {
            let message = match self.messages.recv_timeout(until - Instant::now().min(until)) {
                Ok(message) => message,
                Err(RecvTimeoutError::Timeout) => bail!("{method}: no answer within {PATIENCE:?}"),
                Err(RecvTimeoutError::Disconnected) => bail!("{method}: the browser has gone"),
            };
            if message["id"] == self.last_id {
                ensure!(message["error"].is_null(), "{method}: {}", message["error"]);
                return Ok(message["result"].clone());
            }
            self.note(&message);
        }
    }

    fn note(&mut self, message: &Value) {
        let told = &message["params"];
        match message["method"].as_str() {
            Some("Runtime.exceptionThrown") => {
                self.complaints.push(told["exceptionDetails"].to_string());
            }
            Some("Log.entryAdded") if told["entry"]["level"] == "error" => {
                self.complaints.push(told["entry"]["text"].to_string());
            }
            _ => {}
        }
    }

    /// What went wrong on pages since it was asked last.
    pub fn complaints(&mut self) -> Result<Vec<String>> {
        // Messages come in order: all before this answer were noted.
        self.evaluate("0")?;
        Ok(std::mem::take(&mut self.complaints))
    }

    /// Opens an address.
    pub fn open(&mut self, url: &str) -> Result<()> {
        let opened = self.call("Page.navigate", json!({ "url": url }))?;
        ensure!(opened["errorText"].is_null(), "cannot open {url}: {}", opened["errorText"]);
        self.wait("document.readyState", &json!("complete"))
    }

    /// The value of an expression on the page.
    pub fn evaluate(&mut self, expression: &str) -> Result<Value> {
        let asked =
            json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let told = self.call("Runtime.evaluate", asked)?;
        ensure!(told["exceptionDetails"].is_null(), "{expression}: {}", told["exceptionDetails"]);
        Ok(told["result"]["value"].clone())
    }

    /// Waits until an expression has this value.
    pub fn wait(&mut self, expression: &str, expected: &Value) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            let found = self.evaluate(expression)?;
            if found == *expected {
                return Ok(());
            }
            ensure!(Instant::now() < until, "{expression} is {found}, not {expected}");
            thread::sleep(LOOK);
        }
    }

    /// Presses a key.
    pub fn press(&mut self, key: &str) -> Result<()> {
        for kind in ["keyDown", "keyUp"] {
            self.call("Input.dispatchKeyEvent", json!({ "type": kind, "key": key, "code": key }))?;
        }
        Ok(())
    }

    /// A screen of this size, with dark colours or light ones.
    pub fn screen(&mut self, width: u32, height: u32, dark: bool) -> Result<()> {
        let metrics =
            json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", metrics)?;
        let scheme = if dark { "dark" } else { "light" };
        let media = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": media }))?;
        Ok(())
    }

    /// Writes what the page looks like, all of it.
    pub fn screenshot(&mut self, file: &Path) -> Result<()> {
        let asked = json!({ "format": "png", "captureBeyondViewport": true });
        let taken = self.call("Page.captureScreenshot", asked)?;
        let png = STANDARD.decode(taken["data"].as_str().context("no picture")?)?;
        fs::write(file, png).with_context(|| format!("cannot write {}", file.display()))
    }
}

impl Drop for Chromium {
    fn drop(&mut self) {
        // Its children end with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
