//! Frames sections, on a channel or in a file.

use serde_json::json;

use super::channel::Sink;
use super::devices::DeviceSection;
use super::error::MigrationError;
use super::handler::SaveHandler;
use super::stream::{
    SectionHeader, SectionKind, TARGET_PAGE_SIZE, put_continued, put_footer, put_section,
};

/// Frames sections, and remembers what they were for the description.
#[derive(Default)]
pub(super) struct Framing {
    handlers: u32,
    devices: Vec<serde_json::Value>,
    next_id: u32,
}

impl Framing {
    /// For the sections of handlers that have begun.
    pub(super) fn of(handlers: &[Box<dyn SaveHandler + '_>]) -> Self {
        Self { handlers: u32::try_from(handlers.len()).unwrap_or(u32::MAX), ..Self::default() }
    }

    /// Section ids of handlers are their index; those of devices follow.
    pub(super) fn start(
        &mut self,
        out: &mut dyn Sink,
        handler: &mut dyn SaveHandler,
    ) -> Result<(), MigrationError> {
        let header = SectionHeader {
            kind: SectionKind::Start,
            section_id: self.handlers,
            idstr: handler.idstr().to_owned(),
            instance_id: 0,
            version_id: handler.version_id(),
        };
        self.handlers += 1;
        let mut bytes = Vec::new();
        put_section(&mut bytes, &header);
        write(out, &bytes)?;
        handler.setup(out)?;
        bytes.clear();
        put_footer(&mut bytes, header.section_id);
        write(out, &bytes)
    }

    pub(super) fn continued(
        &mut self,
        out: &mut dyn Sink,
        index: usize,
        kind: SectionKind,
        payload: impl FnOnce(&mut dyn Sink) -> Result<(), MigrationError>,
    ) -> Result<(), MigrationError> {
        let section_id = u32::try_from(index).unwrap_or(u32::MAX);
        let mut bytes = Vec::new();
        put_continued(&mut bytes, kind, section_id);
        write(out, &bytes)?;
        payload(out)?;
        bytes.clear();
        put_footer(&mut bytes, section_id);
        write(out, &bytes)
    }

    pub(super) fn full(
        &mut self,
        out: &mut dyn Sink,
        section: DeviceSection,
    ) -> Result<(), MigrationError> {
        const FIRST_DEVICE: u32 = 1 << 16;
        let header = SectionHeader {
            kind: SectionKind::Full,
            section_id: FIRST_DEVICE + self.next_id,
            idstr: section.idstr,
            instance_id: section.instance_id,
            version_id: section.version_id,
        };
        self.next_id += 1;
        let mut bytes = Vec::new();
        put_section(&mut bytes, &header);
        bytes.extend_from_slice(&section.payload);
        put_footer(&mut bytes, header.section_id);
        self.devices.push(section.description);
        write(out, &bytes)
    }

    /// The JSON at the end of a stream.
    pub(super) fn description(&self) -> Vec<u8> {
        json!({ "page_size": TARGET_PAGE_SIZE, "devices": self.devices }).to_string().into_bytes()
    }
}

/// Writes bytes to a stream.
pub(super) fn write(out: &mut dyn Sink, bytes: &[u8]) -> Result<(), MigrationError> {
    out.write(bytes).map_err(MigrationError::io("send"))
}
