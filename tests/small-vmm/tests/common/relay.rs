//! A channel that breaks after so many bytes.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::{self, JoinHandle};

use tempfile::TempDir;

/// Passes one connection on.
pub struct Relay {
    dir: TempDir,
    thread: JoinHandle<u64>,
}

impl Relay {
    /// Passes on what comes to the address `to`, until `limit` bytes went there; then it breaks
    /// both connections.
    pub fn start(to: &str, limit: u64) -> Self {
        let to = PathBuf::from(to.strip_prefix("unix:").unwrap());
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("relay.sock")).unwrap();
        let thread = thread::spawn(move || {
            let (near, _) = listener.accept().unwrap();
            let far = UnixStream::connect(to).unwrap();
            let (mut back_from, mut back_to) =
                (far.try_clone().unwrap(), near.try_clone().unwrap());
            let back = thread::spawn(move || {
                // Ends with either connection.
                let _ = io::copy(&mut back_from, &mut back_to);
                let _ = back_to.shutdown(Shutdown::Both);
            });
            let passed = pass(&near, &far, limit);
            let _ = far.shutdown(Shutdown::Both);
            let _ = near.shutdown(Shutdown::Both);
            back.join().unwrap();
            passed
        });
        Self { dir, thread }
    }

    /// Where to connect to.
    pub fn address(&self) -> String {
        format!("unix:{}", self.dir.path().join("relay.sock").display())
    }

    /// Bytes that went through, once both connections have ended.
    pub fn join(self) -> u64 {
        self.thread.join().unwrap()
    }
}

fn pass(mut near: &UnixStream, mut far: &UnixStream, limit: u64) -> u64 {
    let mut buffer = vec![0; 16 << 10];
    let mut passed = 0;
    while passed < limit {
        let most = (limit - passed).min(buffer.len() as u64) as usize;
        match near.read(&mut buffer[..most]) {
            Ok(read) if read != 0 && far.write_all(&buffer[..read]).is_ok() => {
                passed += read as u64
            }
            _ => break,
        }
    }
    passed
}
