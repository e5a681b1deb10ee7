//! The daemon starts itself anew, in the same process: with its sockets, which keep listening, and
//! its state, but with other memory.
//!
//! That is for after a front-end that was given a userfaultfd, with which it could fill any memory
//! of this process for as long as it keeps that. What it could reach is gone with exec.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use program::listener::{self, Bound, BoundFile};
use program::service_manager;
use rustix::io::{FdFlags, fcntl_setfd};
use serde::{Deserialize, Serialize};

use crate::log;
use program::inherited;

/// Names what is handed over, in the environment.
const VARIABLE: &str = "VHOST_USER_MEM_CONTINUES";

/// What is handed over: descriptors by number.
#[derive(Serialize, Deserialize)]
struct HandOver {
    state: RawFd,
    sockets: Vec<Socket>,
}

#[derive(Serialize, Deserialize)]
struct Socket {
    path: Vec<u8>,
    listener: RawFd,
    file: Option<SocketFile>,
}

#[derive(Serialize, Deserialize)]
struct SocketFile {
    dev: u64,
    ino: u64,
    lock: RawFd,
}

/// Whether this process was another daemon before, which has left its state.
pub(crate) fn is_continued() -> bool {
    std::env::var_os(VARIABLE).is_some()
}

/// What the daemon left that this one continues: its state. Its sockets are found when they are
/// bound. `None` at a first start.
///
/// # Errors
///
/// When what is named is not there.
pub(crate) fn left() -> anyhow::Result<Option<File>> {
    let Some(text) = std::env::var_os(VARIABLE) else { return Ok(None) };
    let taken = || -> io::Result<File> {
        let HandOver { state, sockets } = serde_json::from_slice(text.as_bytes())?;
        let sockets: io::Result<Vec<Bound>> = sockets.into_iter().map(Socket::take).collect();
        listener::continue_with(sockets?);
        Ok(inherited::take(state)?.into())
    };
    let what = || format!("{VARIABLE} is set, but not by a daemon that was started here before");
    taken().map(Some).with_context(what)
}

impl Socket {
    fn of(bound: &Bound) -> Self {
        let file = bound.file.as_ref().map(|file| {
            let (dev, ino) = file.identity;
            SocketFile { dev, ino, lock: file.lock.as_raw_fd() }
        });
        let path = bound.path.as_os_str().as_bytes().to_vec();
        Self { path, listener: bound.listener.as_raw_fd(), file }
    }

    fn take(self) -> io::Result<Bound> {
        let listener: OwnedFd = inherited::take(self.listener)?;
        let path = PathBuf::from(OsString::from_vec(self.path));
        let file = match self.file {
            None => None,
            Some(SocketFile { dev, ino, lock }) => {
                let lock = inherited::take(lock)?.into();
                Some(BoundFile { identity: (dev, ino), lock })
            }
        };
        Ok(Bound { path, listener: listener.into(), file })
    }
}

/// Starts the daemon anew. Does not return unless that fails.
pub(crate) fn renew(state: &File) -> anyhow::Error {
    log::flush();
    let kept = |fd: &dyn AsFd| fcntl_setfd(fd.as_fd(), FdFlags::empty());
    let prepared = listener::with_bound(|bound| -> io::Result<Vec<Socket>> {
        bound
            .map(|bound| {
                kept(&bound.listener)?;
                if let Some(file) = &bound.file {
                    kept(&file.lock)?;
                }
                Ok(Socket::of(bound))
            })
            .collect()
    });
    let started = || -> io::Result<()> {
        let sockets = prepared?;
        kept(&state)?;
        let hand_over = HandOver { state: state.as_raw_fd(), sockets };
        let mut args = std::env::args_os();
        // Also when the file was replaced or removed meanwhile.
        let mut command = Command::new("/proc/self/exe");
        if let Some(name) = args.next() {
            command.arg0(name);
        }
        // What came with the first start is taken, and its numbers mean something else by now.
        for variable in service_manager::PASSED_VARIABLES {
            command.env_remove(variable);
        }
        Err(command.args(args).env(VARIABLE, serde_json::to_string(&hand_over)?).exec())
    };
    let error = started().err().unwrap_or_else(|| io::ErrorKind::Other.into());
    anyhow::Error::from(error).context("cannot start anew after a front-end that used postcopy")
}
