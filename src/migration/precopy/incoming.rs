//! The destination.

use std::sync::Arc;
use std::time::Duration;

use super::{Devices, Guest, PING_LOADED};
use crate::migration::channel::{Channel, Sink};
use crate::migration::error::MigrationError;
use crate::migration::handler::LoadHandler;
use crate::migration::progress::{Counters, Progress, Status};
use crate::migration::stream::{
    Command, Configuration, Record, ReturnMessage, SectionHeader, SectionKind, read_footer,
    read_header, read_record,
};
use crate::migration::wire::{WireRead, WireReader};

/// How much is read ahead of what is handled, bytes.
const READ_AHEAD: usize = 4 << 20;

/// How long the source may take from the end of the sections to the end of its description.
const DESCRIPTION_TIMEOUT: Duration = Duration::from_secs(30);

/// A migration from another host. Each is used once.
pub struct Incoming<'a> {
    /// What both sides must agree on: machine type and capabilities.
    pub configuration: Configuration,
    /// The guest, which does not run yet.
    pub guest: &'a dyn Guest,
    /// Iterative handlers, RAM among them.
    pub handlers: Vec<Box<dyn LoadHandler + 'a>>,
    /// Everything else.
    pub devices: &'a mut dyn Devices,
    /// What can be seen of it, and how it is cancelled.
    pub progress: Arc<Progress>,
}

/// What is known of the stream so far.
#[derive(Default)]
struct Session {
    /// Section ids of the handlers, in their order.
    section_ids: Vec<Option<u32>>,
    return_path: Option<Channel>,
    loaded: bool,
}

