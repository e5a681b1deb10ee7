//! The program in the guest that verifies its memory: how it is built, and what it says.

use std::env;
use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::wait;

/// For a pass: a second on a machine that has nothing else to do.
const PATIENCE: Duration = Duration::from_secs(60);

/// Builds the program for the guest, which has no libraries.
pub fn build(target: &Path) -> Result<Vec<u8>> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let folder = env!("CARGO_MANIFEST_DIR");
    let built = Command::new(rustc)
        // The toolchain is this workspace's.
        .current_dir(folder)
        .args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-o"])
        .arg(target)
        .arg("src/bin/guest-verifier.rs")
        .output()
        .context("cannot start rustc")?;
    let errors = String::from_utf8_lossy(&built.stderr);
    ensure!(built.status.success(), "the verifier does not build: {errors}");
    fs::read(target).context("the verifier was not built")
}

/// A line of the verifier's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick {
    /// Of 20 ms each, as far as the guest runs.
    pub tick: u64,
    /// How often all of its memory was verified.
    pub pass: u64,
    /// Pages that were found wrong.
    pub bad: u64,
}

impl Tick {
    fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["tick", tick, "pass", pass, "bad", bad] = words[..] else { return None };
        Some(Self { tick: tick.parse().ok()?, pass: pass.parse().ok()?, bad: bad.parse().ok()? })
    }
}

/// The port that it writes to.
pub struct Verifier {
    port: UnixStream,
    unread: Vec<u8>,
}

impl Verifier {
    /// Opens the port. What was said before is lost.
    pub fn connect(port: &Path) -> Result<Self> {
        let port =
            wait::until("the verifier's port", wait::SHORT, || Ok(UnixStream::connect(port).ok()))?;
        port.set_read_timeout(Some(Duration::from_millis(200)))?;
        Ok(Self { port, unread: Vec::new() })
    }

    /// The next of its lines.
    pub fn tick(&mut self) -> Result<Tick> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            while let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                // The first line may be half a one.
                if let Some(tick) = Tick::parse(&String::from_utf8_lossy(&line)) {
                    return Ok(tick);
                }
            }
            if Instant::now() > deadline {
                bail!("the verifier has said nothing for {} s", PATIENCE.as_secs());
            }
            let mut bytes = [0; 4096];
            match self.port.read(&mut bytes) {
                Ok(0) => bail!("QEMU closed the verifier's port"),
                Ok(read) => self.unread.extend_from_slice(&bytes[..read]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("the verifier's port is gone"),
            }
        }
    }

    /// Waits until it has gone through all of its memory so often, from the next pass on; the last line.
    pub fn wait_passes(&mut self, passes: u64) -> Result<Tick> {
        let first = self.tick()?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let tick = self.tick()?;
            if tick.pass >= first.pass + passes {
                return Ok(tick);
            }
            ensure!(Instant::now() < deadline, "the verifier is still at pass {}", tick.pass);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Tick;

    #[test]
    fn whole_lines_are_understood() {
        let tick = Tick { tick: 12, pass: 3, bad: 0 };
        assert_eq!(Tick::parse("tick 12 pass 3 bad 0\r\n"), Some(tick));
        assert_eq!(Tick::parse("k 12 pass 3 bad 0"), None);
        assert_eq!(Tick::parse("tick 12 pass 3 bad"), None);
    }
}
