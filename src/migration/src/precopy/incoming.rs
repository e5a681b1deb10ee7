//! The destination.

use std::io::Cursor;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use ram_discard::MemoryState;
use vmstate::wire::{WireRead, WireReader};

use super::{Guest, InUse, PING_LOADED};
use crate::channel::{Channel, Interrupt};
use crate::devices::Devices;
use crate::error::MigrationError;
use crate::handler::LoadHandler;
use crate::lazy::LazyRam;
use crate::loader::{Loader, out_of_place};
use crate::postcopy::{
    Handover, IncomingPages, PACKAGE_MAX, PING_PACKAGE_LOADED, PostcopyIncoming, ReturnChannel,
};
use crate::progress::{Counters, Progress, Status};
use crate::stream::{
    BlockStateChange, Command, Configuration, PING_BLOCK_STATE, PING_DISCARDED, PING_REASON,
    PONG_BLOCK_STATE, RAM_SECTION, Record, ReturnMessage, read_header, read_record,
};

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
    /// Postcopy, if it may come to that.
    pub postcopy: Option<PostcopyIncoming<'a>>,
    /// What can be seen of it, and how it is cancelled.
    pub progress: Arc<Progress>,
}

/// How long what follows the configuration is waited for when that is refused.
const REFUSAL_TIMEOUT: Duration = Duration::from_millis(500);

/// The stream as it comes.
struct Session<'a> {
    loader: Loader<'a>,
    postcopy: Option<IncomingPages<'a>>,
    channel: Channel,
    /// By which a channel for pages ends this one's reads.
    interrupt: Interrupt,
    /// Where the source listens, once it said so.
    back: Option<Arc<ReturnChannel>>,
    handover: Arc<Handover>,
    /// Whether the source was told that block state may change.
    follows: bool,
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
        let urgent = postcopy.as_ref().and_then(|postcopy| postcopy.urgent.as_ref());
        let pages = handlers.iter().flat_map(|handler| handler.encrypted_channels()).collect();
        // Before memory is touched.
        let checked = InUse { main: &channel, urgent, pages }.check();
        let loader = checked.and_then(|()| Loader::new(handlers, devices, &configuration));
        let result = loader.and_then(|mut loader| {
            let progress = Arc::clone(&progress);
            let postcopy =
                postcopy.map(|postcopy| IncomingPages::new(postcopy, Arc::clone(&progress)));
            let committed = Arc::new(AtomicBool::new(false));
            // A channel may fail before the source could be told why.
            let interrupt = Interrupt::after_grace();
            loader.interrupt_on_failure(&interrupt);
            let channel =
                channel.cancellable_until(Arc::clone(&committed)).interruptible(&interrupt);
            let handover = Arc::new(Handover::new(committed));
            let (back, follows) = (None, false);
            let mut session =
                Session { loader, postcopy, channel, interrupt, back, handover, follows, progress };
            let result = session.load(&configuration).and_then(|rest| match rest {
                Rest::Nothing => session.take_over(guest),
                Rest::Memory(package, reader) => session.listen(guest, package, *reader),
            });
            // What another channel failed of ended this one.
            let result = result.map_err(|error| session.loader.failure().unwrap_or(error));
            if let Err(error) = &result {
                if let Some(back) = &session.back {
                    back.refuse(error);
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

/// What follows when the stream, or the first part of it, was handled.
enum Rest {
    Nothing,
    /// The package from LISTEN on, and behind it the memory.
    Memory(Package, Box<WireReader<Channel>>),
}

/// Device state that was read whole, since loading it may need memory that comes behind it.
struct Package {
    reader: WireReader<Cursor<Vec<u8>>>,
    len: u64,
    /// Where it starts on the stream.
    at: u64,
}

impl Package {
    fn read(reader: &mut dyn WireRead, len: u32, at: u64) -> Result<Self, MigrationError> {
        let len = u64::from(len);
        let bytes = reader.bytes(len, PACKAGE_MAX, "a package")?;
        Ok(Self { reader: WireReader::new(Cursor::new(bytes)), len, at })
    }

    /// The next record, until the end.
    fn next(&mut self) -> Result<Option<Record>, MigrationError> {
        if self.reader.offset() >= self.len {
            return Ok(None);
        }
        Ok(Some(read_record(&mut self.reader)?))
    }
}

/// Gives up on every way out but the good one, a panic as well: a thread that takes memory is waited
/// for, and would wait for the source.
struct GiveUp<'a> {
    handover: &'a Handover,
    memory: &'a LazyRam,
    armed: bool,
}

impl Drop for GiveUp<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.handover.give_up();
            if !self.handover.is_lost() {
                self.memory.abandon();
            }
        }
    }
}

