//! Child processes that end with the run, whichever way it ends.

use std::fs::{self, OpenOptions};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

/// Starts `command` with all that it says going to `log`.
pub fn start(command: &Command, log: &Path) -> Result<Child> {
    let output = OpenOptions::new().create(true).append(true).open(log)?;
    // The parent-death signal is what cleans up after a run that was itself killed.
    let mut child = Command::new("setpriv");
    child.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            child.env(name, value);
        }
    }
    child.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    child.spawn().with_context(|| format!("cannot start {command:?}"))
}

/// The last lines of a log, with its name.
pub fn tail(log: &Path, lines: usize) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    let last = &all[all.len().saturating_sub(lines)..];
    format!("--- {} ---\n{}", log.display(), last.join("\n"))
}
