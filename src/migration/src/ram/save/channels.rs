//! Pages that go over channels of their own.

use std::sync::Arc;

use super::{HostPages, RamSave, SHORT_PAGES};
use crate::channel::Sink;
use crate::error::MigrationError;
use crate::page_bitmap::bytes_of;
use crate::progress::{Counters, Progress};
use crate::ram::changes::Piece;
use crate::ram::channels::Stage;
use crate::ram::channels::senders::{Pages, Senders};
use crate::stream::{PACKET_PAGES, TARGET_PAGE_SIZE, put_end_of_section};

/// The channels of a source.
pub(super) type SaveChannels = Stage<Senders>;

impl SaveChannels {
    pub(super) fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }

    pub(super) fn start(&mut self, progress: &Arc<Progress>) -> Result<(), MigrationError> {
        self.start_by(|channels, agreed| Senders::start(channels, agreed, progress))
    }

    /// Dirty pages were collected.
    pub(super) fn round_ended(&mut self) {
        if let Self::Started(senders) = self {
            senders.round_ended();
        }
    }

    /// Ends the threads, wherever they are.
    pub(super) fn end(&mut self) {
        if !self.is_none() {
            *self = Self::Ended;
        }
    }

    pub(super) fn is_started(&self) -> bool {
        matches!(self, Self::Started(_))
    }

    fn started(&mut self) -> Result<&mut Senders, MigrationError> {
        match self {
            Self::Started(senders) => Ok(senders),
            _ => Err(MigrationError::Unexpected("channels that were not started".to_owned())),
        }
    }
}

impl RamSave {
    /// As [`send`](Self::send). What is a page of zeros, and so costs next to nothing, is found out by the
    /// threads; all count as whole pages of the budget. What was put into the queues is written when this
    /// returns: what is under way would be beyond a limit of the bandwidth, in each window anew.
    pub(super) fn send_by_channels(
        &mut self,
        out: &mut dyn Sink,
        budget: u64,
        most: u64,
    ) -> Result<(), MigrationError> {
        self.fill_channels(out, budget, most)?;
        self.channels.started()?.drain(out.write_patience())?;
        self.flushed();
        self.end_of_section(out)
    }

    /// Sends all that is left, and waits until it is written.
    pub(super) fn send_last_by_channels(
        &mut self,
        out: &mut dyn Sink,
    ) -> Result<(), MigrationError> {
        self.fill_channels(out, u64::MAX, u64::MAX)?;
        self.finish_channels(out)
    }

    /// Ends a section with a barrier, and then the channels.
    pub(super) fn finish_channels(&mut self, out: &mut dyn Sink) -> Result<(), MigrationError> {
        self.channels_barrier(out)?;
        self.channels.started()?.finish(out.write_patience())?;
        self.flushed();
        self.end_of_section(out)?;
        self.channels.end();
        Ok(())
    }

    /// All pages so far are in their places before anything that follows is.
    pub(super) fn channels_barrier(&mut self, out: &mut dyn Sink) -> Result<(), MigrationError> {
        self.channels.started()?.barrier(out)?;
        self.blocks.iter_mut().for_each(|block| block.unsynced.clear_all());
        self.barrier_due = false;
        Ok(())
    }

    fn fill_channels(
        &mut self,
        out: &mut dyn Sink,
        budget: u64,
        most: u64,
    ) -> Result<(), MigrationError> {
        if self.channels.started()?.needs_barrier() {
            self.channels_barrier(out)?;
        }
        let short = most != u64::MAX;
        let most = most.min(budget.div_ceil(TARGET_PAGE_SIZE));
        // Of one patience with all packets, so that channels which are hardly read end it.
        let patience = out.write_patience();
        let senders = self.channels.started()?;
        let mut watch = patience.map(|patience| senders.watch(patience));
        let (mut seen, mut look) = (0, SHORT_PAGES);
        while seen < most {
            let room = (PACKET_PAGES as u64).min(most - seen);
            let Some((count, pages)) = self.next_packet(room)? else { break };
            seen += count;
            self.channels.started()?.send(pages, &mut watch)?;
            if short && seen >= look {
                look = seen + SHORT_PAGES;
                if self.changes.as_ref().is_some_and(|changes| changes.holds_up()) {
                    break;
                }
            }
        }
        self.note_remaining();
        Ok(())
    }

    /// Dirty pages of one block, which are not dirty any more, and of which nothing is discarded.
    fn next_packet(&mut self, room: u64) -> Result<Option<(u64, Pages)>, MigrationError> {
        let changes = self.changes.clone();
        let mut state = changes.as_ref().map(|changes| changes.lock());
        if let Some(state) = &mut state {
            self.take_discards(state)?;
        }
        let mut packet: Option<(usize, u64, Vec<_>)> = None;
        loop {
            let count = packet.as_ref().map_or(0, |(_, count, _)| *count);
            if count == room {
                break;
            }
            let Some((index, pages)) = self.next_run(room - count, HostPages::Split) else { break };
            let (of, count, runs) = packet.get_or_insert((index, 0, Vec::new()));
            if *of != index {
                self.cursor = (index, pages.start);
                break;
            }
            let block = &mut self.blocks[index];
            block.clear_before_read(&pages)?;
            block.dirty.clear_range(pages.clone());
            block.unsynced.set_range(pages.clone());
            if let Some(state) = &mut state {
                state.gathered(Piece { block: index, range: bytes_of(pages.clone()) });
            }
            *count += pages.end - pages.start;
            runs.push(pages);
        }
        let pages = packet.map(|(index, count, runs)| {
            let changes = self.changes.clone().map(|changes| (changes, index));
            (count, Pages { block: Arc::clone(&self.blocks[index].block), runs, changes })
        });
        Ok(pages)
    }

    pub(super) fn end_of_section(&mut self, out: &mut dyn Sink) -> Result<(), MigrationError> {
        out.count_elsewhere(self.channels.started()?.newly_written());
        let mut end = Vec::new();
        put_end_of_section(&mut end);
        out.write(&end).map_err(MigrationError::io("send pages"))?;
        Counters::set(&self.progress.counters.transferred, out.written());
        Ok(())
    }
}
