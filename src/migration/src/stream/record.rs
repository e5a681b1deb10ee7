//! The outer shape: header, sections with their footers, commands, end and description.

use super::{Command, Configuration, DESCRIPTION_MAX, FormatError};
use vmstate::wire::{WireRead, WireWrite};

const MAGIC: u32 = 0x5145_564d;
const VERSION: u32 = 3;

const EOF: u8 = 0x00;
const START: u8 = 0x01;
const PART: u8 = 0x02;
const END: u8 = 0x03;
const FULL: u8 = 0x04;
const DESCRIPTION: u8 = 0x06;
const CONFIGURATION: u8 = 0x07;
const COMMAND: u8 = 0x08;
const FOOTER: u8 = 0x7e;

/// What a section is of the whole of its handler's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SectionKind {
    /// The first of an iterative handler.
    Start,
    /// One more of an iterative handler.
    Part,
    /// The last of an iterative handler.
    End,
    /// All of a device.
    Full,
}

/// How a START or FULL section introduces itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionHeader {
    /// START or FULL.
    pub kind: SectionKind,
    /// The number by which PART and END sections refer to it.
    pub section_id: u32,
    /// The device's id string, less than 256 bytes.
    pub idstr: String,
    /// The instance among devices of the same id string.
    pub instance_id: u32,
    /// The version of what follows.
    pub version_id: u32,
}

/// The next thing on a stream, after its header and configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A START or FULL section begins.
    Section(SectionHeader),
    /// A PART or END section of an iterative handler begins.
    Continued {
        /// PART or END.
        kind: SectionKind,
        /// The number from its START section.
        section_id: u32,
    },
    /// A command.
    Command(Command),
    /// All sections were sent.
    Eof,
    /// The JSON description of the device state.
    Description(Vec<u8>),
}

/// Starts a stream: magic, version and configuration.
pub fn put_header(out: &mut Vec<u8>, configuration: &Configuration) {
    out.put_be32(MAGIC);
    out.put_be32(VERSION);
    out.put_u8(CONFIGURATION);
    configuration.put(out);
}

/// Starts a START or FULL section.
pub fn put_section(out: &mut Vec<u8>, header: &SectionHeader) {
    out.put_u8(if header.kind == SectionKind::Full { FULL } else { START });
    out.put_be32(header.section_id);
    out.put_name(&header.idstr);
    out.put_be32(header.instance_id);
    out.put_be32(header.version_id);
}

/// Starts a PART or END section.
pub fn put_continued(out: &mut Vec<u8>, kind: SectionKind, section_id: u32) {
    out.put_u8(if kind == SectionKind::End { END } else { PART });
    out.put_be32(section_id);
}

/// Ends a section.
pub fn put_footer(out: &mut Vec<u8>, section_id: u32) {
    out.put_u8(FOOTER);
    out.put_be32(section_id);
}

/// A command.
pub fn put_command(out: &mut Vec<u8>, command: &Command) {
    out.put_u8(COMMAND);
    command.put(out);
}

/// All sections were sent.
pub fn put_eof(out: &mut Vec<u8>) {
    out.put_u8(EOF);
}

/// The JSON description of the device state, after the end.
///
/// # Panics
///
/// When it is longer than 4 GiB.
pub fn put_description(out: &mut Vec<u8>, json: &[u8]) {
    out.put_u8(DESCRIPTION);
    out.put_be32(u32::try_from(json.len()).expect("descriptions are short"));
    out.put(json);
}

/// Pads the JSON of a description, an object, so that QEMU's `scripts/analyze-migration.py` finds its start.
pub fn make_findable(json: &mut Vec<u8>) {
    let fits = (json.len()..).find(|&len| !hides_its_start(len));
    let padding = fits.unwrap_or(json.len()) - json.len();
    json.splice(1..1, std::iter::repeat_n(b' ', padding));
}

/// Whether QEMU's `scripts/analyze-migration.py` would take a byte of the length of a description
/// for its first brace: it looks for the last byte in the file that is 0, one of the length's, and
/// from there for the brace.
fn hides_its_start(len: usize) -> bool {
    let len = u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes();
    let after_zero = len.iter().rposition(|byte| *byte == 0).map_or(0, |index| index + 1);
    len[after_zero..].contains(&b'{')
}

/// Reads magic, version and configuration.
///
/// # Errors
///
/// When the stream is another, or its configuration is not understood.
pub fn read_header(reader: &mut dyn WireRead) -> Result<Configuration, FormatError> {
    let found = reader.be32("the magic number of the stream")?;
    if found != MAGIC {
        let [first, second, ..] = found.to_be_bytes();
        let tls = super::is_tls([first, second]);
        return Err(if tls { FormatError::Tls } else { FormatError::Magic { found } });
    }
    let found = reader.be32("the version of the stream")?;
    if found != VERSION {
        return Err(FormatError::Version { found });
    }
    let offset = reader.offset();
    let found = reader.u8("the configuration section")?;
    if found != CONFIGURATION {
        return Err(FormatError::value(offset, "type of the configuration section", found));
    }
    Configuration::read(reader)
}

/// Reads what comes next. After a section's start its payload follows, then its footer.
///
/// # Errors
///
/// When it is nothing that is known.
pub fn read_record(reader: &mut dyn WireRead) -> Result<Record, FormatError> {
    let offset = reader.offset();
    let kind = reader.u8("the type of a section")?;
    Ok(match kind {
        START | FULL => {
            let kind = if kind == FULL { SectionKind::Full } else { SectionKind::Start };
            Record::Section(SectionHeader {
                kind,
                section_id: reader.be32("the id of a section")?,
                idstr: reader.name("the id string of a section")?,
                instance_id: reader.be32("the instance of a section")?,
                version_id: reader.be32("the version of a section")?,
            })
        }
        PART | END => {
            let kind = if kind == END { SectionKind::End } else { SectionKind::Part };
            Record::Continued { kind, section_id: reader.be32("the id of a section")? }
        }
        COMMAND => Record::Command(Command::read(reader)?),
        EOF => Record::Eof,
        DESCRIPTION => {
            let len = reader.be32("the length of the description")?;
            Record::Description(reader.bytes(u64::from(len), DESCRIPTION_MAX, "description")?)
        }
        found => return Err(FormatError::value(offset, "type of a section", found)),
    })
}

/// Reads the footer of the section that was read.
///
/// # Errors
///
/// When another thing stands there: what was read as the section's payload was not.
pub fn read_footer(reader: &mut dyn WireRead, section_id: u32) -> Result<(), FormatError> {
    let offset = reader.offset();
    let kind = reader.u8("the footer of a section")?;
    if kind != FOOTER || reader.be32("the footer of a section")? != section_id {
        return Err(FormatError::Footer { offset, section_id });
    }
    Ok(())
}
