//! The destination's way back to the source.

use std::io;
use std::time::Duration;

use parking_lot::Mutex;
use ram_discard::ByteRange;

use super::received;
use crate::channel::{Channel, Sink};
use crate::error::MigrationError;
use crate::lazy::{LazyRam, PageSource};
use crate::page_bitmap::PageBitmap;
use crate::stream::ReturnMessage;

/// For how long a source may read nothing of what it is told. Then it is taken for gone: pages that
/// are asked for meanwhile would be waited for as well, by the guest.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// How long what is discarded waits for another message to be written.
const DISCARD_PATIENCE: Duration = Duration::from_millis(20);

/// Where the source listens. Several threads send: each message goes out whole, or the channel is
/// shut down, which its readers take for broken.
pub(crate) struct ReturnChannel(Mutex<State>);

struct State {
    channel: Channel,
    discards: Discards,
    /// The source said that it is to be told why it is refused.
    reasons: bool,
    /// The block that pages were asked for last, which the next request need not name.
    last_block: Option<usize>,
}

/// Whether the source is told what is discarded of the pages that are outstanding.
#[derive(Clone, Copy, Debug, Default)]
struct Discards {
    /// It said that it knows of that.
    known: bool,
    /// It was told that the guest is here; it expects none before.
    taken: bool,
}

impl ReturnChannel {
    pub(crate) fn new(channel: Channel) -> Self {
        Self::with_patience(channel, SILENCE_MAX)
    }

    fn with_patience(mut channel: Channel, patience: Duration) -> Self {
        channel.set_write_patience(patience);
        let discards = Discards::default();
        Self(Mutex::new(State { channel, discards, reasons: false, last_block: None }))
    }

    /// The same source hears what is sent here, after its other channel broke.
    #[must_use]
    pub(super) fn continuing(self, other: &Self) -> Self {
        let discards = other.0.lock().discards;
        self.0.lock().discards = discards;
        self
    }

    /// The source is to be told what is discarded of the pages that are outstanding.
    pub(crate) fn tell_discards(&self) {
        self.0.lock().discards.known = true;
    }

    /// The source is to be told why it is refused.
    pub(crate) fn tell_reasons(&self) {
        self.0.lock().reasons = true;
    }

    /// Says that the guest cannot be taken, and why, as far as the source can still be reached.
    pub(crate) fn refuse(&self, error: &MigrationError) {
        let (mut bytes, mut state) = (Vec::new(), self.0.lock());
        if state.reasons {
            ReturnMessage::Reason(error.to_string()).put(&mut bytes);
        }
        ReturnMessage::Shut(error.code()).put(&mut bytes);
        if let Err(failed) = state.write(&bytes) {
            tracing::debug!(error = %failed, "cannot tell the source that it is refused");
        }
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
        let written = state.write(&bytes);
        written.map_err(MigrationError::io("answer the source"))?;
        state.discards.taken = true;
        Ok(())
    }

    /// Tells which pages of a block have been received: all but the outstanding ones. The command at byte
    /// `at` of the stream asks for them.
    pub(super) fn send_received(
        &self,
        block: &str,
        outstanding: Option<&PageBitmap>,
        at: u64,
    ) -> Result<(), MigrationError> {
        let Some(outstanding) = outstanding else {
            let what =
                format!("received pages of block {block:?} are asked for, which is unknown here");
            return Err(MigrationError::Page { at, what });
        };
        let mut bytes = Vec::new();
        received::put(&mut bytes, block, outstanding);
        self.write(&bytes)
    }

    fn write(&self, bytes: &[u8]) -> Result<(), MigrationError> {
        let written = self.0.lock().write(bytes);
        written.map_err(MigrationError::io("answer the source"))
    }
}

impl State {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let written = self.channel.write(bytes);
        if written.is_err() {
            // Part of the message may have gone out.
            self.channel.shutdown();
        }
        written
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
        state.write(&bytes)?;
        state.last_block = Some(block);
        Ok(())
    }

    /// The guest waits meanwhile, so a source that does not read is not waited for: what it sends of the range is
    /// dropped.
    fn discarded(&self, lazy: &LazyRam, block: usize, range: ByteRange) {
        let Some(mut state) = self.0.try_lock_for(DISCARD_PATIENCE) else { return };
        if !state.discards.known || !state.discards.taken || !state.channel.is_writable() {
            return;
        }
        let (block, start, len) = (lazy.block(block).id().to_owned(), range.start(), range.len());
        let mut bytes = Vec::new();
        ReturnMessage::Discarded { block, start, len }.put(&mut bytes);
        if let Err(error) = state.write(&bytes) {
            tracing::debug!(%error, %range, "cannot tell the source what is discarded");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Progress;
    use crate::test_support::{Slow, SlowReader};
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use vmstate::wire::WireRead;

    const MOMENT: Duration = Duration::from_millis(20);
    /// Longer than any thread is kept from running.
    const LONG: Duration = Duration::from_secs(60);

    fn pair(patience: Duration) -> (Channel, ReturnChannel, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        let main = Channel::new(near, Arc::new(Progress::new())).unwrap();
        let back = ReturnChannel::with_patience(main.clone_handle(), patience);
        (main, back, far)
    }

    /// Says more than the socket takes.
    fn fill(back: &ReturnChannel) -> MigrationError {
        let mut said = (0..1 << 20).map(|value| back.send(&ReturnMessage::Pong(value)));
        said.find_map(Result::err).unwrap()
    }

    #[test]
    fn a_source_that_reads_nothing_is_taken_for_gone() {
        let (mut main, back, mut far) = pair(MOMENT);
        let error = fill(&back);
        assert!(
            matches!(&error, MigrationError::Io { source, .. }
            if source.kind() == io::ErrorKind::TimedOut),
            "{error}"
        );
        // So it is for the side that reads, and for the source.
        assert_eq!(main.read(&mut [0]).unwrap(), 0);
        let mut heard = Vec::new();
        far.read_to_end(&mut heard).unwrap();
        assert!(!heard.is_empty());
        // It is not told of a guest that is taken.
        assert!(back.claim(&ReturnMessage::SwitchoverAck).is_err());
    }

    #[test]
    fn a_source_that_reads_a_byte_now_and_then_is_not_told_of_the_guest() {
        let (_main, back, far) = pair(MOMENT);
        let _reader = SlowReader::start(far, Slow::Trickle);
        let (tell, claimed) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            // Another thread holds up the claim, which itself holds up others.
            scope.spawn(|| {
                fill(&back);
            });
            scope.spawn(|| {
                let claim = || back.claim(&ReturnMessage::SwitchoverAck);
                let failed = std::iter::repeat_with(claim).find_map(Result::err);
                tell.send(failed.unwrap()).unwrap();
            });
        });
        let error = claimed.recv().unwrap();
        assert!(
            matches!(error, MigrationError::Io { .. } | MigrationError::ChannelClosed(_)),
            "{error}"
        );
    }

    #[test]
    fn a_source_that_reads_slowly_is_waited_for() {
        let (_main, back, far) = pair(LONG);
        let reads = std::thread::spawn(move || {
            let mut reader = vmstate::wire::WireReader::new(far);
            let mut last = 0;
            while last != 50_000 {
                last = match ReturnMessage::read(&mut reader).unwrap() {
                    ReturnMessage::Pong(value) => value,
                    other => panic!("{other:?}"),
                };
            }
            reader.offset()
        });
        for value in 0..=50_000 {
            back.send(&ReturnMessage::Pong(value)).unwrap();
        }
        assert_ne!(reads.join().unwrap(), 0);
    }
}
