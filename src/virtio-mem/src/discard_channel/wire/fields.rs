//! Fields of a frame, one after the other.

use super::{HEADER_LEN, MAGIC, MessageError, Sections, TEXT_MAX};
use ram_discard::Section;

/// Appends fields; the length is put into the header as they come.
pub(super) struct Builder<'a> {
    frame: &'a mut Vec<u8>,
    start: usize,
}

impl<'a> Builder<'a> {
    pub(super) fn new(frame: &'a mut Vec<u8>, kind: u32) -> Self {
        let start = frame.len();
        frame.extend(kind.to_le_bytes());
        frame.extend(0u32.to_le_bytes());
        Self { frame, start }
    }

    pub(super) fn bytes(self, bytes: &[u8]) -> Self {
        self.frame.extend(bytes);
        let len = self.frame.len() - self.start - HEADER_LEN;
        let len = u32::try_from(len).expect("a payload is short");
        self.frame[self.start + 4..][..4].copy_from_slice(&len.to_le_bytes());
        self
    }

    pub(super) fn u16(self, value: u16) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn sections(self, sections: &[Section]) -> Self {
        sections
            .iter()
            .fold(self, |builder, section| builder.u64(section.start()).u64(section.len()))
    }

    /// Cut to what a message may carry.
    pub(super) fn text(self, text: &str) -> Self {
        self.bytes(&text.as_bytes()[..text.floor_char_boundary(TEXT_MAX)])
    }
}

/// Takes fields off a payload whose length was checked.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().expect("the length was checked");
        self.0 = rest;
        *field
    }

    pub(super) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub(super) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    pub(super) fn magic(&mut self) -> Result<(), MessageError> {
        let magic = self.take();
        if magic == MAGIC { Ok(()) } else { Err(MessageError::Magic(magic)) }
    }

    pub(super) fn zero(&mut self, kind: u32, field: &'static str) -> Result<(), MessageError> {
        match self.u32() {
            0 => Ok(()),
            value => Err(MessageError::Field { kind, field, value: value.into() }),
        }
    }

    /// Takes all that is left.
    pub(super) fn sections(&mut self, kind: u32) -> Result<Sections, MessageError> {
        let mut sections = Sections::new();
        while !self.0.is_empty() {
            let (offset, size) = (self.u64(), self.u64());
            let section = Section::new(offset, size);
            sections.push(section.ok_or(MessageError::Section { kind, offset, size })?);
        }
        Ok(sections)
    }

    pub(super) fn text(&mut self, kind: u32) -> Result<String, MessageError> {
        let text = std::str::from_utf8(self.0).map_err(|_| MessageError::Text(kind))?;
        Ok(text.to_owned())
    }
}
