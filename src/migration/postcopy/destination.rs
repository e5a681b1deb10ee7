//! The destination: the guest runs, and its memory arrives.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

use super::{Channels, Reconnect, received};
use crate::ByteRange;
use crate::migration::channel::{Channel, Sink};
use crate::migration::error::MigrationError;
use crate::migration::lazy::{FaultHandler, HandlerFailed, LazyRam, PageSource};
use crate::migration::loader::out_of_place;
use crate::migration::page_bitmap::{PageBitmap, bytes_of, pages_touched};
use crate::migration::progress::{Counters, Progress, Status};
use crate::migration::ram::{MigrationBlock, RamBlocks, RamRecords};
use crate::migration::stream::{
    AdvisedSizes, Command, Record, ReturnMessage, TARGET_PAGE_SIZE, read_footer, read_record,
};
use crate::migration::wire::{WireRead, WireReader};

/// Postcopy on the destination. A virtio-mem device of this process is frozen meanwhile
/// ([`FreezeHolder::Incoming`](crate::controller::FreezeHolder::Incoming)).
pub struct PostcopyIncoming<'a> {
    /// The blocks, mapped where the guest uses them.
    pub blocks: Arc<RamBlocks>,
    /// The channel for pages that somebody waits for.
    pub urgent: Option<Channel>,
    /// Where new channels come from when they break.
    pub reconnect: Box<dyn Reconnect + 'a>,
    /// Is told when the guest must be stopped, since faults cannot be answered any more.
    pub failed: Arc<dyn HandlerFailed>,
}

/// How far it has come (QEMU's PostcopyState).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    None,
    Advised,
    Listening,
    Running,
}

/// What arrives, and what has not yet.
pub(crate) struct Arriving<'a> {
    incoming: PostcopyIncoming<'a>,
    stage: Stage,
    /// By block, in the order of the registry: what the source will send.
    outstanding: Vec<(String, PageBitmap)>,
    memory: Option<(Arc<LazyRam>, FaultHandler)>,
    progress: Arc<Progress>,
}

impl<'a> Arriving<'a> {
    pub(crate) fn new(incoming: PostcopyIncoming<'a>, progress: Arc<Progress>) -> Self {
        Self { incoming, stage: Stage::None, outstanding: Vec::new(), memory: None, progress }
    }

    /// Whether the guest is to run now.
    pub(crate) fn is_running(&self) -> bool {
        self.stage == Stage::Running
    }

    /// Handles a command that only postcopy has; `at` is where it stands on the stream.
    pub(crate) fn command(&mut self, command: Command, at: u64) -> Result<(), MigrationError> {
        match (&command, self.stage) {
            (Command::PostcopyAdvise(Some(sizes)), Stage::None) => {
                self.check_sizes(*sizes)?;
                self.stage = Stage::Advised;
                Ok(())
            }
            (Command::PostcopyRamDiscard { block, ranges }, Stage::Advised) => {
                ranges.iter().try_for_each(|&range| self.expect(block, range))
            }
            (Command::PostcopyListen, Stage::Advised) => {
                self.listen()?;
                self.stage = Stage::Listening;
                Ok(())
            }
            (Command::PostcopyRun, Stage::Listening) => {
                self.stage = Stage::Running;
                Ok(())
            }
            _ => Err(out_of_place(&format!("{command:?}"), at, "not possible now")),
        }
    }

    /// The devices have their state, and nothing has arrived yet. A device of another process, which
    /// knows nothing of this, may have reserved huge pages for what is plugged.
    pub(crate) fn devices_loaded(&self) -> Result<(), MigrationError> {
        self.memory.as_ref().map_or(Ok(()), |(lazy, _)| lazy.refuse_present())
    }

    /// Page sizes must be alike, since host pages are placed whole.
    fn check_sizes(&self, theirs: AdvisedSizes) -> Result<(), MigrationError> {
        let blocks = self.incoming.blocks.migratable()?;
        let page_sizes = blocks.iter().fold(0, |all, block| all | block.page_size());
        let ours = AdvisedSizes { page_sizes, target_page_size: TARGET_PAGE_SIZE };
        if theirs == ours {
            return Ok(());
        }
        let show = |sizes: AdvisedSizes| {
            format!("{:#x} (target {:#x})", sizes.page_sizes, sizes.target_page_size)
        };
        let (stream, local) = (show(theirs), show(ours));
        Err(MigrationError::Configuration { what: "page sizes of RAM", stream, local })
    }

