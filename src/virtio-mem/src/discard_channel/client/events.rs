//! The client's thread: events to listeners, answers to those who asked.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ram_discard::{ListenerId, Listeners, MemoryState, Section};
use vmstate::printable;

use super::requests::Answer;
use super::{Blocks, DeviceSizes, Shared};
use crate::device::{BlockBitmap, Geometry};
use crate::discard_channel::wire::{ClientMessage, ServerMessage};
use crate::discard_channel::{FrameReader, ReceiveError};

/// The most sections that the bitmap may lag behind: a guest's request is about one; more are a
/// state that is loaded.
const UNSETTLED_MAX: usize = 1 << 20;

/// What the listeners were told.
pub(super) struct View {
    pub(super) listeners: Listeners,
    /// What each of them was told. The bitmap is not asked for that again: it is the server's word, and
    /// a server that breaks the protocol may say one thing in events and another in the bitmap.
    told: Vec<Told>,
    /// Number of the last event.
    event: u64,
    /// The events that the bitmap may not show yet, ascending.
    unsettled: VecDeque<Event>,
}

/// What a listener has populated: what it was told to, and not to discard since.
pub(super) struct Told {
    id: ListenerId,
    section: Section,
    blocks: Blocks,
}

impl Told {
    /// As blocks.
    pub(super) fn blocks(&self) -> &BlockBitmap {
        &self.blocks.blocks
    }

    /// The maximal ranges, ascending.
    pub(super) fn populated<'a>(
        &'a self,
        geometry: &'a Geometry,
    ) -> impl Iterator<Item = Section> + 'a {
        self.blocks.ranges(geometry, self.section, MemoryState::Populated)
    }
}

#[derive(Clone, Copy)]
struct Event {
    number: u64,
    section: Section,
    state: MemoryState,
}

impl View {
    pub(super) fn new(event: u64) -> Self {
        let (listeners, told) = (Listeners::default(), Vec::new());
        Self { listeners, told, event, unsettled: VecDeque::new() }
    }

    /// Takes note of what a new listener was told: all of `blocks` that is in its section.
    pub(super) fn told(&mut self, id: ListenerId, section: Section, blocks: Blocks) {
        self.told.push(Told { id, section, blocks });
    }

    /// Forgets what a listener was told.
    pub(super) fn take_told(&mut self, id: ListenerId) -> Option<Told> {
        let index = self.told.iter().position(|told| told.id == id)?;
        Some(self.told.remove(index))
    }

    /// Calls `mark` with what the listeners were told after the event that a copy of the bitmap
    /// shows. A discard that the bitmap shows early is only marked again.
    pub(super) fn overlay(&self, shown: u64, mut mark: impl FnMut(Section, MemoryState)) {
        let later = self.unsettled.iter().filter(|event| event.number > shown);
        later.for_each(|event| mark(event.section, event.state));
    }

    fn note(&mut self, number: u64, sections: &[Section], state: MemoryState, shown: u64) {
        while self.unsettled.front().is_some_and(|first| first.number <= shown) {
            self.unsettled.pop_front();
        }
        let events = sections.iter().map(|&section| Event { number, section, state });
        self.unsettled.extend(events);
    }
}

/// Without the thread there is no connection, also when a listener has panicked on it.
struct EndOfReader<'a>(&'a Shared);

impl Drop for EndOfReader<'_> {
    fn drop(&mut self) {
        let lost = self.0.lose("the thread that reads events has ended");
        // A listener that registers from here on fails, so none is missed. When this side has closed
        // the connection none is to be told, and a listener may be the one that did.
        if !self.0.closing.load(Ordering::Acquire) {
            self.0.view.lock().listeners.lost(&lost.0);
        }
    }
}

impl Shared {
    /// Reads until the connection ends.
    pub(super) fn run(self: Arc<Self>, mut frames: FrameReader) {
        let _end = EndOfReader(&self);
        let reason = loop {
            let handled = match frames.next(&self.stream) {
                Ok(message) => self.handle(message),
                Err(error @ ReceiveError::Wire(_)) => {
                    Err(format!("the server broke the protocol: {error}"))
                }
                Err(error) => Err(error.to_string()),
            };
            if let Err(reason) = handled {
                break reason;
            }
        };
        self.lose(&reason);
    }

