//! Frames sections, on a channel or in a file.

use serde_json::{Value, json};

use super::channel::Sink;
use super::devices::DeviceSection;
use super::error::MigrationError;
use super::handler::SaveHandler;
use super::stream::{
    Configuration, SectionHeader, SectionKind, TARGET_PAGE_SIZE, make_findable, put_continued,
    put_footer, put_header, put_section,
};

/// Frames sections, and remembers what they were for the description.
pub(super) struct Framing {
    configuration: Configuration,
    handlers: u32,
    devices: Vec<Value>,
    next_id: u32,
}

impl Framing {
    /// Begins a stream: magic, version and configuration.
    pub(super) fn begin(
        out: &mut dyn Sink,
        configuration: &Configuration,
    ) -> Result<Self, MigrationError> {
        let mut bytes = Vec::new();
        put_header(&mut bytes, configuration);
        write(out, &bytes)?;
        Ok(Self {
            configuration: configuration.clone(),
            handlers: 0,
            devices: Vec::new(),
            next_id: 0,
        })
    }

    /// Section ids of handlers are their index; those of devices follow.
    pub(super) fn start(
        &mut self,
        out: &mut dyn Sink,
        handler: &mut dyn SaveHandler,
    ) -> Result<(), MigrationError> {
        handler.configure(&self.configuration)?;
        let header = SectionHeader {
            kind: SectionKind::Start,
            section_id: self.handlers,
            idstr: handler.idstr().to_owned(),
            instance_id: handler.instance_id(),
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
        &self,
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
        let mut json = json!({
            "configuration": self.configuration.description(),
            "page_size": TARGET_PAGE_SIZE,
            "devices": self.devices,
        })
        .to_string()
        .into_bytes();
        make_findable(&mut json);
        json
    }
}

/// Writes bytes to a stream.
pub(super) fn write(out: &mut dyn Sink, bytes: &[u8]) -> Result<(), MigrationError> {
    out.write(bytes).map_err(MigrationError::io("send"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::BufferSink;

    /// Where the analyser finds the description in a file that ends with it.
    fn found(text: &[u8]) -> usize {
        let mut file = vec![0x06];
        file.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
        file.extend(text);
        let zero = file.iter().rposition(|byte| *byte == 0).unwrap();
        zero + file[zero..].iter().position(|byte| *byte == b'{').unwrap()
    }

    #[test]
    fn a_description_tells_the_configuration_the_page_size_and_the_devices() {
        let configuration = Configuration {
            capabilities: vec!["mapped-ram".to_owned()],
            ..Configuration::new("m")
        };
        let mut framing = Framing::begin(&mut BufferSink::default(), &configuration).unwrap();
        framing.devices = vec!["one".into()];
        let plain: Value = serde_json::from_slice(&framing.description()).unwrap();
        let expected = json!({
            "configuration": configuration.description(),
            "page_size": 4096,
            "devices": ["one"],
        });
        assert_eq!(plain, expected);
        assert_eq!(plain["configuration"]["subsections"].as_array().map(Vec::len), Some(1));
    }

    #[test]
    fn a_description_is_found_by_its_brace_whatever_its_length() {
        let mut padded = 0;
        let mut framing =
            Framing::begin(&mut BufferSink::default(), &Configuration::new("m")).unwrap();
        for len in (0..300).chain(0x7a00..0x7d00) {
            framing.devices = vec!["x".repeat(len).into()];
            let text = framing.description();
            assert_eq!(found(&text), 5, "{} bytes", text.len());
            let plain: Value = serde_json::from_slice(&text).unwrap();
            padded += usize::from(plain.to_string().len() != text.len());
        }
        // Lengths whose last or last but one byte is a brace.
        assert!(padded > 256, "{padded}");
    }
}
