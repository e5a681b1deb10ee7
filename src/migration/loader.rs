//! Loads sections in the order of a stream, from a channel or a file.

use super::devices::Devices;
use super::error::MigrationError;
use super::handler::LoadHandler;
use super::stream::{Configuration, SectionHeader, SectionKind, read_footer};
use super::wire::WireRead;

/// What takes the sections of a stream, and which of them came.
pub(super) struct Loader<'a> {
    handlers: Vec<Box<dyn LoadHandler + 'a>>,
    devices: &'a mut dyn Devices,
    /// Section ids of the handlers, in their order.
    section_ids: Vec<Option<u32>>,
    loaded: bool,
}

impl<'a> Loader<'a> {
    /// A loader that no section came to yet. Handlers begin.
    pub(super) fn new(
        handlers: Vec<Box<dyn LoadHandler + 'a>>,
        devices: &'a mut dyn Devices,
    ) -> Result<Self, MigrationError> {
        let section_ids = vec![None; handlers.len()];
        let mut loader = Self { handlers, devices, section_ids, loaded: false };
        loader.handlers.iter_mut().try_for_each(|handler| handler.load_setup())?;
        Ok(loader)
    }

    /// Whether what the source is configured with fits.
    pub(super) fn check(
        local: &Configuration,
        stream: &Configuration,
    ) -> Result<(), MigrationError> {
        let differs = |what, stream: &dyn ToString, local: &dyn ToString| {
            let (stream, local) = (stream.to_string(), local.to_string());
            Err(MigrationError::Configuration { what, stream, local })
        };
        if stream.machine != local.machine {
            return differs("machine type", &stream.machine, &local.machine);
        }
        if stream.target_page_bits != local.target_page_bits {
            let show = |bits: Option<u32>| bits.map_or("default".to_owned(), |b| b.to_string());
            let (theirs, ours) = (show(stream.target_page_bits), show(local.target_page_bits));
            return differs("target page bits", &theirs, &ours);
        }
        let sorted = |capabilities: &[String]| {
            let mut names = capabilities.to_vec();
            names.sort();
            names.join(",")
        };
        let (theirs, ours) = (sorted(&stream.capabilities), sorted(&local.capabilities));
        if theirs != ours {
            return differs("capabilities", &theirs, &ours);
        }
        Ok(())
    }

    /// Loads a START or FULL section.
    pub(super) fn section(
        &mut self,
        header: &SectionHeader,
        reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        let at = reader.offset();
        let handler = self.handlers.iter().position(|handler| handler.idstr() == header.idstr);
        match (header.kind, handler) {
            (SectionKind::Start, Some(index)) => {
                let handler = &mut self.handlers[index];
                if self.section_ids[index].is_some() || header.instance_id != 0 {
                    return Err(out_of_place(&header.idstr, at, "it starts a second time"));
                }
                if header.version_id != handler.version_id() {
                    let (found, known) = (header.version_id, handler.version_id());
                    let what = format!("version {found}; only {known} is understood");
                    return Err(out_of_place(&header.idstr, at, &what));
                }
                self.section_ids[index] = Some(header.section_id);
                handler.load(header.kind, reader)?;
            }
            (SectionKind::Full, None) => {
                let early = self.section_ids.iter().all(Option::is_none);
                self.devices.load(header, early, reader)?;
            }
            (kind, _) => {
                let what = format!("not known as a {kind:?} section");
                return Err(out_of_place(&header.idstr, at, &what));
            }
        }
        Ok(read_footer(reader, header.section_id)?)
    }

    /// Loads a PART or END section, which starts at byte `at`.
    pub(super) fn continued(
        &mut self,
        kind: SectionKind,
        section_id: u32,
        at: u64,
        reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        let known = self.section_ids.iter().position(|id| *id == Some(section_id));
        let Some(index) = known else {
            let section = format!("#{section_id}");
            return Err(out_of_place(&section, at, "it goes on and never started"));
        };
        self.handlers[index].load(kind, reader)?;
        Ok(read_footer(reader, section_id)?)
    }

    /// The last chance to refuse.
    pub(super) fn all_loaded(&mut self) -> Result<(), MigrationError> {
        if !self.loaded {
            for handler in &mut self.handlers {
                handler.complete()?;
            }
            self.devices.loaded()?;
            self.loaded = true;
        }
        Ok(())
    }
}

impl Loader<'_> {
    /// The section id of the handler of that id string, once it has started.
    pub(super) fn section_id(&self, idstr: &str) -> Option<u32> {
        let index = self.handlers.iter().position(|handler| handler.idstr() == idstr)?;
        self.section_ids[index]
    }
}

impl Drop for Loader<'_> {
    fn drop(&mut self) {
        self.handlers.iter_mut().for_each(|handler| handler.cleanup());
    }
}

/// An error about a section that is not where it should be.
pub(super) fn out_of_place(section: &str, at: u64, what: &str) -> MigrationError {
    MigrationError::Section { section: section.to_owned(), at, what: what.to_owned() }
}