    /// These pages are still to come: what is there is stale.
    fn expect(&mut self, id: &str, (start, len): (u64, u64)) -> Result<(), MigrationError> {
        let wrong = |what| MigrationError::Page { at: 0, what };
        let Some(block) = self.incoming.blocks.get(id) else {
            return Err(wrong(format!("pages to come of block {id:?}, which is unknown")));
        };
        let whole = |bytes: u64| bytes.is_multiple_of(block.page_size());
        let range = ByteRange::new(start, len).filter(|range| range.end() <= block.used_length());
        let Some(range) = range.filter(|_| whole(start) && whole(len)) else {
            let what = format!("{len:#x} bytes to come at {start:#x} of block {id:?}");
            return Err(wrong(what));
        };
        if !block.is_populated(range)? {
            let block = id.to_owned();
            return Err(MigrationError::Discarded { block, offset: range.start(), at: 0 });
        }
        let index = match self.outstanding.iter().position(|(other, _)| other == id) {
            Some(index) => index,
            None => {
                let pages = PageBitmap::new(block.used_length() / TARGET_PAGE_SIZE);
                self.outstanding.push((id.to_owned(), pages));
                self.outstanding.len() - 1
            }
        };
        self.outstanding[index].1.set_range(pages_touched(range));
        Ok(())
    }

    /// From here on whoever touches what has not arrived waits.
    fn listen(&mut self) -> Result<(), MigrationError> {
        // Also those of which nothing is to come: after a break the source asks for all of them.
        let mut blocks = Vec::new();
        for block in self.incoming.blocks.migratable()? {
            let announced = self.outstanding.iter().position(|(id, _)| id == block.id());
            let outstanding = match announced {
                Some(index) => self.outstanding.swap_remove(index).1,
                None => PageBitmap::new(block.used_length() / TARGET_PAGE_SIZE),
            };
            give_stale_back(&block, &outstanding)?;
            blocks.push((block, outstanding));
        }
        let lazy = Arc::new(LazyRam::new(blocks)?);
        self.progress.watch_faults(lazy.shared_statistics());
        let handler = FaultHandler::start(Arc::clone(&lazy), Arc::clone(&self.incoming.failed))?;
        self.memory = Some((lazy, handler));
        Ok(())
    }

    /// Takes what arrives until everything has, over as many channels as it takes. The guest runs.
    pub(crate) fn run(
        &mut self,
        main: Channel,
        reader: WireReader<Channel>,
        section_id: u32,
    ) -> Result<(), MigrationError> {
        let Some((lazy, _)) = &self.memory else {
            return Err(out_of_place("RUN", reader.offset(), "before LISTEN"));
        };
        let lazy = Arc::clone(lazy);
        let mut channels = Channels { main, urgent: self.incoming.urgent.take() };
        let mut reader = Some(reader);
        loop {
            self.progress.set_status(Status::PostcopyActive);
            let session = Session { lazy: &lazy, section_id, progress: &self.progress };
            let error = match session.take_all(&channels, reader.take()) {
                Ok(()) => break,
                Err(error) => error,
            };
            // Faults go on being answered where nothing has to come for them.
            lazy.set_source(None);
            channels.main.shutdown();
            if let Some(urgent) = &channels.urgent {
                urgent.shutdown();
            }
            self.progress.set_status(Status::PostcopyPaused);
            tracing::warn!(%error, "the channel is broken; who needs memory waits");
            match self.incoming.reconnect.reconnect(&error) {
                Some(new) => channels = new,
                None => {
                    // Whoever waits must not go on with zeros, so nothing of this may end before
                    // the process does.
                    std::mem::forget(self.memory.take());
                    self.incoming.failed.handler_failed(&error);
                    return Err(error);
                }
            }
            self.progress.set_status(Status::PostcopyRecover);
        }
        lazy.set_source(None);
        lazy.finish()?;
        let mut bytes = Vec::new();
        ReturnMessage::Shut(0).put(&mut bytes);
        // The source is not needed any more; it may well have gone.
        if let Err(error) = channels.main.uncancellable().write(&bytes) {
            tracing::debug!(%error, "cannot tell the source that everything has arrived");
        }
        Ok(())
    }
}

/// Gives back what is there of pages that are still to come. All at once, by what there is, since
/// there may be as many ranges to come as pages, and the guest stands still.
fn give_stale_back(block: &MigrationBlock, outstanding: &PageBitmap) -> Result<(), MigrationError> {
    let mut stale = Vec::new();
    if let Some(used) = block.used() {
        let looked = block.for_each_data(used, |data| {
            stale.extend(outstanding.runs(pages_touched(data)).map(bytes_of));
        });
        looked.map_err(MigrationError::memory(block.id(), "look for stale pages"))?;
    }
    for range in stale {
        let given = block.discard(range);
        given.map_err(MigrationError::memory(block.id(), "give stale pages back"))?;
    }
    Ok(())
}

/// The pages that arrive over one pair of channels.
struct Session<'a> {
    lazy: &'a Arc<LazyRam>,
    section_id: u32,
    progress: &'a Progress,
}

