//! The daemon as a child process: start it, wait until it listens, end it in every way.

use std::io::{self, BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::api::ApiClient;

/// How long a daemon may take to listen.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// What can go wrong with a child process.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused something.
    #[error("daemon process: {0}")]
    Io(#[from] io::Error),
    /// The daemon ended before it listened.
    #[error("the daemon ended with {status}: {stderr}")]
    Ended {
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        stderr: String,
    },
    /// The daemon does not listen.
    #[error("the daemon does not listen at {path} after {START_TIMEOUT:?}: {stderr}")]
    NotListening {
        /// The socket.
        path: PathBuf,
        /// What it said.
        stderr: String,
    },
    /// The daemon did not end in time.
    #[error("the daemon still runs after {0:?}")]
    StillRunning(Duration),
}

type Result<T> = std::result::Result<T, Error>;

/// What becomes of what a daemon writes to stderr.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum LogReader {
    /// It is read.
    Reads,
    /// The pipe stays open and is not read: it fills.
    Hangs,
    /// The pipe is closed.
    Gone,
}

/// The arguments of a daemon.
#[derive(Clone, Debug)]
pub struct DaemonOptions {
    /// `--addr`.
    pub addr: u64,
    /// `--region-size`.
    pub region_size: u64,
    /// `--block-size`, or the daemon's choice.
    pub block_size: Option<u64>,
    /// `--requested-size`.
    pub requested_size: u64,
    /// Whether there is a `--discard-socket`.
    pub discard_socket: bool,
    /// Whether there is a `--state-file`.
    pub state_file: bool,
    /// Anything else.
    pub more: Vec<String>,
}

impl DaemonOptions {
    /// A region with nothing requested.
    pub fn new(addr: u64, region_size: u64) -> Self {
        Self {
            addr,
            region_size,
            block_size: None,
            requested_size: 0,
            discard_socket: false,
            state_file: false,
            more: Vec::new(),
        }
    }

    /// With this block size.
    pub fn block_size(self, block_size: u64) -> Self {
        Self { block_size: Some(block_size), ..self }
    }

    /// With this much requested.
    pub fn requested_size(self, requested_size: u64) -> Self {
        Self { requested_size, ..self }
    }

    /// With a discard channel.
    pub fn discard_socket(self) -> Self {
        Self { discard_socket: true, ..self }
    }

    /// With a state file.
    pub fn state_file(self) -> Self {
        Self { state_file: true, ..self }
    }

    /// With another argument.
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.more.push(arg.into());
        self
    }
}

/// A running daemon, its sockets and its state file in a directory that goes with it.
#[derive(Debug)]
pub struct Daemon {
    binary: PathBuf,
    options: DaemonOptions,
    dir: TempDir,
    child: Child,
    stderr: Arc<Mutex<String>>,
    log_reader: Arc<AtomicU8>,
    reader: Option<JoinHandle<()>>,
}

impl Daemon {
    /// Starts the daemon and waits until it listens.
    pub fn start(binary: &Path, options: DaemonOptions) -> Result<Self> {
        Self::start_in(binary, options, |_| Ok(()))
    }

