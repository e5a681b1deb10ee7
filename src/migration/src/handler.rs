//! Iterative handlers: whatever has too much state to send it while the guest is stopped.
//!
//! The engine calls them in the order of QEMU's SaveVMHandlers, and frames what they write as
//! START, PART and END sections.

use std::sync::Arc;
use std::time::Duration;

use super::channel::{Interrupt, Sink};
use super::error::MigrationError;
use super::page_bitmap::PageBitmap;
use super::stream::{BlockStateChange, Configuration, SectionKind};
use crate::lazy::LazyRam;
use crate::sys::GatherWrite;
use ram_discard::ByteRange;
use vmstate::wire::WireRead;

/// The source's side.
pub trait SaveHandler {
    /// Id string of its sections.
    fn idstr(&self) -> &str;

    /// The instance among handlers of the same id string.
    fn instance_id(&self) -> u32 {
        0
    }

    /// Version of its sections.
    fn version_id(&self) -> u32;

    /// Told what the stream is configured with, before it begins.
    ///
    /// # Errors
    ///
    /// When the handler was made for another configuration.
    fn configure(&mut self, _configuration: &Configuration) -> Result<(), MigrationError> {
        Ok(())
    }

    /// Whether each of the channels that it has besides the main one is encrypted, before the stream begins. By default
    /// it has none.
    fn encrypted_channels(&self) -> Vec<bool> {
        Vec::new()
    }

    /// Freezes the block state that the handler's memory depends on, before anything is saved, early
    /// device state included. By default there is none.
    ///
    /// # Errors
    ///
    /// When it cannot be frozen; nothing is then.
    fn freeze(&mut self) -> Result<(), MigrationError> {
        Ok(())
    }

    /// Whether block state has been frozen without a gap since: asked when the guest is stopped,
    /// immediately before it is handed over.
    ///
    /// # Errors
    ///
    /// When it has not: what was sent is not what the guest has.
    fn check_frozen(&self) -> Result<(), MigrationError> {
        Ok(())
    }

    /// Ends the freeze, if there is one, after [`cleanup`](Self::cleanup).
    fn thaw(&mut self) {}

    /// Whether block state could change while memory is sent, if the destination can follow. By default it could not.
    fn can_follow(&self) -> bool {
        false
    }

    /// The destination follows block state: it may change from now on, until [`freeze`](Self::freeze) is called
    /// again. Each that populates waits for the destination for `patience`. Called after
    /// [`setup`](Self::setup).
    ///
    /// # Errors
    ///
    /// When block state was not frozen until now.
    fn follow(&mut self, _patience: Duration) -> Result<(), MigrationError> {
        Ok(())
    }

    /// The changes of block state that are to be sent now, between two sections, as they are on the stream.
    ///
    /// # Errors
    ///
    /// When they cannot be taken note of.
    fn changes(&mut self) -> Result<Vec<u8>, MigrationError> {
        Ok(Vec::new())
    }

    /// Whether a section with a [`barrier`](Self::barrier) is to stand before the changes that were given last: pages of
    /// what was discarded may be on their way on other channels.
    fn needs_barrier(&self) -> bool {
        false
    }

    /// Writes the payload of a PART section, behind which all pages that were sent before are in their places.
    ///
    /// # Errors
    ///
    /// When a channel fails, or has failed.
    fn barrier(&mut self, _out: &mut dyn Sink) -> Result<(), MigrationError> {
        Ok(())
    }

    /// The destination has answered a change that populates; false when it is none of this handler's.
    ///
    /// # Errors
    ///
    /// When it cannot be taken note of.
    fn answered(&mut self, _number: u32, _refused: Option<String>) -> Result<bool, MigrationError> {
        Ok(false)
    }

    /// Whether a guest waits for a change to be sent or answered: sections are short then.
    fn is_waited_for(&self) -> bool {
        false
    }

    /// Whether the destination has still to answer a change.
    fn has_unanswered(&self) -> bool {
        false
    }

    /// Begins: writes the payload of the START section. The guest runs.
    ///
    /// # Errors
    ///
    /// When it cannot begin; [`cleanup`](Self::cleanup) is called then.
    fn setup(&mut self, out: &mut dyn Sink) -> Result<(), MigrationError>;

    /// Bytes left to send, as far as that is known without looking.
    fn pending_estimate(&self) -> u64;

    /// Bytes left to send, looked up.
    ///
    /// # Errors
    ///
    /// When it cannot be looked up.
    fn pending_exact(&mut self) -> Result<u64, MigrationError>;

    /// Writes the payload of a PART section: about `budget` bytes, or what is left. The guest
    /// runs.
    ///
    /// # Errors
    ///
    /// When it cannot be sent.
    fn iterate(&mut self, out: &mut dyn Sink, budget: u64) -> Result<(), MigrationError>;

    /// Writes the payload of the END section: everything left. The guest is stopped.
    ///
    /// # Errors
    ///
    /// When it cannot be sent, or block state was not frozen all the time.
    fn complete(&mut self, out: &mut dyn Sink) -> Result<(), MigrationError>;

    /// Ends, whether all went well or not.
    fn cleanup(&mut self);

    /// Its side of postcopy, where it can go on after the guest has left.
    fn postcopy(&mut self) -> Option<&mut dyn PostcopySave> {
        None
    }
}

