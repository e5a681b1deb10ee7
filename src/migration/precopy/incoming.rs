//! The destination.

use std::sync::Arc;
use std::time::Duration;

use super::{Guest, PING_LOADED};
use crate::migration::channel::{Channel, Sink};
use crate::migration::devices::Devices;
use crate::migration::error::MigrationError;
use crate::migration::handler::LoadHandler;
use crate::migration::loader::{Loader, out_of_place};
use crate::migration::progress::{Counters, Progress, Status};
use crate::migration::stream::{
    Command, Configuration, Record, ReturnMessage, read_header, read_record,
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

/// The stream as it comes.
struct Session<'a> {
    loader: Loader<'a>,
    channel: Channel,
    /// Where the source listens, once it said so.
    back: Option<Channel>,
    progress: Arc<Progress>,
}

impl Incoming<'_> {
    /// Takes over a guest from a connected channel, and lets it run. On an error it does not run
    /// here, and the source has been told so, as far as it can still be reached.
    ///
    /// # Errors
    ///
    /// Why the guest could not be taken over.
    pub fn run(self, channel: Channel) -> Result<(), MigrationError> {
        let Self { configuration, guest, handlers, devices, progress } = self;
        progress.set_status(Status::Setup);
        let result = Loader::new(handlers, devices).and_then(|loader| {
            let progress = Arc::clone(&progress);
            let mut session = Session { loader, channel, back: None, progress };
            let result = session.load(&configuration).and_then(|()| session.take_over(guest));
            if let Err(error) = &result {
                if let Some(back) = &mut session.back {
                    let _ = send(back, &ReturnMessage::Shut(error.code()));
                }
                session.channel.shutdown();
            }
            result
        });
        match &result {
            Ok(()) => progress.set_status(Status::Completed),
            Err(error) => progress.fail(error),
        }
        result
    }
}

impl Session<'_> {
    /// Tells the source that the guest is taken, and only then lets it run: a source that was not
    /// told has it still.
    fn take_over(&mut self, guest: &dyn Guest) -> Result<(), MigrationError> {
        if let Some(back) = self.back.take() {
            send(&mut back.uncancellable(), &ReturnMessage::Shut(0))?;
        }
        guest.run().map_err(|reason| MigrationError::Vmm { what: "let the guest run", reason })
    }

    fn load(&mut self, local: &Configuration) -> Result<(), MigrationError> {
        let mut reader = WireReader::with_capacity(self.channel.clone_handle(), READ_AHEAD);
        Loader::check(local, &read_header(&mut reader)?)?;
        self.progress.set_status(Status::Active);
        loop {
            let at = reader.offset();
            let record = read_record(&mut reader)?;
            match record {
                Record::Section(header) => self.loader.section(&header, &mut reader)?,
                Record::Continued { kind, section_id } => {
                    self.loader.continued(kind, section_id, at, &mut reader)?;
                }
                Record::Command(command) => self.command(command, at)?,
                Record::Eof => break,
                Record::Description(_) => {
                    return Err(out_of_place("description", at, "before the end of the sections"));
                }
            }
            Counters::set(&self.progress.counters.transferred, reader.offset());
        }
        self.loader.all_loaded()?;
        self.skip_description(reader)
    }

    fn command(&mut self, command: Command, at: u64) -> Result<(), MigrationError> {
        match command {
            Command::OpenReturnPath => self.back = Some(self.channel.clone_handle()),
            Command::Ping(value) => {
                if value == PING_LOADED {
                    // The answer is the verdict.
                    self.loader.all_loaded()?;
                }
                if let Some(back) = &mut self.back {
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

    /// Reads the description, which only people need. A stream without one ends here.
    fn skip_description(&self, mut reader: WireReader<Channel>) -> Result<(), MigrationError> {
        reader.get_mut().set_patience(Some(DESCRIPTION_TIMEOUT));
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
