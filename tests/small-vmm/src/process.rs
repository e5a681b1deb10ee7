//! The VMM as a child process: started beside a daemon, told commands, ended in every way.

use std::env;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command as Process, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use crate::daemon::Daemon;
use crate::guest::{Command, Report};
use crate::migration::{Links, MigrationReport};

/// What a VMM is started with.
#[derive(Clone, Debug)]
pub struct VmmOptions {
    /// Guest-physical address of the region.
    pub addr: u64,
    /// Its size, bytes.
    pub region_size: u64,
    /// Whether the guest comes from elsewhere.
    pub incoming: bool,
    /// Whether such a guest waits for [`Command::Cont`].
    pub paused: bool,
    /// The release whose state the devices send and take; the newest when not given.
    pub compat_level: Option<&'static str>,
}

/// A running VMM. Dropping it kills it.
#[derive(Debug)]
pub struct Vmm {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Vmm {
    /// Starts `binary` as the VMM of a daemon.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start(binary: &Path, daemon: &Daemon, options: &VmmOptions) -> anyhow::Result<Self> {
        let mut process = Process::new(binary);
        process.arg("guest").arg("--socket").arg(daemon.socket());
        process.arg("--addr").arg(options.addr.to_string());
        process.arg("--region-size").arg(options.region_size.to_string());
        if daemon.options().discard_socket {
            process.arg("--discard-socket").arg(daemon.discard_socket());
        }
        if options.incoming {
            process.args(["--incoming", "defer"]);
        }
        if options.paused {
            process.arg("--paused");
        }
        if let Some(level) = options.compat_level {
            process.args(["--compat-level", level]);
        }
        let mut child = process
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the VMM process")?;
        let commands = child.stdin.take().context("no pipe to the VMM process")?;
        let answers = child.stdout.take().context("no pipe from the VMM process")?;
        Ok(Self { child, commands, answers: BufReader::new(answers) })
    }

    /// Tells it a command, and waits for the answer.
    ///
    /// # Errors
    ///
    /// When the command was not done, or the process ended.
    pub fn tell(&mut self, command: Command) -> anyhow::Result<Report> {
        serde_json::to_writer(&mut self.commands, &command)?;
        writeln!(self.commands)?;
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("the VMM process ended at {command:?}");
        }
        let report: Report = serde_json::from_str(&line)?;
        match report.error {
            Some(error) => bail!("{error}"),
            None => Ok(report),
        }
    }

    /// How things are.
    ///
    /// # Errors
    ///
    /// As [`tell`](Self::tell).
    pub fn report(&mut self) -> anyhow::Result<Report> {
        self.tell(Command::Report { cells: 0 })
    }

    /// Has it wait for a guest, and tells where.
    ///
    /// # Errors
    ///
    /// As [`tell`](Self::tell).
    pub fn wait_for_guest(&mut self, from: &str, discard_aware: bool) -> anyhow::Result<String> {
        self.wait_over(from, discard_aware, &Links::default())
    }

    /// Has it wait for a guest that may come before its memory, and tells where.
    ///
    /// # Errors
    ///
    /// As [`tell`](Self::tell).
    pub fn wait_for_guest_in_postcopy(&mut self, from: &str) -> anyhow::Result<String> {
        self.wait_at(from, true, true, Links::default())
    }

    /// As [`wait_for_guest`](Self::wait_for_guest), of one that comes over `links`.
    ///
    /// # Errors
    ///
    /// As [`tell`](Self::tell).
    pub fn wait_over(
        &mut self,
        from: &str,
        discard_aware: bool,
        links: &Links,
    ) -> anyhow::Result<String> {
        self.wait_at(from, discard_aware, false, links.clone())
    }

    fn wait_at(
        &mut self,
        from: &str,
        discard_aware: bool,
        postcopy: bool,
        links: Links,
    ) -> anyhow::Result<String> {
        let from = from.to_owned();
        let report = self.tell(Command::Incoming { from, discard_aware, postcopy, links })?;
        report.listening.context("it does not listen")
    }

    /// How its migration stands.
    ///
    /// # Errors
    ///
    /// As [`tell`](Self::tell).
    pub fn migration(&mut self) -> anyhow::Result<MigrationReport> {
        self.tell(Command::Status)?.migration.context("no migration")
    }

    /// Waits until its migration has ended in any way.
    ///
    /// # Errors
    ///
    /// When it does not end in time, or the process does.
    pub fn wait_migration(&mut self, timeout: Duration) -> anyhow::Result<MigrationReport> {
        let start = Instant::now();
        loop {
            let report = self.migration()?;
            if report.over {
                return Ok(report);
            }
            ensure!(start.elapsed() < timeout, "the migration still runs: {report:?}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until its vCPUs have verified `pages` more.
    ///
    /// # Errors
    ///
    /// When one has found a wrong page, or they do not get there.
    pub fn verify(&mut self, pages: u64, timeout: Duration) -> anyhow::Result<Report> {
        let start = Instant::now();
        let wanted = self.report()?.verified + pages;
        loop {
            let report = self.report()?;
            ensure!(report.healthy, "a vCPU has found a wrong page");
            if report.verified >= wanted {
                return Ok(report);
            }
            ensure!(start.elapsed() < timeout, "{} of {wanted} pages verified", report.verified);
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Has it look at all that was written a last time, and end.
    ///
    /// # Errors
    ///
    /// When a page was wrong.
    pub fn quit(mut self) -> anyhow::Result<Report> {
        let report = self.tell(Command::Quit)?;
        let status = self.wait()?;
        ensure!(status.success(), "the VMM process ended with {status}");
        Ok(report)
    }

    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// When it cannot be waited for.
    pub fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        Ok(self.child.wait()?)
    }

    /// Kills it, as a crash would.
    pub fn kill(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The daemon beside `own`, an executable of this package; built first when it is not there.
///
/// # Errors
///
/// When it cannot be built.
pub fn find_daemon(own: &Path) -> anyhow::Result<PathBuf> {
    find_program(own, "vhost-user-mem")
}

/// As [`find_daemon`], of the package and program `name` of this workspace.
///
/// # Errors
///
/// When it cannot be built.
pub fn find_program(own: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let dir = own.parent().context("this executable is in no directory")?;
    let binary = dir.join(name);
    if !binary.exists() {
        let mut build = Process::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        build.args(["build", "-p", name]);
        if dir.ends_with("release") {
            build.arg("--release");
        }
        // Cargo tells this executable where it comes from; without that, it is looked for from
        // here.
        if let Some(package) = env::var_os("CARGO_MANIFEST_DIR") {
            build.current_dir(package);
        }
        let status = build.status().context("cannot run cargo to build a program")?;
        ensure!(
            status.success() && binary.exists(),
            "no program at {}: build the package {name}",
            binary.display()
        );
    }
    Ok(binary)
}
