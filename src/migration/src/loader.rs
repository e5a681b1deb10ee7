//! Loads sections in the order of a stream, from a channel or a file.

use std::fmt::Write as _;
use std::sync::Arc;

use vmstate::wire::WireRead;

use super::channel::Interrupt;
use super::devices::{DevicePhase, Devices};
use super::error::MigrationError;
use super::handler::LoadHandler;
use super::lazy::LazyRam;
use super::stream::{BlockStateChange, Configuration, SectionHeader, SectionKind, read_footer};

/// What takes the sections of a stream, and which of them came.
pub(super) struct Loader<'a> {
    handlers: Vec<Box<dyn LoadHandler + 'a>>,
    devices: &'a mut dyn Devices,
    /// What the handlers began with, in their order.
    started: Vec<Option<Started>>,
    loaded: bool,
}

/// The START section of a handler.
#[derive(Clone, Copy, Debug)]
struct Started {
    section_id: u32,
    version_id: u32,
}

impl<'a> Loader<'a> {
    /// A loader that no section came to yet. Handlers begin.
    pub(super) fn new(
        handlers: Vec<Box<dyn LoadHandler + 'a>>,
        devices: &'a mut dyn Devices,
        configuration: &Configuration,
    ) -> Result<Self, MigrationError> {
        for (index, handler) in handlers.iter().enumerate() {
            let key = (handler.idstr(), handler.instance_id());
            if handlers[..index].iter().any(|other| (other.idstr(), other.instance_id()) == key) {
                let what = "two handlers here are of this id string and instance";
                return Err(out_of_place(handler.idstr(), 0, what));
            }
        }
        let started = vec![None; handlers.len()];
        let mut loader = Self { handlers, devices, started, loaded: false };
        for handler in &mut loader.handlers {
            handler.configure(configuration)?;
            handler.load_setup()?;
        }
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
        // As QEMU's validate-uuid: a side that has none does not mind.
        if let (Some(theirs), Some(ours)) = (&stream.uuid, &local.uuid)
            && theirs != ours
        {
            return differs("UUID", &uuid_text(theirs), &uuid_text(ours));
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
        let key = (&*header.idstr, header.instance_id);
        let known =
            self.handlers.iter().position(|known| (known.idstr(), known.instance_id()) == key);
        match (header.kind, known) {
            (SectionKind::Start, Some(index)) => {
                let handler = &mut self.handlers[index];
                if self.started[index].is_some() {
                    return Err(out_of_place(&header.idstr, at, "it starts a second time"));
                }
                let SectionHeader { section_id, version_id, .. } = *header;
                if self.started.iter().flatten().any(|other| other.section_id == section_id) {
                    let what = format!("section id {section_id} is another handler's");
                    return Err(out_of_place(&header.idstr, at, &what));
                }
                let (oldest, newest) = (handler.minimum_version_id(), handler.version_id());
                if !(oldest..=newest).contains(&version_id) {
                    let what = format!("version {version_id}; {oldest} to {newest} are understood");
                    return Err(out_of_place(&header.idstr, at, &what));
                }
                if self.started.iter().all(Option::is_none) {
                    self.devices.early_loaded()?;
                }
                self.started[index] = Some(Started { section_id, version_id });
                handler.load(header.kind, version_id, reader)?;
            }
            (SectionKind::Full, None) => {
                let no_ram = self.started.iter().all(Option::is_none);
                let phase = if no_ram { DevicePhase::Early } else { DevicePhase::Late };
                self.devices.load(header, phase, reader)?;
            }
            (kind, _) => {
                let instance = header.instance_id;
                let what = format!("instance {instance} is not known as a {kind:?} section");
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
        let mut handlers = self.handlers.iter_mut().zip(&self.started);
        let known = handlers.find_map(|(handler, started)| {
            let started = started.filter(|started| started.section_id == section_id)?;
            Some((handler, started.version_id))
        });
        let Some((handler, version_id)) = known else {
            let section = format!("#{section_id}");
            return Err(out_of_place(&section, at, "it continues and never started"));
        };
        handler.load(kind, version_id, reader)?;
        Ok(read_footer(reader, section_id)?)
    }

    /// Whether a handler can have block state follow that of the source.
    pub(super) fn can_follow(&self) -> bool {
        self.handlers.iter().any(|handler| handler.can_follow())
    }

    /// Has block state follow that of the source: RAM's, once it has started. Of a change that populates, whether it
    /// was refused, and why.
    pub(super) fn block_state(
        &mut self,
        change: &BlockStateChange,
        at: u64,
    ) -> Result<Option<String>, MigrationError> {
        let mut handlers = self.handlers.iter_mut().zip(&self.started);
        let ram = handlers.find(|(handler, started)| started.is_some() && handler.can_follow());
        let Some((ram, _)) = ram else {
            return Err(out_of_place(
                "a change of block state",
                at,
                "before the list of RAM blocks",
            ));
        };
        ram.block_state(change, at)
    }

    /// Block state may change from now on, while `memory` arrives.
    pub(super) fn arrives(&mut self, memory: &Arc<LazyRam>) -> Result<(), MigrationError> {
        self.handlers.iter_mut().try_for_each(|handler| handler.arrives(memory))
    }

    /// Has `main` raised when a handler fails beside the main channel.
    pub(super) fn interrupt_on_failure(&mut self, main: &Interrupt) {
        self.handlers.iter_mut().for_each(|handler| handler.interrupt_on_failure(main));
    }

    /// What failed beside the main channel, and not because of it.
    pub(super) fn failure(&mut self) -> Option<MigrationError> {
        self.handlers.iter_mut().find_map(|handler| handler.failure())
    }

    /// Precopy has ended, and postcopy begins.
    pub(super) fn before_postcopy(&mut self) -> Result<(), MigrationError> {
        self.handlers.iter_mut().try_for_each(|handler| handler.before_postcopy())
    }

    /// Whether devices and handlers have taken over what came.
    pub(super) fn is_loaded(&self) -> bool {
        self.loaded
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
        self.started[index].map(|started| started.section_id)
    }
}

fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = String::new();
    for (index, byte) in uuid.iter().enumerate() {
        if [4, 6, 8, 10].contains(&index) {
            text.push('-');
        }
        let _ = write!(text, "{byte:02x}");
    }
    text
}

impl Drop for Loader<'_> {
    fn drop(&mut self) {
        if !self.loaded {
            self.devices.abandon();
        }
        self.handlers.iter_mut().for_each(|handler| handler.cleanup());
    }
}

/// An error about a section that is not where it should be.
pub(super) fn out_of_place(section: &str, at: u64, what: &str) -> MigrationError {
    MigrationError::Section { section: section.to_owned(), at, what: what.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn differ(change: impl Fn(&mut Configuration, &mut Configuration)) -> String {
        let uuid = Some([0x5a; 16]);
        let same = Configuration { uuid, target_page_bits: Some(12), ..Configuration::new("q35") };
        let (mut stream, mut local) = (same.clone(), same);
        Loader::check(&local, &stream).unwrap();
        change(&mut stream, &mut local);
        Loader::check(&local, &stream).unwrap_err().to_string()
    }

    #[test]
    fn what_is_configured_otherwise_is_named_with_both_values() {
        let machine = differ(|stream, _| stream.machine = "virt".to_owned());
        assert_eq!(machine, r#"machine type: "virt" in the stream, "q35" here"#);
        let bits = differ(|stream, _| stream.target_page_bits = Some(14));
        assert_eq!(bits, r#"target page bits: "14" in the stream, "12" here"#);
        let bits = differ(|_, local| local.target_page_bits = None);
        assert_eq!(bits, r#"target page bits: "12" in the stream, "default" here"#);
        let capabilities = differ(|_, local| local.capabilities.push("x-other".to_owned()));
        assert_eq!(capabilities, r#"capabilities: "" in the stream, "x-other" here"#);
        let uuid = differ(|stream, _| stream.uuid = Some(std::array::from_fn(|i| i as u8)));
        let (theirs, ours) =
            ("00010203-0405-0607-0809-0a0b0c0d0e0f", "5a5a5a5a-5a5a-5a5a-5a5a-5a5a5a5a5a5a");
        assert_eq!(uuid, format!("UUID: {theirs:?} in the stream, {ours:?} here"));
    }

    #[test]
    fn a_side_without_a_uuid_takes_any() {
        let with = Configuration { uuid: Some([1; 16]), ..Configuration::new("q35") };
        let without = Configuration::new("q35");
        Loader::check(&with, &without).unwrap();
        Loader::check(&without, &with).unwrap();
    }

    /// Notes whether it is taken over or abandoned.
    #[derive(Default)]
    struct Noting(Vec<&'static str>);

    impl Devices for Noting {
        fn save(
            &mut self,
            _phase: DevicePhase,
        ) -> Result<Vec<crate::devices::DeviceSection>, MigrationError> {
            Ok(Vec::new())
        }

        fn load(
            &mut self,
            _header: &SectionHeader,
            _phase: DevicePhase,
            _reader: &mut dyn WireRead,
        ) -> Result<(), MigrationError> {
            Ok(())
        }

        fn loaded(&mut self) -> Result<(), MigrationError> {
            self.0.push("loaded");
            Ok(())
        }

        fn abandon(&mut self) {
            self.0.push("abandoned");
        }
    }

    #[test]
    fn devices_of_a_load_that_ends_early_are_abandoned() {
        let configuration = Configuration::new("q35");
        let mut devices = Noting::default();
        drop(Loader::new(Vec::new(), &mut devices, &configuration).unwrap());
        assert_eq!(devices.0, ["abandoned"]);
        let mut devices = Noting::default();
        let mut loader = Loader::new(Vec::new(), &mut devices, &configuration).unwrap();
        loader.all_loaded().unwrap();
        drop(loader);
        assert_eq!(devices.0, ["loaded"]);
    }
}
