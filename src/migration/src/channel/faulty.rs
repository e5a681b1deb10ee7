//! A transport of a test's own, with faults.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Mutex;
use std::time::Duration;

use super::descriptor::Descriptor;
use super::transport::{Ready, Transport};

/// The most that is held until it is flushed, bytes.
const HELD: usize = 3000;

/// Over a socket that the kernel may not gather to: takes few bytes at a time, holds them, and says in between
/// that it would block, or was interrupted.
#[derive(Debug)]
pub(crate) struct Faulty {
    inner: Descriptor,
    /// The most bytes of a call.
    step: usize,
    /// After so many bytes, writes fail.
    fails_after: Option<u64>,
    encrypted: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    held: Vec<u8>,
    taken: u64,
    calls: u64,
}

impl Faulty {
    pub(crate) fn new(fd: impl Into<OwnedFd>, step: usize) -> Self {
        let inner = Descriptor::new(fd.into()).unwrap();
        Self { inner, step, fails_after: None, encrypted: false, state: Mutex::default() }
    }

    /// Fails as a cable that is cut after `bytes`.
    pub(crate) fn fails_after(mut self, bytes: u64) -> Self {
        self.fails_after = Some(bytes);
        self
    }

    /// Is taken for encrypted.
    pub(crate) fn encrypted(mut self) -> Self {
        self.encrypted = true;
        self
    }

    /// Every third call does nothing.
    fn stutter(state: &mut State) -> io::Result<()> {
        state.calls += 1;
        match state.calls % 6 {
            2 => Err(io::ErrorKind::WouldBlock.into()),
            5 => Err(io::ErrorKind::Interrupted.into()),
            _ => Ok(()),
        }
    }

    fn send_held(&self, state: &mut State) -> io::Result<()> {
        while !state.held.is_empty() {
            let sent = self.inner.write(&state.held)?;
            state.held.drain(..sent);
        }
        Ok(())
    }
}

impl Transport for Faulty {
    fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        Self::stutter(&mut self.state.lock().unwrap())?;
        let most = buf.len().min(self.step);
        self.inner.read(&mut buf[..most])
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.state.lock().unwrap();
        Self::stutter(&mut state)?;
        if self.fails_after.is_some_and(|after| state.taken >= after) {
            return Err(io::Error::other("the cable was cut"));
        }
        if state.held.len() >= HELD {
            self.send_held(&mut state)?;
        }
        let taken = bytes.len().min(self.step).min(HELD - state.held.len());
        state.held.extend_from_slice(&bytes[..taken]);
        state.taken += taken as u64;
        Ok(taken)
    }

    fn flush(&self) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        Self::stutter(&mut state)?;
        self.send_held(&mut state)
    }

    fn wait(&self, ready: Ready, most: Duration) -> io::Result<bool> {
        self.inner.wait(ready, most)
    }

    fn shutdown(&self) {
        self.inner.shutdown();
    }

    fn shutdown_write(&self) {
        self.inner.shutdown_write();
    }

    fn is_hung_up(&self) -> bool {
        self.inner.is_hung_up()
    }

    fn is_encrypted(&self) -> bool {
        self.encrypted
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        let held = std::mem::take(&mut self.state.get_mut().unwrap().held);
        assert!(
            held.is_empty()
                || super::descriptor::is_hung_up(self.inner.descriptor().unwrap().as_fd()),
            "{} bytes were never flushed",
            held.len()
        );
    }
}
