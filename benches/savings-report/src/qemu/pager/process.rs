//! What processes take.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use real_guest::machine::Parts;
use serde_json::Value;

/// Between two looks at what a process holds.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// A pager that runs.
pub struct Pager {
    child: Child,
    out: BufReader<ChildStdout>,
}

/// What one took.
pub struct Took {
    /// What it said last.
    pub summary: Value,
    /// The most memory that it held, bytes.
    pub held: u64,
    /// Milliseconds of a processor.
    pub cpu: f64,
}

impl Pager {
    /// Starts one with these words, of which `--vmm qemu` and `--json` are none.
    pub fn start(parts: &Parts<'_>, words: &[String]) -> Result<Self> {
        let program = parts.pager();
        let mut child = Command::new(&program)
            .args(words)
            .args(["--vmm", "qemu", "--json"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let out = BufReader::new(child.stdout.take().context("its output is piped")?);
        Ok(Self { child, out })
    }

    /// Waits for its end, which must be a good one.
    pub fn wait(mut self) -> Result<Took> {
        let id = self.child.id();
        let looking = thread::spawn(move || {
            let mut most = 0;
            while let Some(held) = peak(id) {
                most = most.max(held);
                thread::sleep(LOOK_EVERY);
            }
            most
        });
        let mut summary = Value::Null;
        let mut line = String::new();
        while self.out.read_line(&mut line)? != 0 {
            summary = serde_json::from_str(&line)?;
            line.clear();
        }
        // It is still there, since nothing has waited for it.
        let held = looking.join().unwrap_or_default();
        let cpu = cpu(id);
        let status = self.child.wait()?;
        let mut said = String::new();
        if let Some(mut err) = self.child.stderr.take() {
            err.read_to_string(&mut said)?;
        }
        ensure!(status.success() && said.is_empty(), "the pager ended with {status}: {said}");
        Ok(Took { summary, held, cpu: cpu? })
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The most memory that a process has held, bytes; `None` once it has ended.
fn peak(id: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// Milliseconds of a processor that a process has taken so far.
pub fn cpu(id: u32) -> Result<f64> {
    cpu_of(Path::new(&format!("/proc/{id}/stat")))
}

/// The same of QEMU, without its vCPUs.
pub fn cpu_without_vcpus(id: u32) -> Result<f64> {
    let mut all = cpu(id)?;
    for task in fs::read_dir(format!("/proc/{id}/task"))? {
        let task = task?.path();
        let name = fs::read_to_string(task.join("comm")).unwrap_or_default();
        if name.starts_with("CPU ") {
            all -= cpu_of(&task.join("stat"))?;
        }
    }
    Ok(all.max(0.0))
}

fn cpu_of(stat: &Path) -> Result<f64> {
    let text = fs::read_to_string(stat)?;
    // A name may have anything in it, and ends with the last bracket.
    let rest = text.rsplit_once(')').map(|(_, rest)| rest).context("no name in stat")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks: u64 = fields.get(11).context("no utime")?.parse::<u64>()?
        + fields.get(12).context("no stime")?.parse::<u64>()?;
    Ok(ticks as f64 * 1e3 / rustix::param::clock_ticks_per_second() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells_what_this_process_takes() {
        let id = std::process::id();
        assert!(peak(id).unwrap() > 1 << 20);
        assert!(cpu_without_vcpus(id).unwrap() <= cpu(id).unwrap() + 10.0);
        assert!(peak(0).is_none());
    }
}
