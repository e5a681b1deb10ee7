//! The destination from LISTEN on: a thread takes the memory while another loads devices and lets
//! the guest run, both of which may need pages of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use vmstate::wire::{WireRead, WireReader};

use super::handover::Handover;
use super::received::no_longer_outstanding;
use super::return_channel::ReturnChannel;
use super::{Channels, Reconnect};
use crate::channel::Channel;
use crate::error::MigrationError;
use crate::lazy::{FaultHandler, LazyRam, PageSource};
use crate::loader::out_of_place;
use crate::page_bitmap::PageBitmap;
use crate::postcopy::page_placer::PagePlacer;
use crate::progress::{Counters, Progress, Status};
use crate::stream::{Command, Record, ReturnMessage, read_footer, read_record};

/// Memory that arrives, and on which accesses wait.
///
/// Dropped before all has arrived, on whatever way out, it leaves those accesses waiting and tells
/// the VMM ([`HandlerFailed`](crate::lazy::HandlerFailed)), unless the guest was given
/// up before it was taken.
pub(crate) struct Listening<'a> {
    pub(super) lazy: Arc<LazyRam>,
    pub(super) handler: FaultHandler,
    pub(super) urgent: Option<Channel>,
    pub(super) reconnect: Box<dyn Reconnect + 'a>,
    pub(super) back: Arc<ReturnChannel>,
    pub(super) handover: Arc<Handover>,
    pub(super) section_id: u32,
    pub(super) progress: Arc<Progress>,
}

/// Ends a wait of the other thread for this one, should it unwind.
struct Watch<'a> {
    lazy: &'a LazyRam,
    handler: &'a FaultHandler,
    handover: &'a Handover,
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        self.handover.give_up();
        if self.handover.is_lost() {
            let pages = self.lazy.outstanding();
            self.handler.fail(&MigrationError::Outstanding { pages });
        } else {
            self.lazy.abandon();
        }
    }
}

impl Listening<'_> {
    /// The memory.
    pub(crate) fn memory(&self) -> &Arc<LazyRam> {
        &self.lazy
    }

    /// Takes what arrives until everything has, over as many channels as it takes. The stream goes on
    /// in `reader`; until the guest is taken, any error leaves it at the source.
    pub(crate) fn take(
        &mut self,
        main: Channel,
        reader: WireReader<Channel>,
    ) -> Result<(), MigrationError> {
        let Self { lazy, handler, urgent, reconnect, back, handover, section_id, progress } = self;
        let (lazy, handover, section_id) = (&*lazy, &**handover, *section_id);
        let _watch = Watch { lazy, handler, handover };
        let mut channels = Channels { main, urgent: urgent.take() };
        let mut back = Arc::clone(back);
        let mut reader = Some(reader);
        let encrypted = channels.main.is_encrypted();
        loop {
            let session = Session { lazy, back: &back, handover, section_id, progress };
            let taken = match handover.read_from(&channels) {
                true => channels
                    .check_encryption(encrypted)
                    .and_then(|()| session.take_all(&channels, reader.take())),
                false => Err(MigrationError::ChannelClosed("it was given up")),
            };
            let error = match taken {
                Ok(()) if handover.all_came(progress) => MigrationError::Paused,
                Ok(()) => break,
                Err(error) => error,
            };
            // Faults continue to be answered where nothing has to come for them.
            lazy.set_source(None);
            if !handover.broken() {
                if !handover.is_lost() {
                    // A device that is being loaded may wait for a page. The guest stays where it is.
                    lazy.abandon();
                    back.refuse(&error);
                }
                channels.shutdown();
                return Err(error);
            }
            channels.shutdown();
            // The guest is here, so that nothing but this loop lets it be paused again.
            progress.steering.postcopy_over(None);
            let paused = progress.steering.take_paused();
            let error = if paused { MigrationError::Paused } else { error };
            progress.set_status(Status::PostcopyPaused);
            tracing::warn!(%error, "the channel is broken; accesses to outstanding memory wait");
            match reconnect.reconnect(&error) {
                Some(new) => channels = new.uncancellable(),
                // It would only have told the source so.
                None if lazy.outstanding() == 0 => {
                    tracing::warn!("the source was not told that everything has arrived");
                    finish(lazy);
                    return Ok(());
                }
                None => {
                    handler.fail(&error);
                    return Err(error);
                }
            }
            let new = ReturnChannel::new(channels.main.clone_handle());
            back = Arc::new(new.continuing(&back));
            // A source that says nothing is left as soon as it is asked for.
            progress.steering.postcopy_over(Some(channels.clone_handles()));
            progress.set_status(Status::PostcopyRecover);
        }
        lazy.set_source(None);
        if !handover.wait_for_claim() {
            return Err(MigrationError::ChannelClosed("the guest was about to be taken"));
        }
        // Before anything else: what remains to be done here is nothing that the guest needs, and the
        // source must not wait for it. It may well have gone.
        if let Err(error) = back.send(&ReturnMessage::Shut(0)) {
            tracing::debug!(%error, "cannot tell the source that everything has arrived");
        }
        finish(lazy);
        Ok(())
    }
}