impl Session<'_> {
    fn take_all(
        &self,
        channels: &Channels,
        reader: Option<WireReader<Channel>>,
    ) -> Result<(), MigrationError> {
        let back = Arc::new(Back {
            channel: Mutex::new(channels.main.uncancellable()),
            last_block: AtomicU32::new(u32::MAX),
        });
        let resumed = reader.is_none();
        let mut reader =
            reader.unwrap_or_else(|| WireReader::with_capacity(channels.main.uncancellable(), 0));
        std::thread::scope(|scope| {
            let urgent = channels.urgent.as_ref().map(Channel::uncancellable);
            let broken = channels.main.clone_handle();
            let taking = urgent.map(|urgent| {
                scope.spawn(move || {
                    let result = self.take_urgent(urgent);
                    if result.is_err() {
                        broken.shutdown();
                    }
                    result
                })
            });
            if !resumed {
                self.lazy.set_source(Some(Arc::clone(&back) as Arc<dyn PageSource>));
                // Faults before now found nobody to ask.
                let asked = self.lazy.request_again();
                asked.map_err(MigrationError::io("ask for pages"))?;
            }
            let result = self.take_main(&mut reader, &back);
            // At the end of the stream there may still be pages on the other channel, which ends
            // by itself then.
            if (result.is_err() || self.lazy.outstanding() == 0)
                && let Some(urgent) = &channels.urgent
            {
                urgent.shutdown();
            }
            let urgent = taking.map_or(Ok(()), |taking| {
                taking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            result?;
            match self.lazy.outstanding() {
                // Whatever became of the other channel then.
                0 => Ok(()),
                left => {
                    urgent?;
                    let what = format!("{left} pages never came");
                    Err(out_of_place("end of the stream", reader.offset(), &what))
                }
            }
        })
    }

    /// Reads the stream to its end.
    fn take_main(
        &self,
        reader: &mut WireReader<Channel>,
        back: &Arc<Back>,
    ) -> Result<(), MigrationError> {
        let mut records = RamRecords::new();
        loop {
            let at = reader.offset();
            match read_record(reader)? {
                Record::Continued { section_id, .. } if section_id == self.section_id => {
                    records.place_section(self.lazy, reader)?;
                    read_footer(reader, section_id)?;
                }
                Record::Command(Command::RecvBitmap { block }) => {
                    let Some(index) = self.lazy.find(&block) else {
                        return back.send_received(&block, None);
                    };
                    back.send_received(&block, Some(&self.lazy.outstanding_of(index)))?;
                }
                Record::Command(Command::PostcopyResume) => {
                    back.send(&ReturnMessage::ResumeAck)?;
                    Counters::add(&self.progress.counters.postcopy_recoveries, 1);
                    self.lazy.set_source(Some(Arc::clone(back) as Arc<dyn PageSource>));
                    let asked = self.lazy.request_again();
                    asked.map_err(MigrationError::io("ask for pages again"))?;
                }
                Record::Command(Command::Ping(value)) => {
                    back.send(&ReturnMessage::Pong(value))?;
                }
                Record::Eof => return Ok(()),
                other => {
                    return Err(out_of_place(
                        &format!("{other:?}"),
                        at,
                        "not possible in postcopy",
                    ));
                }
            }
        }
    }

    /// Takes the pages that were asked for, until the channel ends.
    fn take_urgent(&self, channel: Channel) -> Result<(), MigrationError> {
        let mut reader = WireReader::new(channel);
        let mut records = RamRecords::new();
        while !reader.is_at_end().map_err(MigrationError::io("read pages"))? {
            if records.place_page(self.lazy, &mut reader)? {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// The way back to the source.
struct Back {
    channel: Mutex<Channel>,
    /// The block that was asked for last.
    last_block: AtomicU32,
}

impl Back {
    fn send(&self, message: &ReturnMessage) -> Result<(), MigrationError> {
        let mut bytes = Vec::new();
        message.put(&mut bytes);
        self.channel.lock().write(&bytes).map_err(MigrationError::io("answer the source"))
    }

    fn send_received(
        &self,
        block: &str,
        outstanding: Option<&PageBitmap>,
    ) -> Result<(), MigrationError> {
        let Some(outstanding) = outstanding else {
            let what = format!("received pages of block {block:?} are asked for");
            return Err(MigrationError::Page { at: 0, what });
        };
        let mut bytes = Vec::new();
        received::put(&mut bytes, block, outstanding);
        self.channel.lock().write(&bytes).map_err(MigrationError::io("answer the source"))
    }
}

impl PageSource for Back {
    fn request(&self, lazy: &LazyRam, block: usize, range: ByteRange) -> io::Result<()> {
        let mut channel = self.channel.lock();
        let known = u32::try_from(block).ok() == Some(self.last_block.load(Ordering::Relaxed));
        let name = (!known).then(|| lazy.block(block).id().to_owned());
        let len = u32::try_from(range.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let message = ReturnMessage::RequestPages { block: name, start: range.start(), len };
        let mut bytes = Vec::new();
        message.put(&mut bytes);
        channel.write(&bytes)?;
        self.last_block.store(u32::try_from(block).unwrap_or(u32::MAX), Ordering::Relaxed);
        Ok(())
    }
}