impl Incoming<'_> {
    /// Takes over a guest from a connected channel, and lets it run. On an error it does not run
    /// here, and the source has been told so, as far as it can still be reached.
    ///
    /// # Errors
    ///
    /// Why the guest could not be taken over.
    pub fn run(mut self, channel: Channel) -> Result<(), MigrationError> {
        self.progress.set_status(Status::Setup);
        let mut session =
            Session { section_ids: vec![None; self.handlers.len()], ..Session::default() };
        let mut result = self.load(&channel, &mut session);
        for handler in &mut self.handlers {
            handler.cleanup();
        }
        if result.is_ok() {
            result = self.take_over(&channel, &mut session);
        }
        if let Err(error) = &result {
            self.progress.fail(error);
            if let Some(back) = &mut session.return_path {
                let _ = send(back, &ReturnMessage::Shut(error.code()));
            }
            channel.shutdown();
        } else {
            self.progress.set_status(Status::Completed);
        }
        result
    }

    /// Tells the source that the guest is taken, and only then lets it run: a source that was not
    /// told has it still.
    fn take_over(
        &mut self,
        channel: &Channel,
        session: &mut Session,
    ) -> Result<(), MigrationError> {
        if let Some(back) = session.return_path.take() {
            let mut back = back.uncancellable();
            send(&mut back, &ReturnMessage::Shut(0))?;
        }
        tracing::debug!(hung_up = channel.is_hung_up(), "the guest is taken over");
        self.guest.run().map_err(|reason| MigrationError::Vmm { what: "let the guest run", reason })
    }

    fn load(&mut self, channel: &Channel, session: &mut Session) -> Result<(), MigrationError> {
        let mut reader = WireReader::with_capacity(channel.clone_handle(), READ_AHEAD);
        for handler in &mut self.handlers {
            handler.load_setup()?;
        }
        let configuration = read_header(&mut reader)?;
        self.check(&configuration)?;
        self.progress.set_status(Status::Active);
        loop {
            let at = reader.offset();
            let record = read_record(&mut reader)?;
            Counters::set(&self.progress.counters.transferred, reader.offset());
            match record {
                Record::Section(header) => self.section(&header, session, &mut reader)?,
                Record::Continued { kind, section_id } => {
                    self.continued(kind, section_id, at, session, &mut reader)?;
                }
                Record::Command(command) => self.command(command, at, channel, session)?,
                Record::Eof => break,
                Record::Description(_) => {
                    return Err(out_of_place("description", at, "before the end of the sections"));
                }
            }
        }
        self.all_loaded(session)?;
        self.skip_description(channel, reader)
    }

    /// Whether what the source is configured with fits.
    fn check(&self, stream: &Configuration) -> Result<(), MigrationError> {
        let local = &self.configuration;
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

    fn section(
        &mut self,
        header: &SectionHeader,
        session: &mut Session,
        reader: &mut WireReader<Channel>,
    ) -> Result<(), MigrationError> {
        let at = reader.offset();
        let handler = self.handlers.iter().position(|handler| handler.idstr() == header.idstr);
        match (header.kind, handler) {
            (SectionKind::Start, Some(index)) => {
                let handler = &mut self.handlers[index];
                if session.section_ids[index].is_some() || header.instance_id != 0 {
                    return Err(out_of_place(&header.idstr, at, "it starts a second time"));
                }
                if header.version_id != handler.version_id() {
                    let (found, known) = (header.version_id, handler.version_id());
                    let what = format!("version {found}; only {known} is understood");
                    return Err(out_of_place(&header.idstr, at, &what));
                }
                session.section_ids[index] = Some(header.section_id);
                handler.load(header.kind, reader)?;
            }
            (SectionKind::Full, None) => {
                let early = session.section_ids.iter().all(Option::is_none);
                self.devices.load(header, early, reader)?;
            }
            (kind, _) => {
                let what = format!("not known as a {kind:?} section");
                return Err(out_of_place(&header.idstr, at, &what));
            }
        }
        Ok(read_footer(reader, header.section_id)?)
    }

    fn continued(
        &mut self,
        kind: SectionKind,
        section_id: u32,
        at: u64,
        session: &Session,
        reader: &mut WireReader<Channel>,
    ) -> Result<(), MigrationError> {
        let known = session.section_ids.iter().position(|id| *id == Some(section_id));
        let Some(index) = known else {
            let section = format!("#{section_id}");
            return Err(out_of_place(&section, at, "it goes on and never started"));
        };
        self.handlers[index].load(kind, reader)?;
        Ok(read_footer(reader, section_id)?)
    }

    fn command(
        &mut self,
        command: Command,
        at: u64,
        channel: &Channel,
        session: &mut Session,
    ) -> Result<(), MigrationError> {
        match command {
            Command::OpenReturnPath => session.return_path = Some(channel.clone_handle()),
            Command::Ping(value) => {
                if value == PING_LOADED {
                    // The answer is the verdict.
                    self.all_loaded(session)?;
                }
                if let Some(back) = &mut session.return_path {
                    send(back, &ReturnMessage::Pong(value))?;
                }
            }
            Command::SwitchoverStart => self.progress.set_status(Status::Device),
            other => {
                return Err(out_of_place(&format!("{other:?}"), at, "not possible in precopy"));
            }
        }
        Ok(())
    }

    /// The last chance to refuse.
    fn all_loaded(&mut self, session: &mut Session) -> Result<(), MigrationError> {
        if !session.loaded {
            for handler in &mut self.handlers {
                handler.complete()?;
            }
            self.devices.loaded()?;
            session.loaded = true;
        }
        Ok(())
    }

    /// Reads the description, which only people need. A stream without one ends here.
    fn skip_description(
        &self,
        channel: &Channel,
        mut reader: WireReader<Channel>,
    ) -> Result<(), MigrationError> {
        let mut patient = channel.clone_handle();
        patient.set_patience(Some(DESCRIPTION_TIMEOUT));
        if reader.buffered().is_empty() {
            reader = WireReader::new(patient);
        }
        let ended = reader.is_at_end().map_err(MigrationError::io("read the description"))?;
        if ended {
            return Ok(());
        }
        let at = reader.offset();
        match read_record(&mut reader)? {
            Record::Description(_) => Ok(()),
            other => Err(out_of_place(&format!("{other:?}"), at, "after the end of the sections")),
        }
    }
}

fn send(back: &mut Channel, message: &ReturnMessage) -> Result<(), MigrationError> {
    let mut bytes = Vec::new();
    message.put(&mut bytes);
    back.write(&bytes).map_err(MigrationError::io("answer the source"))
}

fn out_of_place(section: &str, at: u64, what: &str) -> MigrationError {
    MigrationError::Section { section: section.to_owned(), at, what: what.to_owned() }
}
