//! The pager under test.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::machine::Parts;
use crate::wait;

/// For a run of the pager.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running pager. Killed when dropped.
pub struct Pager {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

/// How a run ended.
#[derive(Debug)]
pub struct Ended {
    /// The exit status.
    pub status: Option<i32>,
    /// What it printed.
    pub out: String,
    /// What it complained of.
    pub err: String,
}

impl Pager {
    /// Starts it with these words, of which `--vmm qemu` is not one.
    pub fn start<W: AsRef<OsStr>>(parts: &Parts<'_>, dir: &Path, words: &[W]) -> Result<Self> {
        let pager = parts.pager();
        let (out, err) = (dir.join("pager.out"), dir.join("pager.err"));
        let child = Command::new(&pager)
            .args(words)
            .args(["--vmm", "qemu"])
            .stdin(Stdio::null())
            .stdout(File::create(&out)?)
            .stderr(File::create(&err)?)
            .spawn()
            .with_context(|| format!("cannot start {}", pager.display()))?;
        Ok(Self { child, out, err })
    }

    /// Waits until it listens at `socket`, or ends.
    pub fn wait_listening(&mut self, socket: &Path) -> Result<()> {
        wait::until("the pager to listen", wait::SHORT, || {
            if let Some(status) = self.child.try_wait()? {
                bail!("the pager ended with {status}: {}", text(&self.err));
            }
            Ok(socket.exists().then_some(()))
        })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Kills it, as a host that runs out of memory does.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)?;
        Ok(())
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Result<Ended> {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status.code();
            }
            if Instant::now() > deadline {
                bail!("the pager has not ended: {}{}", text(&self.out), text(&self.err));
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        Ok(Ended { status, out: text(&self.out), err: text(&self.err) })
    }

    /// Runs it to its end.
    pub fn run<W: AsRef<OsStr>>(parts: &Parts<'_>, dir: &Path, words: &[W]) -> Result<Ended> {
        Self::start(parts, dir, words)?.wait()
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// It ended well, and complained of nothing.
    pub fn expect_success(&self) -> Result<()> {
        if self.status == Some(0) && self.err.is_empty() {
            return Ok(());
        }
        bail!("the pager ended with {:?}: {}", self.status, self.err)
    }
}

/// Runs `vmemctl`.
pub fn vmemctl(parts: &Parts<'_>, words: &[&OsStr]) -> Result<Output> {
    let client = parts.client();
    let output = Command::new(&client).args(words).output();
    output.with_context(|| format!("cannot start {}", client.display()))
}

fn text(path: &Path) -> String {
    let mut text = String::new();
    if let Ok(mut file) = File::open(path) {
        let _ = file.read_to_string(&mut text);
    }
    text
}
