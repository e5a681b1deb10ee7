//! Iterative handlers: whatever has too much state to send it while the guest is stopped.
//!
//! The engine calls them in the order of QEMU's SaveVMHandlers, and frames what they write as
//! START, PART and END sections.

use super::channel::Sink;
use super::error::MigrationError;
use super::stream::SectionKind;
use super::wire::WireRead;

/// The source's side.
pub trait SaveHandler {
    /// Id string of its sections.
    fn idstr(&self) -> &str;

    /// Version of its sections.
    fn version_id(&self) -> u32;

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
    /// When it cannot be sent.
    fn complete(&mut self, out: &mut dyn Sink) -> Result<(), MigrationError>;

    /// Ends, whether all went well or not.
    fn cleanup(&mut self);
}

/// The destination's side.
pub trait LoadHandler {
    /// Id string of its sections.
    fn idstr(&self) -> &str;

    /// The version of its sections that it understands.
    fn version_id(&self) -> u32;

    /// Begins, before the first section.
    ///
    /// # Errors
    ///
    /// When it cannot; [`cleanup`](Self::cleanup) is called then.
    fn load_setup(&mut self) -> Result<(), MigrationError>;

    /// Loads the payload of a section.
    ///
    /// # Errors
    ///
    /// When it is refused.
    fn load(&mut self, kind: SectionKind, reader: &mut dyn WireRead) -> Result<(), MigrationError>;

    /// All sections were loaded: the last chance to refuse.
    ///
    /// # Errors
    ///
    /// When something is missing.
    fn complete(&mut self) -> Result<(), MigrationError>;

    /// Ends, whether all went well or not.
    fn cleanup(&mut self);
}
