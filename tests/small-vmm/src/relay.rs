//! A network between two VMMs that a test can break.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use rustix::net::{Shutdown, shutdown};

use crate::migration::transport::{Listener, connect};

const BUFFER: usize = 16 << 10;
/// Between two looks at whether what is held back may go on.
const PAUSE: Duration = Duration::from_millis(1);

/// Passes connections on to an address, in the order in which they come.
#[derive(Debug)]
pub struct Relay {
    address: String,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Bytes that went to the address over the first connection.
    passed: AtomicU64,
    /// No more go there.
    hold_at: AtomicU64,
    broken: AtomicBool,
    /// Both ends of all connections.
    ends: Mutex<Vec<Arc<File>>>,
}

impl Relay {
    /// Passes on what comes to the address `from` to the address `to`.
    ///
    /// # Errors
    ///
    /// When `from` is taken.
    pub fn start(from: &str, to: &str) -> anyhow::Result<Self> {
        let listener = Listener::bind(from)?;
        let address = listener.address().to_owned();
        let shared = Arc::new(Shared {
            passed: AtomicU64::new(0),
            hold_at: AtomicU64::new(u64::MAX),
            broken: AtomicBool::new(false),
            ends: Mutex::default(),
        });
        let (passing, to) = (Arc::clone(&shared), to.to_owned());
        thread::Builder::new().name("relay".to_owned()).spawn(move || {
            // Ends when the relay is broken; its address is free then.
            while let Ok(near) = listener.accept(|| passing.is_broken()) {
                if let Err(error) = passing.link(near, &to) {
                    eprintln!("relay: {error:#}");
                }
            }
        })?;
        Ok(Self { address, shared })
    }

    /// Where to connect to.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Holds back what comes over the first connection once `bytes` more have gone through.
    pub fn hold_after(&self, bytes: u64) {
        let passed = self.shared.passed.load(Ordering::Relaxed);
        self.shared.hold_at.store(passed + bytes, Ordering::Relaxed);
    }

    /// Whether something is held back.
    pub fn is_holding(&self) -> bool {
        self.shared.room() == 0
    }

    /// Breaks all connections, and takes no new ones.
    pub fn break_all(&self) {
        self.shared.break_all();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.break_all();
    }
}

impl Shared {
    fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }

    /// Bytes that may still go over the first connection.
    fn room(&self) -> u64 {
        let passed = self.passed.load(Ordering::Relaxed);
        self.hold_at.load(Ordering::Relaxed).saturating_sub(passed)
    }

    fn break_all(&self) {
        let ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        self.broken.store(true, Ordering::Relaxed);
        for end in &*ends {
            close(end);
        }
    }

    fn link(self: &Arc<Self>, near: OwnedFd, to: &str) -> anyhow::Result<()> {
        let far = Arc::new(File::from(connect(to)?));
        let near = Arc::new(File::from(near));
        let first = {
            let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
            let first = ends.is_empty();
            ends.extend([Arc::clone(&near), Arc::clone(&far)]);
            first
        };
        for (from, to, counted) in [(near.clone(), far.clone(), first), (far, near, false)] {
            let shared = Arc::clone(self);
            let passing = thread::Builder::new().name("relay".to_owned()).spawn(move || {
                shared.pass(&from, &to, counted);
                close(&from);
                close(&to);
            });
            passing.context("cannot start a thread")?;
        }
        Ok(())
    }

    /// Passes bytes on until either end is closed.
    fn pass(&self, mut from: &File, mut to: &File, counted: bool) {
        let mut buffer = [0; BUFFER];
        while !self.is_broken() {
            let room = if counted { self.room().min(BUFFER as u64) as usize } else { BUFFER };
            if room == 0 {
                thread::sleep(PAUSE);
                continue;
            }
            match from.read(&mut buffer[..room]) {
                Ok(read) if read != 0 && to.write_all(&buffer[..read]).is_ok() => {
                    if counted {
                        self.passed.fetch_add(read as u64, Ordering::Relaxed);
                    }
                }
                _ => return,
            }
        }
    }
}

fn close(end: &File) {
    // Fails only when the other side was faster.
    let _ = shutdown(end, Shutdown::Both);
}