    /// As [`Self::start`], once its folder was prepared.
    pub fn start_in(
        binary: &Path,
        options: DaemonOptions,
        prepare: impl FnOnce(&Path) -> io::Result<()>,
    ) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("vmem-").tempdir()?;
        prepare(dir.path())?;
        let log_reader = Arc::new(AtomicU8::new(LogReader::Reads as u8));
        let (child, stderr, reader) = spawn(binary, &options, dir.path(), &log_reader)?;
        let (binary, reader) = (binary.to_owned(), Some(reader));
        let mut daemon = Self { binary, options, dir, child, stderr, log_reader, reader };
        daemon.wait_listening()?;
        Ok(daemon)
    }

    /// Starts it again, with the same sockets and the same state file, after it ended or was
    /// killed.
    pub fn restart(&mut self) -> Result<()> {
        self.kill()?;
        let (child, stderr, reader) =
            spawn(&self.binary, &self.options, self.dir.path(), &self.log_reader)?;
        (self.child, self.stderr, self.reader) = (child, stderr, Some(reader));
        self.wait_listening()
    }

    /// The arguments.
    pub fn options(&self) -> &DaemonOptions {
        &self.options
    }

    /// The arguments, to be changed before a restart.
    pub fn options_mut(&mut self) -> &mut DaemonOptions {
        &mut self.options
    }

    /// The vhost-user socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("vhost.sock")
    }

    /// The socket of the management API.
    pub fn api_socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    /// The socket of the discard channel.
    pub fn discard_socket(&self) -> PathBuf {
        self.dir.path().join("discard.sock")
    }

    /// The state file.
    pub fn state_file(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// A client of the management API.
    pub fn api(&self) -> ApiClient {
        ApiClient::new(self.api_socket())
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to stderr so far.
    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has the reader of its stderr do something else, from the next line on and until the daemon
    /// is started again.
    pub fn set_log_reader(&self, reader: LogReader) {
        self.log_reader.store(reader as u8, Ordering::Relaxed);
    }

    /// Waits until `text` is in what it logged, which comes through a pipe and so a little later
    /// than whatever was logged about. False when it is not there within `bound`.
    pub fn wait_logged(&self, text: &str, bound: Duration) -> bool {
        let start = Instant::now();
        while !self.stderr().contains(text) {
            if start.elapsed() > bound {
                return false;
            }
            thread::sleep(Duration::from_millis(2));
        }
        true
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Kills it, as a crash would.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        self.join_reader();
        Ok(())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid {
            kill_process(pid, signal).map_err(io::Error::from)?;
        }
        Ok(())
    }

    /// Asks it to end (SIGTERM) and waits for that.
    pub fn terminate(&mut self, bound: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                self.join_reader();
                return Ok(status);
            }
            if start.elapsed() > bound {
                return Err(Error::StillRunning(bound));
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn join_reader(&mut self) {
        self.set_log_reader(LogReader::Reads);
        if let Some(reader) = self.reader.take() {
            // It only copies lines and ends with the pipe.
            let _ = reader.join();
        }
    }

    fn wait_listening(&mut self) -> Result<()> {
        let start = Instant::now();
        // The vhost-user socket serves one front-end at a time, so it is only looked at, not
        // connected to.
        while UnixStream::connect(self.api_socket()).is_err() || !self.socket().exists() {
            if let Some(status) = self.child.try_wait()? {
                self.join_reader();
                return Err(Error::Ended { status, stderr: self.stderr() });
            }
            if start.elapsed() > START_TIMEOUT {
                return Err(Error::NotListening { path: self.api_socket(), stderr: self.stderr() });
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.kill();
    }
}

fn spawn(
    binary: &Path,
    options: &DaemonOptions,
    dir: &Path,
    log_reader: &Arc<AtomicU8>,
) -> Result<(Child, Arc<Mutex<String>>, JoinHandle<()>)> {
    let mut command = Command::new(binary);
    command.arg("--socket-path").arg(dir.join("vhost.sock"));
    command.arg("--api-socket").arg(dir.join("api.sock"));
    command.arg("--addr").arg(format!("{:#x}", options.addr));
    command.arg("--region-size").arg(options.region_size.to_string());
    if let Some(block_size) = options.block_size {
        command.arg("--block-size").arg(block_size.to_string());
    }
    if options.requested_size != 0 {
        command.arg("--requested-size").arg(options.requested_size.to_string());
    }
    if options.discard_socket {
        command.arg("--discard-socket").arg(dir.join("discard.sock"));
    }
    if options.state_file {
        command.arg("--state-file").arg(dir.join("state"));
    }
    command.args(&options.more).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let said = Arc::new(Mutex::new(String::new()));
    let pipe = child.stderr.take();
    let (copy, log_reader) = (said.clone(), log_reader.clone());
    let reader = thread::spawn(move || {
        for line in
            pipe.into_iter().flat_map(|pipe| BufReader::new(pipe).lines()).map_while(io::Result::ok)
        {
            while log_reader.load(Ordering::Relaxed) == LogReader::Hangs as u8 {
                thread::sleep(Duration::from_millis(5));
            }
            if log_reader.load(Ordering::Relaxed) == LogReader::Gone as u8 {
                return;
            }
            let mut said = copy.lock().unwrap_or_else(PoisonError::into_inner);
            said.push_str(&line);
            said.push('\n');
        }
    });
    Ok((child, said, reader))
}