impl Session<'_> {
    /// Tells the source that the guest is taken, and only then lets it run: a source that was not
    /// told has it still.
    fn take_over(&mut self, guest: &dyn Guest) -> Result<(), MigrationError> {
        if let Some(back) = self.back.take() {
            back.claim(&ReturnMessage::Shut(0))?;
        }
        run(guest)
    }

    fn load(&mut self, local: &Configuration) -> Result<Rest, MigrationError> {
        let mut reader = WireReader::with_capacity(self.channel.clone_handle(), READ_AHEAD);
        let checked = Loader::check(local, &read_header(&mut reader)?);
        if checked.is_err() {
            self.hear_how_to_refuse(&mut reader);
        }
        checked?;
        self.progress.set_status(Status::Active);
        loop {
            let at = reader.offset();
            match read_record(&mut reader)? {
                Record::Eof => break,
                Record::Command(Command::Packaged { len }) => {
                    let mut package = Package::read(&mut reader, len, at)?;
                    if self.package(&mut package)? {
                        return Ok(Rest::Memory(package, Box::new(reader)));
                    }
                }
                record => self.record(record, at, &mut reader)?,
            }
            Counters::set(&self.progress.counters.transferred, reader.offset());
        }
        self.loader.all_loaded()?;
        self.skip_description(reader)?;
        Ok(Rest::Nothing)
    }

    /// Reads how the source is told of a refusal, which stands first, and is waited for shortly.
    fn hear_how_to_refuse(&mut self, reader: &mut WireReader<Channel>) {
        reader.get_mut().set_read_patience(Some(REFUSAL_TIMEOUT));
        loop {
            let at = reader.offset();
            let Ok(Record::Command(command)) = read_record(reader) else { return };
            if !matches!(command, Command::OpenReturnPath | Command::Ping(1 | PING_REASON)) {
                return;
            }
            let last = command == Command::Ping(PING_REASON);
            if self.record(Record::Command(command), at, reader).is_err() || last {
                return;
            }
        }
    }

    /// Handles a package up to LISTEN; true when that came.
    fn package(&mut self, package: &mut Package) -> Result<bool, MigrationError> {
        while let Some(record) = package.next()? {
            let listens = matches!(record, Record::Command(Command::PostcopyListen));
            self.packaged(record, package)?;
            if listens {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Handles a record of a package.
    fn packaged(&mut self, record: Record, package: &mut Package) -> Result<(), MigrationError> {
        let at = package.at;
        match record {
            // Else the stream would say how deep this recurses.
            Record::Command(Command::Packaged { .. }) | Record::Eof => {
                Err(out_of_place(&format!("{record:?}"), at, "inside a package"))
            }
            Record::Command(Command::PostcopyListen) => {
                self.postcopy_command(Command::PostcopyListen, at)
            }
            record => self.record(record, at, &mut package.reader),
        }
    }

    /// Handles what may be on the stream or in a package.
    fn record(
        &mut self,
        record: Record,
        at: u64,
        reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        match record {
            Record::Section(header) => {
                // What says how the source is told comes before.
                self.interrupt.end_grace();
                self.loader.section(&header, reader)
            }
            Record::Continued { kind, section_id } => {
                self.loader.continued(kind, section_id, at, reader)
            }
            Record::Command(Command::OpenReturnPath) => {
                let channel = self.channel.clone_handle().without_interrupt();
                self.back = Some(Arc::new(ReturnChannel::new(channel)));
                Ok(())
            }
            Record::Command(Command::Ping(PING_BLOCK_STATE))
                if self.back.is_some() && self.loader.can_follow() =>
            {
                self.follows = true;
                self.pong(PONG_BLOCK_STATE)
            }
            Record::Command(Command::Ping(value)) => {
                if value == PING_LOADED {
                    // The answer is the verdict.
                    self.loader.all_loaded()?;
                }
                match (value, &self.back) {
                    (PING_DISCARDED, Some(back)) => back.tell_discards(),
                    (PING_REASON, Some(back)) => back.tell_reasons(),
                    _ => {}
                }
                self.pong(value)
            }
            Record::Command(Command::BlockState(change)) => self.block_state(&change, at),
            Record::Command(Command::SwitchoverStart) => {
                self.progress.set_status(Status::Device);
                Ok(())
            }
            // What follows it is read by another thread, so it must be behind all that is to be loaded.
            Record::Command(command @ Command::PostcopyListen) => {
                Err(out_of_place(&format!("{command:?}"), at, "outside a package"))
            }
            Record::Command(command) => self.postcopy_command(command, at),
            Record::Description(_) | Record::Eof => {
                let what = "before the end of the sections";
                Err(out_of_place(&format!("{record:?}"), at, what))
            }
        }
    }

    /// Has block state follow the source's, and tells it whether that could be done.
    fn block_state(&mut self, change: &BlockStateChange, at: u64) -> Result<(), MigrationError> {
        if !self.follows || self.loader.is_loaded() {
            let what = "not possible now: it was not agreed upon, or all was loaded";
            return Err(out_of_place("a change of block state", at, what));
        }
        let refused = self.loader.block_state(change, at)?;
        match &self.back {
            Some(back) if change.state == MemoryState::Populated => {
                back.send(&ReturnMessage::BlockState { number: change.number, refused })
            }
            _ => Ok(()),
        }
    }

    fn postcopy_command(&mut self, command: Command, at: u64) -> Result<(), MigrationError> {
        let listed = self.loader.section_id(RAM_SECTION).is_some();
        match &mut self.postcopy {
            Some(postcopy) => postcopy.command(command, at, listed),
            None => {
                let what = "postcopy was not provided for";
                Err(out_of_place(&format!("{command:?}"), at, what))
            }
        }
    }

    fn pong(&self, value: u32) -> Result<(), MigrationError> {
        match &self.back {
            Some(back) => back.send(&ReturnMessage::Pong(value)),
            None => Ok(()),
        }
    }

    /// Takes memory on a thread of its own from here on, while this one loads the devices and lets
    /// the guest run: both may touch memory that is outstanding.
    fn listen(
        &mut self,
        guest: &dyn Guest,
        mut package: Package,
        reader: WireReader<Channel>,
    ) -> Result<(), MigrationError> {
        let (Some(mut postcopy), Some(section_id), Some(back)) =
            (self.postcopy.take(), self.loader.section_id(RAM_SECTION), self.back.clone())
        else {
            return Err(out_of_place("LISTEN", package.at, "the return path was not opened"));
        };
        self.progress.set_status(Status::Device);
        self.loader.before_postcopy()?;
        let handover = Arc::clone(&self.handover);
        let on_listen = postcopy.on_listen();
        let mut listening = postcopy.listen(back, Arc::clone(&handover), section_id)?;
        let memory = Arc::clone(listening.memory());
        let main = self.channel.clone_handle();
        thread::scope(|scope| {
            let mut give_up = GiveUp { handover: &handover, memory: &memory, armed: true };
            let thread = thread::Builder::new().name("postcopy".to_owned());
            let taking = thread.spawn_scoped(scope, || listening.take(main, reader));
            let taking = taking.map_err(MigrationError::io("start a thread"))?;
            let shared = on_listen.map_or(Ok(()), |on_listen| on_listen(&memory));
            let shared = shared.map_err(|reason| MigrationError::Vmm {
                what: "share memory that arrives",
                reason,
            });
            let claimed = shared.and_then(|()| self.load_package(&mut package, &memory));
            let ran = match &claimed {
                Ok(true) => run(guest),
                _ => Ok(()),
            };
            let broke_before = !handover.is_open();
            if let (Err(error), Some(back)) = (&claimed, &self.back) {
                // Before the channel is ended.
                back.refuse(error);
            }
            give_up.armed = claimed.is_err();
            drop(give_up);
            let taken = taking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            match claimed {
                Ok(_) => taken.and(ran),
                // What broke first is more telling than what broke because of it.
                Err(error) if broke_before => taken.and(Err(error)),
                Err(error) => Err(error),
            }
        })
    }

    /// Handles the package behind LISTEN, and takes the guest when the source says RUN; false when
    /// it was given up before, for which the other thread has the reason.
    fn load_package(
        &mut self,
        package: &mut Package,
        memory: &Arc<LazyRam>,
    ) -> Result<bool, MigrationError> {
        let handover = Arc::clone(&self.handover);
        while let Some(record) = package.next()? {
            match record {
                Record::Command(Command::PostcopyRun) if handover.run_came() => {}
                Record::Command(Command::Ping(value)) => {
                    if value == PING_PACKAGE_LOADED && !self.take_devices_over(memory)? {
                        return Ok(false);
                    }
                    self.pong(value)?;
                }
                Record::Section(header) => self.loader.section(&header, &mut package.reader)?,
                // RAM above all, which is not written past the threads that wait for it.
                other => {
                    let what = "in a package behind LISTEN";
                    return Err(out_of_place(&format!("{other:?}"), package.at, what));
                }
            }
        }
        // A source need not have asked for the verdict: QEMU before 10.2 does not.
        if !handover.wait_for_run() || !self.take_devices_over(memory)? {
            return Ok(false);
        }
        if self.progress.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        // What is plugged by a guest that runs here is of no concern to the source. One that knows of it is told what
        // is unplugged; what it sends of that all the same is dropped.
        self.loader.arrives(memory)?;
        match &self.back {
            Some(back) => handover.claim(back, &self.progress),
            None => Ok(false),
        }
    }

    /// Devices take their states over, once; false when the guest was given up before.
    fn take_devices_over(&mut self, memory: &LazyRam) -> Result<bool, MigrationError> {
        if !self.handover.is_open() {
            return Ok(false);
        }
        if !self.loader.is_loaded() {
            self.loader.all_loaded()?;
            // A device of another process, which knows nothing of this, may have reserved huge pages
            // for what is plugged.
            memory.refuse_present()?;
        }
        Ok(true)
    }

    /// Reads the description, which only people need. A stream without one ends here.
    fn skip_description(&self, mut reader: WireReader<Channel>) -> Result<(), MigrationError> {
        reader.get_mut().set_read_patience(Some(DESCRIPTION_TIMEOUT));
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

fn run(guest: &dyn Guest) -> Result<(), MigrationError> {
    guest.run().map_err(|reason| MigrationError::Vmm { what: "let the guest run", reason })
}