/// All memory is here: faults are the kernel's again, and discarded ranges are swept.
fn finish(lazy: &LazyRam) {
    if let Err(error) = lazy.finish() {
        // Whatever is still registered ends with the value.
        tracing::warn!(%error, "cannot end waiting for memory that has arrived");
    }
}

/// The pages that arrive over one pair of channels.
struct Session<'a> {
    lazy: &'a Arc<LazyRam>,
    back: &'a Arc<ReturnChannel>,
    handover: &'a Handover,
    section_id: u32,
    progress: &'a Progress,
}

/// Ends a channel on every way out, a panic as well, since the thread that reads it is waited for.
struct End(Option<Channel>);

impl Drop for End {
    fn drop(&mut self) {
        if let Some(channel) = &self.0 {
            channel.shutdown();
        }
    }
}

impl Session<'_> {
    /// With a `reader`, goes on where that is; without, the source resumes.
    fn take_all(
        &self,
        channels: &Channels,
        reader: Option<WireReader<Channel>>,
    ) -> Result<(), MigrationError> {
        let resumes = || WireReader::with_capacity(channels.main.clone_handle(), 0);
        let mut reader = reader.unwrap_or_else(resumes);
        std::thread::scope(|scope| {
            let taking = channels.urgent.as_ref().map(|urgent| {
                let (urgent, main) = (urgent.clone_handle(), channels.main.clone_handle());
                scope.spawn(move || {
                    let mut main = End(Some(main));
                    let result = self.take_urgent(urgent);
                    if result.is_ok() {
                        main.0 = None;
                    }
                    result
                })
            });
            let mut urgent = End(channels.urgent.as_ref().map(Channel::clone_handle));
            let result = self.take_main(&mut reader);
            // At the end of the stream there may still be pages on the other channel, which ends
            // by itself then.
            if result.is_ok() && self.lazy.outstanding() != 0 {
                urgent.0 = None;
            }
            drop(urgent);
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
    fn take_main(&self, reader: &mut WireReader<Channel>) -> Result<(), MigrationError> {
        let waits = || self.handover.may_wait(self.progress);
        let mut placer = PagePlacer::new(&waits);
        // By block: what the source was told to be outstanding before it resumes.
        let mut told = BTreeMap::new();
        loop {
            let at = reader.offset();
            if reader.is_at_end().map_err(MigrationError::io("read memory that arrives"))? {
                return Err(MigrationError::ChannelClosed("memory was arriving"));
            }
            match read_record(reader)? {
                Record::Continued { section_id, .. } if section_id == self.section_id => {
                    placer.place_section(self.lazy, reader)?;
                    read_footer(reader, section_id)?;
                }
                Record::Command(Command::PostcopyRun) if self.handover.run_came() => {}
                Record::Command(Command::RecvBitmap { block }) => {
                    let found = self.lazy.find(&block);
                    let outstanding = found.map(|index| self.lazy.outstanding_of(index));
                    self.back.send_received(&block, outstanding.as_ref(), at)?;
                    told.extend(found.zip(outstanding));
                }
                Record::Command(Command::PostcopyResume) => {
                    self.back.send(&ReturnMessage::ResumeAck)?;
                    Counters::add(&self.progress.counters.postcopy_recoveries, 1);
                    self.handover.resumed(self.progress);
                    self.lazy.set_source(Some(Arc::clone(self.back) as Arc<dyn PageSource>));
                    let asked = self.lazy.request_again();
                    asked.map_err(MigrationError::io("ask for pages again"))?;
                    // From here on the source is told of each discard by itself.
                    self.tell_discarded(std::mem::take(&mut told));
                }
                Record::Command(Command::Ping(value)) => {
                    self.back.send(&ReturnMessage::Pong(value))?;
                }
                Record::Eof if self.handover.may_run() => return Ok(()),
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

    /// Tells what has been discarded since the source was `told` what is outstanding.
    fn tell_discarded(&self, told: BTreeMap<usize, PageBitmap>) {
        for (block, told) in told {
            let now = self.lazy.outstanding_of(block);
            for range in no_longer_outstanding(told, &now) {
                self.back.discarded(self.lazy, block, range);
            }
        }
    }

    /// Takes the pages that were asked for, until the channel ends.
    fn take_urgent(&self, channel: Channel) -> Result<(), MigrationError> {
        let mut reader = WireReader::new(channel);
        let waits = || self.handover.may_wait(self.progress);
        let mut placer = PagePlacer::new(&waits);
        while !reader.is_at_end().map_err(MigrationError::io("read pages"))? {
            if placer.place_page(self.lazy, &mut reader)? {
                return Ok(());
            }
        }
        Ok(())
    }
}
