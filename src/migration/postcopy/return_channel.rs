//! The destination's way back to the source.

use std::io;

use parking_lot::Mutex;

use super::received;
use crate::ByteRange;
use crate::migration::channel::{Channel, Sink};
use crate::migration::error::MigrationError;
use crate::migration::lazy::{LazyRam, PageSource};
use crate::migration::page_bitmap::PageBitmap;
use crate::migration::stream::ReturnMessage;

/// Where the source listens. Several threads send: each message goes out whole.
pub(crate) struct ReturnChannel(Mutex<State>);

struct State {
    channel: Channel,
    /// The block that pages were asked for last, which the next request need not name.
    last_block: Option<usize>,
}

impl ReturnChannel {
    pub(crate) fn new(channel: Channel) -> Self {
        Self(Mutex::new(State { channel, last_block: None }))
    }

    pub(crate) fn send(&self, message: &ReturnMessage) -> Result<(), MigrationError> {
        let mut bytes = Vec::new();
        message.put(&mut bytes);
        self.write(&bytes)
    }

    /// Says that the guest is taken, unless the source has ended the channel: then it takes the guest
    /// back if it does not hear that. Over TCP such a message could still be written, and be
    /// read by no source. A source that ends its direction right after the look still reads.
    pub(crate) fn claim(&self, message: &ReturnMessage) -> Result<(), MigrationError> {
        let mut bytes = Vec::new();
        message.put(&mut bytes);
        let mut state = self.0.lock();
        if state.channel.is_hung_up() {
            return Err(MigrationError::ChannelClosed("the guest was about to be taken"));
        }
        // Cancelled within the message, it leaves a source that has heard part of it, and the guest.
        let written = state.channel.write(&bytes);
        written.map_err(MigrationError::io("answer the source"))
    }

    /// Tells which pages of a block have been received: all but the outstanding ones.
    pub(super) fn send_received(
        &self,
        block: &str,
        outstanding: Option<&PageBitmap>,
    ) -> Result<(), MigrationError> {
        let Some(outstanding) = outstanding else {
            let what = format!("received pages of block {block:?} are asked for");
            return Err(MigrationError::Page { at: 0, what });
        };
        let mut bytes = Vec::new();
        received::put(&mut bytes, block, outstanding);
        self.write(&bytes)
    }

    fn write(&self, bytes: &[u8]) -> Result<(), MigrationError> {
        let written = self.0.lock().channel.write(bytes);
        written.map_err(MigrationError::io("answer the source"))
    }
}

impl PageSource for ReturnChannel {
    fn request(&self, lazy: &LazyRam, block: usize, range: ByteRange) -> io::Result<()> {
        let mut state = self.0.lock();
        let known = state.last_block == Some(block);
        let name = (!known).then(|| lazy.block(block).id().to_owned());
        let len = u32::try_from(range.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let message = ReturnMessage::RequestPages { block: name, start: range.start(), len };
        let mut bytes = Vec::new();
        message.put(&mut bytes);
        state.channel.write(&bytes)?;
        state.last_block = Some(block);
        Ok(())
    }
}
