//! The destination up to LISTEN: what is to arrive, and that this memory can do it.

use std::sync::Arc;

use ram_discard::ByteRange;

use super::listening::Listening;
use super::return_channel::ReturnChannel;
use super::{Reconnect, handover::Handover};
use crate::channel::Channel;
use crate::error::MigrationError;
use crate::lazy::{FaultHandler, HandlerFailed, LazyRam, PageSource};
use crate::loader::out_of_place;
use crate::page_bitmap::{PageBitmap, bytes_of, pages_touched};
use crate::progress::Progress;
use crate::ram::{MigrationBlock, RamBlocks};
use crate::stream::{AdvisedSizes, Command, TARGET_PAGE_SIZE};

/// Postcopy on the destination. From RUN on a virtio-mem device of this process serves its guest, where its manager
/// can be followed: what is plugged is zeros at once, what is unplugged is not waited for any more. Its controller takes no
/// huge page for what is outstanding until memory has arrived (`FreezeHolder::Incoming`, which is to stop
/// freezing by then: `MemController::serve_while_incoming`).
pub struct PostcopyIncoming<'a> {
    /// The blocks, mapped where the guest uses them.
    pub blocks: Arc<RamBlocks>,
    /// The channel for pages that a vCPU waits for.
    pub urgent: Option<Channel>,
    /// Where new channels come from when they break.
    pub reconnect: Box<dyn Reconnect + 'a>,
    /// Is told when the guest must be stopped, since faults cannot be answered any more.
    pub failed: Arc<dyn HandlerFailed>,
    /// Is handed the memory once accesses to it wait and are answered, before the devices behind
    /// LISTEN are loaded: the time for other processes that share it to take part, by
    /// [`SharedFaults`](crate::lazy::SharedFaults).
    pub listening: Option<OnListen<'a>>,
}

/// What is done with memory that is about to arrive. An error leaves the guest at the source.
pub type OnListen<'a> = Box<dyn FnOnce(&Arc<LazyRam>) -> Result<(), String> + 'a>;

/// How far it has come (QEMU's PostcopyState).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    None,
    Advised,
    Listening,
}

/// The pages that are to arrive.
pub(crate) struct IncomingPages<'a> {
    incoming: PostcopyIncoming<'a>,
    stage: Stage,
    /// By block, in the order of the registry: what the source will send.
    outstanding: Vec<(String, PageBitmap)>,
    progress: Arc<Progress>,
}

impl<'a> IncomingPages<'a> {
    pub(crate) fn new(incoming: PostcopyIncoming<'a>, progress: Arc<Progress>) -> Self {
        Self { incoming, stage: Stage::None, outstanding: Vec::new(), progress }
    }

    /// What is to be done with the memory once it listens.
    pub(crate) fn on_listen(&mut self) -> Option<OnListen<'a>> {
        self.incoming.listening.take()
    }

    /// Handles a command that only postcopy has; `at` is where it stands on the stream. `listed` is
    /// whether the list of RAM blocks came, which decides on their lengths.
    pub(crate) fn command(
        &mut self,
        command: Command,
        at: u64,
        listed: bool,
    ) -> Result<(), MigrationError> {
        match (&command, self.stage) {
            (Command::PostcopyAdvise(Some(sizes)), Stage::None) => {
                self.check_sizes(*sizes)?;
                // Before precopy has taken its time, and while the guest still runs.
                LazyRam::check(&self.incoming.blocks.migratable()?)?;
                self.stage = Stage::Advised;
                Ok(())
            }
            (Command::PostcopyRamDiscard { block, ranges }, Stage::Advised) if listed => {
                ranges.iter().try_for_each(|&range| self.expect(block, range, at))
            }
            (Command::PostcopyListen, Stage::Advised) if listed => {
                self.stage = Stage::Listening;
                Ok(())
            }
            _ => Err(out_of_place(&format!("{command:?}"), at, "not possible now")),
        }
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

    /// These pages are outstanding, says the command at byte `at` of the stream: what is there is stale.
    fn expect(
        &mut self,
        id: &str,
        (start, len): (u64, u64),
        at: u64,
    ) -> Result<(), MigrationError> {
        let wrong = |what| MigrationError::Page { at, what };
        let Some(block) = self.incoming.blocks.get(id) else {
            return Err(wrong(format!("outstanding pages of block {id:?}, which is unknown")));
        };
        let whole = |bytes: u64| bytes.is_multiple_of(block.page_size());
        let range = ByteRange::new(start, len).filter(|range| range.end() <= block.used_length());
        let Some(range) = range.filter(|_| whole(start) && whole(len)) else {
            let what = format!("{len:#x} outstanding bytes at {start:#x} of block {id:?}");
            return Err(wrong(what));
        };
        if !block.is_populated(range)? {
            let block = id.to_owned();
            return Err(MigrationError::Discarded { block, offset: range.start(), at });
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

    /// Memory, whose outstanding pages are discarded, and waited for from here on.
    pub(crate) fn memory(&mut self) -> Result<LazyRam, MigrationError> {
        // Also those of which nothing is to come: after a break the source asks for all of them.
        let mut blocks = Vec::new();
        for block in self.incoming.blocks.migratable()? {
            let announced = self.outstanding.iter().position(|(id, _)| id == block.id());
            let outstanding = match announced {
                Some(index) => self.outstanding.swap_remove(index).1,
                None => PageBitmap::new(block.used_length() / TARGET_PAGE_SIZE),
            };
            discard_stale(&block, &outstanding)?;
            blocks.push((block, outstanding));
        }
        LazyRam::new(blocks)
    }

    /// From here on accesses to what has not arrived wait, and are asked for on `back`.
    pub(crate) fn listen(
        mut self,
        back: Arc<ReturnChannel>,
        handover: Arc<Handover>,
        section_id: u32,
    ) -> Result<Listening<'a>, MigrationError> {
        let lazy = Arc::new(self.memory()?);
        self.progress.watch_faults(lazy.shared_statistics());
        lazy.set_source(Some(Arc::clone(&back) as Arc<dyn PageSource>));
        let Self { incoming, progress, .. } = self;
        let PostcopyIncoming { urgent, reconnect, failed, .. } = incoming;
        let urgent = urgent.map(|urgent| handover.cancellable(&urgent));
        match FaultHandler::start(Arc::clone(&lazy), failed) {
            Ok(handler) => Ok(Listening {
                lazy,
                handler,
                urgent,
                reconnect,
                back,
                handover,
                section_id,
                progress,
            }),
            Err(error) => {
                // The guest stays at the source.
                lazy.abandon();
                Err(error)
            }
        }
    }
}

/// Gives back what is there of pages that are still to come. All at once, by what there is, since
/// there may be as many ranges to come as pages, and the guest stands still.
fn discard_stale(block: &MigrationBlock, outstanding: &PageBitmap) -> Result<(), MigrationError> {
    let mut stale = Vec::new();
    if let Some(used) = block.used() {
        let looked = block.for_each_data(used, |data| {
            stale.extend(outstanding.runs(pages_touched(data)).map(bytes_of));
        });
        looked.map_err(MigrationError::memory(block.id(), "look for stale pages"))?;
    }
    for range in stale {
        let given = block.discard(range);
        given.map_err(MigrationError::memory(block.id(), "discard stale pages"))?;
    }
    Ok(())
}
