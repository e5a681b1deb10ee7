//! The configuration section: what must be alike on both sides.

use serde_json::{Value, json};
use vmstate::wire::{SUBSECTION, WireRead, WireWrite};

use super::FormatError;

/// Files have their pages at fixed offsets.
pub const CAPABILITY_MAPPED_RAM: &str = "mapped-ram";
/// Shared memory that both sides have is not sent.
pub const CAPABILITY_IGNORE_SHARED: &str = "x-ignore-shared";
/// Pages go over channels of their own. QEMU does not ask for it in a stream, and does not mind it there.
pub const CAPABILITY_MULTIFD: &str = "multifd";
/// Pages on channels of their own are compressed with zstd. In QEMU that is a parameter of each side's own, of
/// which the other side is not told; it refuses a stream with this name.
pub const CAPABILITY_MULTIFD_ZSTD: &str = "x-multifd-zstd";

const TARGET_PAGE_BITS: &str = "configuration/target-page-bits";
const CAPABILITIES: &str = "configuration/capabilities";
const UUID: &str = "configuration/uuid";
const SUBSECTION_VERSION: u32 = 1;
const MACHINE_MAX: u64 = 255;
const CAPABILITIES_MAX: u32 = 64;

/// The configuration section of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Configuration {
    /// Name of the machine type.
    pub machine: String,
    /// log2 of the target page size, where it is not the smallest of the architecture.
    pub target_page_bits: Option<u32>,
    /// Names of the capabilities that shape the stream.
    pub capabilities: Vec<String>,
    /// The VM's UUID.
    pub uuid: Option<[u8; 16]>,
}

impl Configuration {
    /// Of a machine type, with nothing else.
    pub fn new(machine: impl Into<String>) -> Self {
        Self { machine: machine.into(), ..Self::default() }
    }

    /// Whether a capability is on.
    pub fn has(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|name| name == capability)
    }

    /// What is in the section, as the description at the end of a stream tells it. QEMU's analyser
    /// learns the capabilities from it.
    pub fn description(&self) -> Value {
        let field = |name: &str, kind: &str, size: usize| json!({ "name": name, "type": kind, "size": size });
        let subsection = |name: &str, fields: Vec<Value>| json!({ "vmsd_name": name, "version": SUBSECTION_VERSION, "fields": fields });
        let mut subsections = Vec::new();
        if self.target_page_bits.is_some() {
            subsections
                .push(subsection(TARGET_PAGE_BITS, vec![field("target_page_bits", "uint32", 4)]));
        }
        if !self.capabilities.is_empty() {
            let mut fields = vec![field("caps_count", "uint32", 4)];
            fields.extend(self.capabilities.iter().enumerate().map(|(index, name)| {
                let (size, kind) = (1 + name.len(), "capability");
                json!({ "name": "capabilities", "index": index, "type": kind, "size": size })
            }));
            subsections.push(subsection(CAPABILITIES, fields));
        }
        if let Some(uuid) = &self.uuid {
            subsections.push(subsection(UUID, vec![field("uuid", "buffer", uuid.len())]));
        }
        json!({
            "vmsd_name": "configuration",
            "version": 1,
            "fields": [field("len", "uint32", 4), field("name", "buffer", self.machine.len())],
            "subsections": subsections,
        })
    }

    pub(super) fn put(&self, out: &mut Vec<u8>) {
        let machine = self.machine.as_bytes();
        out.put_be32(u32::try_from(machine.len()).expect("machine names are short"));
        out.put(machine);
        if let Some(bits) = self.target_page_bits {
            put_subsection(out, TARGET_PAGE_BITS);
            out.put_be32(bits);
        }
        if !self.capabilities.is_empty() {
            put_subsection(out, CAPABILITIES);
            out.put_be32(u32::try_from(self.capabilities.len()).expect("capabilities are few"));
            self.capabilities.iter().for_each(|name| out.put_name(name));
        }
        if let Some(uuid) = &self.uuid {
            put_subsection(out, UUID);
            out.put(uuid);
        }
    }

    pub(super) fn read(reader: &mut dyn WireRead) -> Result<Self, FormatError> {
        let offset = reader.offset();
        let len = reader.be32("the length of the machine's name")?;
        let machine = reader.bytes(u64::from(len), MACHINE_MAX, "name of the machine")?;
        let machine = String::from_utf8(machine)
            .map_err(|_| FormatError::value(offset, "name of the machine", len))?;
        let mut configuration = Self::new(machine);
        while reader.peek(1, "the next section")?[0] == SUBSECTION {
            reader.take(1);
            let offset = reader.offset();
            let name = reader.name("the name of a subsection")?;
            let version_offset = reader.offset();
            let version = reader.be32("the version of a subsection")?;
            if version != SUBSECTION_VERSION {
                let what = "version of a configuration subsection";
                return Err(FormatError::value(version_offset, what, version));
            }
            match name.as_str() {
                TARGET_PAGE_BITS => {
                    configuration.target_page_bits = Some(reader.be32("target page bits")?);
                }
                CAPABILITIES => {
                    let offset = reader.offset();
                    let count = reader.be32("the number of capabilities")?;
                    if count > CAPABILITIES_MAX {
                        return Err(FormatError::value(offset, "number of capabilities", count));
                    }
                    for _ in 0..count {
                        configuration.capabilities.push(reader.name("the name of a capability")?);
                    }
                }
                UUID => {
                    let mut uuid = [0; 16];
                    reader.read_exact(&mut uuid, "the UUID")?;
                    configuration.uuid = Some(uuid);
                }
                _ => return Err(FormatError::Configuration { offset, name }),
            }
        }
        Ok(configuration)
    }
}

fn put_subsection(out: &mut Vec<u8>, name: &str) {
    out.put_u8(SUBSECTION);
    out.put_name(name);
    out.put_be32(SUBSECTION_VERSION);
}
