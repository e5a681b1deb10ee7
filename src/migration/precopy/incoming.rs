//! The destination.

use std::sync::Arc;
use std::time::Duration;

use super::{Guest, PING_LOADED};
use crate::migration::channel::{Channel, Sink};
use crate::migration::devices::Devices;
use crate::migration::error::MigrationError;
use crate::migration::handler::LoadHandler;
use crate::migration::loader::{Loader, out_of_place};
use crate::migration::postcopy::{Arriving, PING_PACKAGE_LOADED, PostcopyIncoming};
use crate::migration::progress::{Counters, Progress, Status};
use crate::migration::stream::{
    Command, Configuration, RAM_SECTION, Record, ReturnMessage, read_header, read_record,
};
use crate::migration::wire::{WireRead, WireReader};

/// How much is read ahead of what is handled, bytes.
const READ_AHEAD: usize = 4 << 20;

/// The most bytes of device state that come in a package.
const PACKAGE_MAX: u64 = 1 << 30;

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
    /// Postcopy, if it may come to that.
    pub postcopy: Option<PostcopyIncoming<'a>>,
    /// What can be seen of it, and how it is cancelled.
    pub progress: Arc<Progress>,
}

/// The stream as it comes.
struct Session<'a> {
    loader: Loader<'a>,
    postcopy: Option<Arriving<'a>>,
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
        let Self { configuration, guest, handlers, devices, postcopy, progress } = self;
        progress.set_status(Status::Setup);
        let result = Loader::new(handlers, devices, &configuration).and_then(|loader| {
            let progress = Arc::clone(&progress);
            let postcopy = postcopy.map(|postcopy| Arriving::new(postcopy, Arc::clone(&progress)));
            let mut session = Session { loader, postcopy, channel, back: None, progress };
            let result = session.load(&configuration).and_then(|rest| match rest {
                Rest::Nothing => session.take_over(guest),
                Rest::Memory(reader) => session.run_and_receive(guest, reader),
            });
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

/// What follows on the channel when the guest can run.
enum Rest {
    Nothing,
    Memory(WireReader<Channel>),
}

impl Session<'_> {
    /// Tells the source that the guest is taken, and only then lets it run: a source that was not
    /// told has it still.
    fn take_over(&mut self, guest: &dyn Guest) -> Result<(), MigrationError> {
        if let Some(back) = self.back.take() {
            claim(&back, &ReturnMessage::Shut(0))?;
        }
        guest.run().map_err(|reason| MigrationError::Vmm { what: "let the guest run", reason })
    }

    /// As [`take_over`](Self::take_over), with memory that follows.
    fn run_and_receive(
        &mut self,
        guest: &dyn Guest,
        reader: WireReader<Channel>,
    ) -> Result<(), MigrationError> {
        let at = reader.offset();
        let (Some(postcopy), Some(section_id), Some(back)) =
            (&mut self.postcopy, self.loader.section_id(RAM_SECTION), &self.back)
        else {
            return Err(out_of_place("RUN", at, "no memory was announced"));
        };
        claim(back, &ReturnMessage::SwitchoverAck)?;
        guest.run().map_err(|reason| MigrationError::Vmm { what: "let the guest run", reason })?;
        postcopy.run(
            self.channel.uncancellable(),
            reader.map(|channel| channel.uncancellable()),
            section_id,
        )
    }

    fn load(&mut self, local: &Configuration) -> Result<Rest, MigrationError> {
        let mut reader = WireReader::with_capacity(self.channel.clone_handle(), READ_AHEAD);
        Loader::check(local, &read_header(&mut reader)?)?;
        self.progress.set_status(Status::Active);
        while self.record(&mut reader, None)? {
            Counters::set(&self.progress.counters.transferred, reader.offset());
            if self.postcopy.as_ref().is_some_and(Arriving::is_running) {
                return Ok(Rest::Memory(reader));
            }
        }
        self.loader.all_loaded()?;
        self.skip_description(reader)?;
        Ok(Rest::Nothing)
    }

    /// Handles the next thing on the stream, or in the package that starts at byte `package` of it;
    /// false at the end of the stream.
    fn record(
        &mut self,
        reader: &mut dyn WireRead,
        package: Option<u64>,
    ) -> Result<bool, MigrationError> {
        let at = reader.offset();
        match (read_record(reader)?, package) {
            // Else the stream would say how deep this recurses.
            (what @ (Record::Command(Command::Packaged { .. }) | Record::Eof), Some(at)) => {
                return Err(out_of_place(&format!("{what:?}"), at, "inside a package"));
            }
            (Record::Section(header), _) => self.loader.section(&header, reader)?,
            (Record::Continued { kind, section_id }, _) => {
                self.loader.continued(kind, section_id, at, reader)?;
            }
            (Record::Command(Command::Packaged { len }), None) => {
                // Whole, since what is in it may need memory that comes behind it.
                let package = reader.bytes(u64::from(len), PACKAGE_MAX, "a package")?;
                let mut inner = WireReader::new(&package[..]);
                while inner.offset() < package.len() as u64 {
                    self.record(&mut inner, Some(at))?;
                }
            }
            (Record::Command(command), _) => self.command(command, at)?,
            (Record::Eof, None) => return Ok(false),
            (Record::Description(_), _) => {
                return Err(out_of_place("description", at, "before the end of the sections"));
            }
        }
        Ok(true)
    }

    fn command(&mut self, command: Command, at: u64) -> Result<(), MigrationError> {
        match command {
            Command::OpenReturnPath => self.back = Some(self.channel.clone_handle()),
            Command::Ping(value) => {
                if value == PING_LOADED || value == PING_PACKAGE_LOADED {
                    // The answer is the verdict.
                    self.loader.all_loaded()?;
                    if let Some(postcopy) = &self.postcopy {
                        postcopy.devices_loaded()?;
                    }
                }
                if let Some(back) = &mut self.back {
                    send(back, &ReturnMessage::Pong(value))?;
                }
            }
            Command::SwitchoverStart => self.progress.set_status(Status::Device),
            other => match &mut self.postcopy {
                Some(postcopy) => postcopy.command(other, at)?,
                None => {
                    let what = "postcopy was not provided for";
                    return Err(out_of_place(&format!("{other:?}"), at, what));
                }
            },
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

/// Says that the guest is taken, unless the source has ended the channel: then it takes the guest
/// back if it does not hear that. Over TCP such a message could still be written, and be for
/// nobody. A source that ends its direction right after the look still reads.
fn claim(back: &Channel, message: &ReturnMessage) -> Result<(), MigrationError> {
    if back.is_hung_up() {
        return Err(MigrationError::ChannelClosed("the guest was about to be taken"));
    }
    send(&mut back.uncancellable(), message)
}

fn send(back: &mut Channel, message: &ReturnMessage) -> Result<(), MigrationError> {
    let mut bytes = Vec::new();
    message.put(&mut bytes);
    back.write(&bytes).map_err(MigrationError::io("answer the source"))
}