    fn handle(&self, message: ServerMessage) -> Result<(), String> {
        let answer = |id, answer| {
            let wanted = self.requests.answer(id, answer);
            if wanted { Ok(()) } else { Err(format!("an answer to request {id}, which is none")) }
        };
        match message {
            ServerMessage::Populate { event, sections } => {
                self.event(event, &sections, MemoryState::Populated)
            }
            ServerMessage::Discard { event, sections } => {
                self.event(event, &sections, MemoryState::Discarded)
            }
            ServerMessage::Done { id } => answer(id, Answer::Done),
            ServerMessage::Frozen { id, freeze, event, expiry_ms } => {
                let expiry = Duration::from_millis(expiry_ms.into());
                answer(id, Answer::Frozen { freeze, event, expiry })
            }
            ServerMessage::Thawed { freeze } => {
                self.freezes.ended(freeze);
                Ok(())
            }
            ServerMessage::Failed { id, reason } => answer(id, Answer::Failed(printable(&reason))),
            ServerMessage::Sizes { id, usable_region_size, plugged_size, requested_size } => {
                let sizes = DeviceSizes { usable_region_size, plugged_size, requested_size };
                answer(id, Answer::Sizes(sizes))
            }
            ServerMessage::Goodbye { reason, .. } => {
                Err(format!("the server said: {}", printable(&reason)))
            }
            ServerMessage::Welcome(_) => Err("a second welcome".to_owned()),
        }
    }

    fn event(&self, number: u64, sections: &[Section], state: MemoryState) -> Result<(), String> {
        let aligned = |at: u64| at.is_multiple_of(self.geometry.block_size());
        let are_blocks = |section: &Section| {
            section.end() <= self.geometry.region_size()
                && aligned(section.start())
                && aligned(section.len())
        };
        if let Some(wrong) = sections.iter().find(|section| !are_blocks(section)) {
            return Err(format!("event {number} is about {wrong}, which are not whole blocks"));
        }
        let mut view = self.view.lock();
        // What was on its way when this side ended the connection counts for nothing.
        self.requests.check().map_err(|lost| lost.0)?;
        if number <= view.event {
            return Err(format!("event {number} after event {}", view.event));
        }
        if view.unsettled.len() + sections.len() > UNSETTLED_MAX {
            return Err("the bitmap lags behind too many events".to_owned());
        }
        if let Some(contradiction) = self.contradiction(&view, sections, state) {
            return Err(format!("event {number} {contradiction}"));
        }
        view.event = number;
        let refused = match state {
            MemoryState::Populated => view.listeners.populate_all(sections).err(),
            MemoryState::Discarded => {
                view.listeners.discard_all(sections);
                None
            }
        };
        let answer = match refused {
            None => {
                view.note(number, sections, state, self.bitmap.event());
                for told in &mut view.told {
                    let sections = sections.iter();
                    sections.for_each(|&section| self.mark(&mut told.blocks, section, state));
                }
                ClientMessage::Ack { event: number }
            }
            // Listeners that had populated it have discarded it again; the server does not ask for it.
            Some(refused) => ClientMessage::Refuse { event: number, reason: refused.to_string() },
        };
        // Sent with the view locked: what is done after it is after the event.
        self.send(&answer).map_err(|lost| lost.0)
    }

    /// How an event contradicts itself, what listeners were told before, or the bitmap. A block is
    /// populated once and then discarded once, and the bitmap shows it populated only in between.
    fn contradiction(
        &self,
        view: &View,
        sections: &[Section],
        state: MemoryState,
    ) -> Option<String> {
        let mut sorted = sections.to_vec();
        sorted.sort_unstable_by_key(|section| section.start());
        if let Some(pair) = sorted.windows(2).find(|pair| pair[1].start() < pair[0].end()) {
            return Some(format!("is about parts of {} twice", pair[1]));
        }
        let stays = |section: &&Section| {
            view.told.iter().any(|told| {
                let part = told.section.intersection(**section);
                part.is_some_and(|part| !told.blocks.all(self.blocks_of(part), state.opposite()))
            })
        };
        if let Some(section) = sections.iter().find(stays) {
            return Some(match state {
                MemoryState::Populated => {
                    format!("populates {section}, of which a listener has populated something")
                }
                MemoryState::Discarded => {
                    format!("discards {section}, of which a listener has not populated everything")
                }
            });
        }
        if state == MemoryState::Discarded {
            return None;
        }
        // The bitmap shows a populate later than it is told, and a discard before the next event.
        let shown = |section: &&Section| {
            let blocks = self.blocks_of(**section);
            let snapshot = self.bitmap.try_copy(blocks.clone());
            snapshot
                .is_some_and(|snapshot| !Blocks::from(snapshot).all(blocks, MemoryState::Discarded))
        };
        let section = sections.iter().find(shown)?;
        Some(format!("populates {section}, of which the bitmap shows something populated"))
    }
}
