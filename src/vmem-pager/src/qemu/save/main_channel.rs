//! What is said back on the main channel.

use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration::page_bitmap::PageBitmap;
use migration::postcopy::put_received;
use migration::stream::ReturnMessage;
use migration::{Channel, Sink};

use super::incoming::Peer;
use super::kept;
use super::session::Session;
use crate::error::PagerError;
use crate::image::pages::Pages;
use crate::run::POLL;
use crate::socket::Listener;

/// What SHUT says when the guest is saved, and when it is not.
const SAVED: u32 = 0;
const FAILED: u32 = 1;
/// For the source to hear that it failed, and to close.
const FAREWELL: Duration = Duration::from_secs(5);

/// The way back to the source.
pub(super) struct MainChannel<'a> {
    channel: Channel,
    session: &'a Session,
    listener: &'a Listener,
    has_return_path: bool,
    guest_taken: bool,
    /// Where a guest that is given away is kept.
    kept: PathBuf,
    has_kept: bool,
}

impl<'a> MainChannel<'a> {
    pub fn new(
        channel: &Channel,
        session: &'a Session,
        listener: &'a Listener,
        kept: PathBuf,
    ) -> Self {
        let channel = channel.clone_handle();
        let (has_return_path, guest_taken, has_kept) = (false, false, false);
        Self { channel, session, listener, has_return_path, guest_taken, kept, has_kept }
    }

    /// Whether the source has given the guest away while some of its memory was outstanding.
    pub fn is_guest_taken(&self) -> bool {
        self.guest_taken
    }

    /// The guest is in the image: what was kept of it is of no use any more.
    pub fn forget_kept(&self) {
        if self.guest_taken {
            kept::remove(&self.kept);
        }
    }

    /// Tells the source that the guest is saved, where it listens.
    ///
    /// # Errors
    ///
    /// When it does not hear it.
    pub fn tell_saved(&mut self) -> Result<(), PagerError> {
        if !self.has_return_path {
            return Ok(());
        }
        self.shut(SAVED).map_err(|error| {
            PagerError::Peer(format!(
                "the guest is saved, but QEMU could not be told, and may let it run on: {error}"
            ))
        })
    }

    /// Tells the source that the save has failed, where it listens, and ends the connection. In postcopy,
    /// where the guest could not run on there, only that: the source pauses, and keeps the guest's memory.
    pub fn tell_failed(&mut self) {
        if self.has_kept && !self.guest_taken {
            kept::remove(&self.kept);
        }
        if self.has_return_path && !self.guest_taken {
            let told = self.shut(FAILED);
            if told.is_ok() {
                self.channel.shutdown_write();
                self.drain();
            }
        }
        self.channel.shutdown();
    }

    /// Reads what still comes, so that closing does not take the last message from the source.
    fn drain(&self) {
        let begun = Instant::now();
        let mut bytes = [0; 64 << 10];
        let mut channel = self.channel.uncancellable();
        channel.set_read_patience(Some(POLL));
        while begun.elapsed() < FAREWELL {
            match channel.read(&mut bytes) {
                Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {}
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }

    fn answer(&mut self, bytes: &[u8]) -> Result<(), PagerError> {
        self.channel
            .write(bytes)
            .map_err(|error| PagerError::Peer(format!("QEMU does not take an answer: {error}")))
    }

    fn shut(&self, outcome: u32) -> std::io::Result<()> {
        let mut bytes = Vec::new();
        ReturnMessage::Shut(outcome).put(&mut bytes);
        let mut channel = self.channel.uncancellable();
        channel.set_write_patience(FAREWELL);
        channel.write(&bytes)
    }
}

impl Peer for MainChannel<'_> {
    fn open_return_path(&mut self) {
        self.has_return_path = true;
    }

    fn has_return_path(&self) -> bool {
        self.has_return_path
    }

    fn reply(&mut self, message: &ReturnMessage) -> Result<(), PagerError> {
        let mut bytes = Vec::new();
        message.put(&mut bytes);
        self.answer(&bytes)
    }

    fn keep(&mut self, bytes: &[u8]) -> Result<(), PagerError> {
        kept::write(&self.kept, bytes)?;
        self.has_kept = true;
        Ok(())
    }

    fn reply_nothing_received(&mut self, block: &str, nr_pages: u64) -> Result<(), PagerError> {
        let mut outstanding = PageBitmap::new(nr_pages);
        outstanding.set_range(0..nr_pages);
        let mut bytes = Vec::new();
        put_received(&mut bytes, block, &outstanding);
        self.answer(&bytes)
    }

    fn blocks_known(&mut self, pages: &Arc<Pages>) {
        self.session.blocks_known(pages);
    }

    fn postcopy_advised(&mut self) {
        self.session.postcopy_advised();
    }

    fn guest_taken(&mut self) {
        self.session.guest_taken();
        self.guest_taken = true;
    }

    fn channels(&mut self) -> Result<usize, PagerError> {
        self.session.channels(self.listener)
    }

    fn sync(&mut self) -> Result<(), PagerError> {
        self.session.sync(self.listener)
    }

    fn is_quiet(&mut self) -> Result<bool, PagerError> {
        Ok(!self.channel.is_readable(POLL))
    }
}
