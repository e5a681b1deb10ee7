//! What can be asked of the guest, over its second serial port.

use std::fmt::Write as _;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::sizes::KIB;
use crate::wait;

/// Booting under TCG takes ten seconds; a loaded machine may need many more.
const BOOT: Duration = Duration::from_secs(180);
const COMMAND: Duration = Duration::from_secs(120);
const READY: &str = "<<ready>>";

/// Lines of the kernel log that no step may leave behind.
const TROUBLE: [&str; 6] =
    ["WARNING:", "BUG:", "Oops", "device broken", "unknown error", "Call Trace"];

/// The guest's command loop.
pub struct Guest {
    port: UnixStream,
    unread: Vec<u8>,
    commands: u64,
}

impl Guest {
    /// Opens the port; the guest need not have booted yet.
    pub fn connect(port: &Path) -> Result<Self> {
        let port =
            wait::until("the guest's port", wait::SHORT, || Ok(UnixStream::connect(port).ok()))?;
        port.set_read_timeout(Some(Duration::from_millis(200)))?;
        Ok(Self { port, unread: Vec::new(), commands: 0 })
    }

    /// Waits for the command loop to come up, at the first boot or after a reboot.
    pub fn wait_ready(&mut self) -> Result<()> {
        self.wait_ready_within(BOOT)
    }

    /// The same, with a bound of its own.
    pub fn wait_ready_within(&mut self, bound: Duration) -> Result<()> {
        self.lines_until(bound, |line| line == READY).context("the guest did not boot")?;
        Ok(())
    }

    /// Runs a shell command in the guest and gives its output.
    pub fn run(&mut self, command: &str) -> Result<String> {
        self.commands += 1;
        let end = format!("<<end {} ", self.commands);
        self.send(&format!("{} {command}\n", self.commands))?;
        let (lines, last) = self
            .lines_until(COMMAND, |line| line.starts_with(&end))
            .with_context(|| format!("the guest did not answer `{command}`"))?;
        ensure!(last == format!("{end}0>>"), "`{command}` in the guest: {last} {lines:?}");
        Ok(lines.join("\n"))
    }

    /// Restarts the guest from within and waits for it to come back.
    pub fn reboot(&mut self) -> Result<()> {
        self.commands += 1;
        self.send(&format!("{} reboot -f\n", self.commands))?;
        self.wait_ready()
    }

    /// MemTotal, in bytes.
    pub fn mem_total(&mut self) -> Result<u64> {
        let text = self.run("grep MemTotal /proc/meminfo")?;
        kilobytes(&text)
    }

    /// The memory of one NUMA node, in bytes.
    pub fn node_total(&mut self, node: u16) -> Result<u64> {
        let file = format!("/sys/devices/system/node/node{node}/meminfo");
        let text = self.run(&format!("grep MemTotal {file}"))?;
        kilobytes(&text)
    }

    /// The bytes that the guest's resource tree gives to virtio-mem.
    pub fn iomem(&mut self) -> Result<u64> {
        Ok(self.iomem_ranges()?.into_iter().map(|(start, end)| end - start).sum())
    }

    /// Where the guest's resource tree has memory of virtio-mem: start and end, bytes.
    pub fn iomem_ranges(&mut self) -> Result<Vec<(u64, u64)>> {
        let text = self.run("grep virtio_mem /proc/iomem || true")?;
        text.lines().map(resource).collect()
    }

    /// Writes `mib` MiB of noise to memory, so that the host cannot share or skip it.
    pub fn dirty(&mut self, mib: u64) -> Result<()> {
        let command = format!("dd if=/dev/urandom of=/fill/noise bs=1M count={mib} 2> /dev/null");
        self.run(&command).map(drop)
    }

    /// The same, but one MiB of noise again and again: where nothing looks for pages that are alike,
    /// it costs the host the same, and the guest much less time.
    pub fn dirty_fast(&mut self, mib: u64) -> Result<()> {
        let command = format!(
            "dd if=/dev/urandom of=/piece bs=1M count=1 2> /dev/null; \
             i=0; while [ $i -lt {mib} ]; do cat /piece; i=$((i+1)); done > /fill/noise"
        );
        self.run(&command).map(drop)
    }

    /// Frees what [`Self::dirty`] wrote: free for the guest, still held by the host.
    pub fn free(&mut self) -> Result<()> {
        self.run("rm -f /fill/noise").map(drop)
    }

    /// The kernel log.
    pub fn dmesg(&mut self) -> Result<String> {
        self.run("dmesg")
    }

    /// The lines of the kernel log that tell of a bug or of a device given up.
    pub fn trouble(&mut self) -> Result<Vec<String>> {
        let log = self.dmesg()?;
        let bad = |line: &&str| TROUBLE.iter().any(|word| line.contains(word));
        Ok(log.lines().filter(bad).map(str::to_owned).collect())
    }

    fn send(&mut self, line: &str) -> Result<()> {
        self.port.write_all(line.as_bytes()).context("the guest's port is gone")
    }

    /// The lines before the one that `last` accepts, and that one.
    fn lines_until(
        &mut self,
        patience: Duration,
        last: impl Fn(&str) -> bool,
    ) -> Result<(Vec<String>, String)> {
        let deadline = Instant::now() + patience;
        let mut lines = Vec::new();
        loop {
            while let Some(end) = self.unread.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if last(&line) {
                    return Ok((lines, line));
                }
                lines.push(line);
            }
            if Instant::now() > deadline {
                let mut heard = String::new();
                lines.iter().rev().take(5).rev().for_each(|line| {
                    let _ = write!(heard, "\n  {line}");
                });
                bail!("nothing for {} s; the last words were:{heard}", patience.as_secs());
            }
            let mut chunk = [0; 4096];
            match self.port.read(&mut chunk) {
                Ok(0) => bail!("QEMU closed the guest's port"),
                Ok(count) => self.unread.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("the guest's port is gone"),
            }
        }
    }
}

/// The size in a line such as `MemTotal:  123 kB`.
fn kilobytes(text: &str) -> Result<u64> {
    let number = text.split_whitespace().rev().nth(1);
    let number = number.and_then(|number| number.parse::<u64>().ok());
    Ok(number.with_context(|| format!("no size in {text:?}"))? * KIB)
}

/// The start and the end of a resource such as `140000000-1bfffffff : System RAM (virtio_mem)`.
fn resource(line: &str) -> Result<(u64, u64)> {
    let range = line.split_whitespace().next().and_then(|range| range.split_once('-'));
    let (first, last) = range.with_context(|| format!("no range in {line:?}"))?;
    Ok((u64::from_str_radix(first, 16)?, u64::from_str_radix(last, 16)? + 1))
}

#[cfg(test)]
mod tests {
    use super::{kilobytes, resource};

    #[test]
    fn sizes_are_read_from_kernel_files() {
        assert_eq!(kilobytes("MemTotal:         983040 kB").unwrap(), 983_040 << 10);
        assert_eq!(kilobytes("Node 1 MemTotal:   1024 kB").unwrap(), 1 << 20);
        let line = "  140000000-1bfffffff : System RAM (virtio_mem)";
        assert_eq!(resource(line).unwrap(), (5 << 30, 7 << 30));
    }
}