/// What the source of postcopy asks of the handler that has the memory. The guest has left, so
/// nothing changes any more.
pub trait PostcopySave: Send {
    /// All page sizes of the blocks, or'ed together, bytes.
    fn page_sizes(&self) -> u64;

    /// Whether pages go over channels of their own, which are to end before the guest leaves.
    fn has_channels(&self) -> bool {
        false
    }

    /// Writes the payload of a PART section that ends them: all that was sent on them has been written.
    ///
    /// # Errors
    ///
    /// When a channel fails, or has failed.
    fn end_channels(&mut self, _out: &mut dyn Sink) -> Result<(), MigrationError> {
        Ok(())
    }

    /// Makes what is left whole host pages, and tells it: for each block the ranges of pages that
    /// have not been sent, or were written since. The guest is stopped.
    ///
    /// # Errors
    ///
    /// When it cannot be found out, or block state was not frozen all the time.
    fn outstanding(&mut self) -> Result<Vec<(String, Vec<ByteRange>)>, MigrationError>;

    /// Gathers the next pages to send in the background, about `bytes` of them; false when there
    /// are none.
    ///
    /// # Errors
    ///
    /// When a page cannot be read.
    fn next(&mut self, bytes: u64, out: &mut GatherWrite) -> Result<bool, MigrationError>;

    /// Gathers the pages of `range` that the destination waits for, as far as they have not been sent;
    /// the background goes on behind them. False when all were sent.
    ///
    /// # Errors
    ///
    /// When there is no such block or range, or a page cannot be read.
    fn requested(
        &mut self,
        block: &str,
        range: ByteRange,
        out: &mut GatherWrite,
    ) -> Result<bool, MigrationError>;

    /// The destination's guest has discarded `range`: nothing of it is sent any more.
    ///
    /// # Errors
    ///
    /// When there is no such block or range.
    fn discarded(&mut self, block: &str, range: ByteRange) -> Result<(), MigrationError>;

    /// How many bytes of pages are left to send.
    fn left(&self) -> u64;

    /// The blocks, and how many pages they have.
    fn blocks(&self) -> Vec<(String, u64)>;

    /// After a break: these pages of a block have not been received. What is discarded among them
    /// is left out.
    ///
    /// # Errors
    ///
    /// When there is no such block.
    fn not_received(&mut self, block: &str, pages: PageBitmap) -> Result<(), MigrationError>;
}

/// The destination's side.
pub trait LoadHandler {
    /// Id string of its sections.
    fn idstr(&self) -> &str;

    /// The instance among handlers of the same id string.
    fn instance_id(&self) -> u32 {
        0
    }

    /// The newest version of its sections that it understands.
    fn version_id(&self) -> u32;

    /// The oldest version that it understands.
    fn minimum_version_id(&self) -> u32 {
        self.version_id()
    }

    /// Told what the stream is configured with, before it begins.
    ///
    /// # Errors
    ///
    /// When the handler was made for another configuration.
    fn configure(&mut self, _configuration: &Configuration) -> Result<(), MigrationError> {
        Ok(())
    }

    /// Whether each of the channels that it has besides the main one is encrypted, before the stream begins. By default
    /// it has none.
    fn encrypted_channels(&self) -> Vec<bool> {
        Vec::new()
    }

    /// Has `main` raised when the handler fails beside the main channel, which then ends.
    fn interrupt_on_failure(&mut self, _main: &Interrupt) {}

    /// Why it failed so, once.
    fn failure(&mut self) -> Option<MigrationError> {
        None
    }

    /// Precopy has ended, and the guest is about to run before the rest of its memory comes.
    ///
    /// # Errors
    ///
    /// When something of precopy is missing.
    fn before_postcopy(&mut self) -> Result<(), MigrationError> {
        Ok(())
    }

    /// Begins, before the first section.
    ///
    /// # Errors
    ///
    /// When it cannot; [`cleanup`](Self::cleanup) is called then.
    fn load_setup(&mut self) -> Result<(), MigrationError>;

    /// Loads the payload of a section, written as `version_id`: one that is understood, and the same
    /// for all sections of a stream.
    ///
    /// # Errors
    ///
    /// When it is refused.
    fn load(
        &mut self,
        kind: SectionKind,
        version_id: u32,
        reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError>;

    /// Whether block state here can follow that of the source, which is then told so. By default it cannot.
    fn can_follow(&self) -> bool {
        false
    }

    /// Block state of the source has changed: it changes here. What stands at byte `at` of the stream; of a change
    /// that populates, whether it was refused, and why.
    ///
    /// # Errors
    ///
    /// When it contradicts what is known, or cannot be followed.
    fn block_state(
        &mut self,
        _change: &BlockStateChange,
        at: u64,
    ) -> Result<Option<String>, MigrationError> {
        Err(MigrationError::Page {
            at,
            what: "a change of block state, which is not followed".to_owned(),
        })
    }

    /// The guest is about to run here while its memory still arrives: block state may change from now on, and
    /// `memory` follows it. By default it stays as it is.
    ///
    /// # Errors
    ///
    /// When block state was not frozen until now.
    fn arrives(&mut self, _memory: &Arc<LazyRam>) -> Result<(), MigrationError> {
        Ok(())
    }

    /// All sections were loaded: the last chance to refuse.
    ///
    /// # Errors
    ///
    /// When something is missing.
    fn complete(&mut self) -> Result<(), MigrationError>;

    /// Ends, whether all went well or not.
    fn cleanup(&mut self);
}
