//! The pager as a process, and a source that says what it is told to.

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use migration::stream::ReturnMessage;
use vmstate::wire::WireReader;

const PATIENCE: Duration = Duration::from_secs(60);

/// A folder, and a pager that saves to it.
pub struct Saving {
    dir: tempfile::TempDir,
    child: Option<Child>,
}

impl Saving {
    /// Starts one that listens.
    pub fn start(more: &[&str]) -> Self {
        let mut saving = Self::in_folder(tempfile::tempdir().unwrap());
        saving.launch(more);
        saving.wait_listening();
        saving
    }

    /// None is started yet.
    pub fn in_folder(dir: tempfile::TempDir) -> Self {
        Self { dir, child: None }
    }

    /// Starts it.
    pub fn launch(&mut self, more: &[&str]) {
        self.launch_into(more, Stdio::piped(), Stdio::piped());
    }

    /// The same, with other readers of what it tells.
    pub fn launch_into(&mut self, more: &[&str], stdout: Stdio, stderr: Stdio) {
        let child = Command::new(env!("CARGO_BIN_EXE_vmem-pager"))
            .args(["save", "--vmm", "qemu", "--socket"])
            .arg(self.socket())
            .arg("--image")
            .arg(self.image())
            .args(more)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr)
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    pub fn wait_listening(&self) {
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(self.socket()).is_err() {
            assert!(Instant::now() < deadline, "the pager does not listen");
            thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.path("vm.sock")
    }

    pub fn image(&self) -> PathBuf {
        self.path("image")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A connection with it.
    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    pub fn id(&self) -> rustix::process::Pid {
        let id = self.child.as_ref().unwrap().id();
        rustix::process::Pid::from_raw(id.cast_signed()).unwrap()
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(self.id(), signal).unwrap();
    }

    /// Waits for its end: status, stdout, stderr.
    pub fn wait(&mut self) -> (Option<i32>, String, String) {
        let child = self.child.take().unwrap();
        let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (status.code(), text(stdout), text(stderr))
    }

    /// What is in the folder, but for sockets that are not the pager's.
    pub fn names(&self) -> Vec<OsString> {
        names(self.dir.path())
    }
}

impl Drop for Saving {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub fn names(dir: &Path) -> Vec<OsString> {
    let mut names: Vec<OsString> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names
}

/// Sends a stream; what cannot be sent since the pager has gone is left.
pub fn send(stream: &mut UnixStream, bytes: &[u8]) {
    let _ = stream.write_all(bytes);
}

/// The next message of the pager's; `None` when it has closed the channel.
pub fn hear(stream: &mut UnixStream) -> Option<ReturnMessage> {
    // By the byte, so that nothing of the next message is taken.
    struct Bytes<'a>(&'a mut UnixStream);
    impl Read for Bytes<'_> {
        fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
            self.0.read(&mut bytes[..1])
        }
    }
    ReturnMessage::read(&mut WireReader::new(Bytes(stream))).ok()
}
