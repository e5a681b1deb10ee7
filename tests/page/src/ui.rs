//! `vmemctl ui` as a process.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

/// A proxy, which ends with it.
pub struct Ui {
    child: Child,
    /// The address to open, with the token.
    pub url: String,
}

impl Ui {
    pub fn start(vmemctl: &Path, api_socket: &Path) -> Result<Self> {
        let mut child = Command::new(vmemctl)
            .args(["--json", "--api-socket"])
            .arg(api_socket)
            .arg("ui")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", vmemctl.display()))?;
        let said = child.stdout.take().context("no pipe from vmemctl")?;
        let mut ui = Self { child, url: String::new() };
        let mut line = String::new();
        BufReader::new(said).read_line(&mut line)?;
        let told: Value = serde_json::from_str(&line).context("vmemctl ui printed no address")?;
        told["url"].as_str().context("no url")?.clone_into(&mut ui.url);
        Ok(ui)
    }

    /// The address without the token.
    pub fn bare(&self) -> &str {
        self.url.split('#').next().unwrap_or_default()
    }

    pub fn token(&self) -> &str {
        self.url.split("token=").nth(1).unwrap_or_default()
    }
}

impl Drop for Ui {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
