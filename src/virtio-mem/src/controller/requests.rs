//! What a guest request does.

use std::io;
use std::ops::Range;

use ram_discard::{GpaRange, RamDiscardSource, Section, Transaction};

use super::served::Sweep;
use super::{BlockUpdate, Busy, JournalUpdate, MemController, ResetError};
use crate::device::{BlockSpan, Change, Request, Response, Verdict, VirtioMem};

impl MemController {
    /// Whether all of a guest-physical range may be used by the guest: what lies in the region is
    /// plugged. Looked up before the device reads or writes a guest buffer, since touching
    /// unplugged memory would allocate it.
    pub fn is_usable(&self, gpa_range: GpaRange) -> bool {
        let in_region = self.geometry.region().and_then(|region| region.intersection(gpa_range));
        let section = in_region.and_then(|range| range.section(self.geometry.addr()));
        section.is_none_or(|section| self.served.is_populated(section))
    }

    /// Has an answer written to guest-physical `buffers`, unless they may no longer be used: a system
    /// reset may have taken their memory since the request was read, and what is written to it then
    /// would be held by nothing. No reset comes in between.
    pub fn write_answer<T>(&self, buffers: &[GpaRange], write: impl FnOnce() -> T) -> Option<T> {
        let _no_reset = self.served.answers.read();
        buffers.iter().all(|&buffer| self.is_usable(buffer)).then(write)
    }

    /// The guest-physical range that a request would take away from the guest, if any.
    pub fn unplugged_by(&self, request: Request) -> Option<GpaRange> {
        if !matches!(request, Request::Unplug(_) | Request::UnplugAll) {
            return None;
        }
        match self.state().device.evaluate(request) {
            Verdict::Change(Change::UnplugAll) => self.geometry.region(),
            Verdict::Change(Change::Unplug(blocks)) => {
                self.geometry.section_of(&blocks)?.gpa(self.geometry.addr())
            }
            Verdict::Change(Change::Plug(_)) | Verdict::Answer(_) => None,
        }
    }

    /// Executes a guest request. The answer is given to the guest, and [`answered`] called then.
    ///
    /// [`answered`]: Self::answered
    pub fn execute(&self, request: Request) -> Response {
        // What changes nothing does not wait for a change under way. An error may be a request
        // whose work was done before, which only the transaction can tell.
        if let Verdict::Answer(response) = self.state().device.evaluate(request)
            && response != Response::Error
        {
            return response;
        }
        let mut transaction = self.manager.begin();
        let mut state = self.state();
        if state.sweep == Sweep::WhenRunning && self.memory.is_mapped() {
            // A guest that asks runs, and what it plugs must be zeros. Memory that is mapped later is swept
            // then.
            drop(state);
            self.sweep_or(Sweep::WhenMapped);
            state = self.state();
        }
        if state.journal == Some(request) && state.device.is_done(request) {
            drop(state);
            return self.answer_again(request);
        }
        let change = match state.device.evaluate(request) {
            Verdict::Answer(response) => return response,
            Verdict::Change(change) => change,
        };
        let frozen = transaction.is_frozen();
        let nothing_plugged = state.device.plugged_size() == 0;
        drop(state);
        let done = match change {
            Change::UnplugAll if nothing_plugged => {
                self.commit_or(&change, JournalUpdate::Forget).map_err(Busy::from)
            }
            _ if frozen => Err(Busy::Frozen),
            Change::Plug(blocks) => self.plug(&mut transaction, request, blocks),
            Change::Unplug(blocks) => self.unplug(&mut transaction, request, blocks),
            Change::UnplugAll => self.unplug_all(&mut transaction).map_err(Busy::from),
        };
        done.map_or_else(|reason| self.busy(request, &reason), |()| Response::Ack)
    }

    /// Notes that the guest has the answer to the last request.
    pub fn answered(&self) {
        let mut state = self.state();
        if state.journal.take().is_some()
            && let Err(error) = state.store.mark_answered()
        {
            tracing::warn!(%error, "cannot note that a request was answered");
        }
    }

    /// Answers a request whose work was done by a process that could not answer it any more. Of an UNPLUG, that
    /// process may have been killed before the memory was discarded.
    fn answer_again(&self, request: Request) -> Response {
        let finished = match request {
            Request::Unplug(span) => self.discard_again(span),
            _ => Ok(()),
        };
        finished.map_or_else(|reason| self.busy(request, &reason), |()| Response::Ack)
    }

    fn discard_again(&self, span: BlockSpan) -> Result<(), Busy> {
        let offset = span.addr - self.geometry.addr();
        let len = u64::from(span.nb_blocks) * self.geometry.block_size();
        let Some(section) = Section::new(offset, len) else { return Ok(()) };
        self.memory.ready(section)?;
        self.memory.sweep(&[section]).map_err(Busy::Discard)
    }

    /// The section of `blocks`, whose memory is mapped and can be discarded.
    fn ready_section(&self, blocks: &Range<usize>) -> Result<Section, Busy> {
        let section = self.geometry.section_of(blocks);
        let section = section.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.memory.ready(section)?;
        Ok(section)
    }

    fn plug(
        &self,
        transaction: &mut Transaction<'_>,
        request: Request,
        blocks: Range<usize>,
    ) -> Result<(), Busy> {
        let section = self.ready_section(&blocks)?;
        transaction.notify_populate(self.source, section)?;
        self.commit_or(&Change::Plug(blocks), JournalUpdate::Record(request))
            .inspect_err(|_| transaction.notify_discard(self.source, section))?;
        Ok(())
    }

    fn unplug(
        &self,
        transaction: &mut Transaction<'_>,
        request: Request,
        blocks: Range<usize>,
    ) -> Result<(), Busy> {
        let section = self.ready_section(&blocks)?;
        self.commit_or(&Change::Unplug(blocks), JournalUpdate::Record(request))?;
        transaction.notify_discard(self.source, section);
        Ok(())
    }

    pub(super) fn unplug_all(&self, transaction: &mut Transaction<'_>) -> Result<(), ResetError> {
        let plugged = self.served.plugged_ranges();
        if self.memory.is_mapped() {
            plugged.iter().try_for_each(|&section| self.memory.ready(section))?;
        } else if let Some(&section) = plugged.first() {
            self.memory.ready(section)?;
        }
        self.commit_or(&Change::UnplugAll, JournalUpdate::Forget)?;
        transaction.notify_discard_all(self.source, &plugged);
        Ok(())
    }

    /// Saves a change and then makes it.
    pub(super) fn commit_or(&self, change: &Change, journal: JournalUpdate) -> io::Result<()> {
        let mut state = self.state();
        let mut record = state.record(BlockUpdate::Change(change), journal);
        if *change == Change::UnplugAll {
            record.usable_region_size = state.device.usable_after_unplug_all();
        }
        state.save(&record)?;
        let of = |device: &VirtioMem| (device.plugged_size(), device.usable_region_size());
        let before = of(&state.device);
        state.device.apply(change);
        state.journal = match journal {
            JournalUpdate::Keep => state.journal,
            JournalUpdate::Forget => None,
            JournalUpdate::Record(request) => Some(request),
        };
        let after = of(&state.device);
        if before.0 != after.0 {
            state.tell(|observer| observer.plugged_size(after.0));
        }
        // VIRTIO 5.15.5.2: plugged_size is the one field that changes without a notification.
        if before.1 != after.1 {
            state.tell(|observer| observer.config_changed());
        }
        Ok(())
    }
}
