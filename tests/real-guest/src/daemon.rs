//! The daemon under test, as a process that can be killed and started again.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::api::Api;
use crate::machine::Setup;
use crate::process;
use crate::qemu::REGION_ADDR;
use crate::wait;

/// The bound that the daemon promises for an orderly end.
const END: Duration = Duration::from_secs(2);

/// A running `vhost-user-mem`.
pub struct Daemon {
    child: Child,
    program: PathBuf,
    setup: Setup,
    dir: PathBuf,
    /// Its management API.
    pub api: Api,
}

impl Daemon {
    /// Starts the daemon and waits until its API answers.
    pub fn start(program: &Path, setup: &Setup, dir: &Path) -> Result<Self> {
        let child = spawn(program, setup, dir)?;
        let api = Api::new(api_socket(dir));
        let mut daemon =
            Self { child, program: program.to_owned(), setup: *setup, dir: dir.to_owned(), api };
        daemon.wait_up()?;
        Ok(daemon)
    }

    /// What is run.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Where clients of the discard channel connect.
    pub fn discard_socket(&self) -> PathBuf {
        discard_socket(&self.dir)
    }

    /// Kills the daemon without a warning.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Starts it again, on what it left behind.
    pub fn restart(&mut self) -> Result<()> {
        self.child = spawn(&self.program, &self.setup, &self.dir)?;
        self.wait_up()
    }

    /// Ends the daemon in order, and sees that it keeps its promises about that.
    pub fn stop(&mut self) -> Result<()> {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::TERM)?;
        wait::until("the daemon to end on SIGTERM", END, || Ok(self.child.try_wait()?))?;
        let sockets =
            [api_socket(&self.dir), discard_socket(&self.dir), Setup::vhost_socket(&self.dir)];
        for socket in sockets {
            ensure!(!socket.exists(), "the daemon left {} behind", socket.display());
        }
        Ok(())
    }

    fn wait_up(&mut self) -> Result<()> {
        let socket = Setup::vhost_socket(&self.dir);
        wait::until("the daemon's API", wait::SHORT, || match self.child.try_wait()? {
            Some(status) => bail!("the daemon ended with {status}"),
            None => Ok((socket.exists() && self.api.device().is_ok()).then_some(())),
        })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The name of the daemon's log in the working folder.
pub const LOG: &str = "daemon.log";

fn api_socket(dir: &Path) -> PathBuf {
    dir.join("api.sock")
}

fn discard_socket(dir: &Path) -> PathBuf {
    dir.join("discard.sock")
}

fn spawn(program: &Path, setup: &Setup, dir: &Path) -> Result<Child> {
    let mut command = Command::new(program);
    command.arg("--socket-path").arg(Setup::vhost_socket(dir));
    command.args(["--addr", &format!("{REGION_ADDR:#x}")]);
    command.args(["--region-size", &setup.region.to_string()]);
    command.args(["--block-size", &setup.block.to_string()]);
    if let Some(node) = setup.node {
        command.args(["--node-id", &node.to_string()]);
    }
    command.arg("--api-socket").arg(api_socket(dir));
    command.arg("--discard-socket").arg(discard_socket(dir));
    command.arg("--state-file").arg(dir.join("state"));
    process::start(&command, &dir.join(LOG))
}
