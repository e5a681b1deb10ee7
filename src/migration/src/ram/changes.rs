//! Changes of block state while memory is sent, between the thread of the device, which makes them, and that of
//! the engine, which sends.
//!
//! | the device | what it waits for | what the engine does |
//! | --- | --- | --- |
//! | populates | the destination's answer, for as long as [`Changes::new`] says | sends the change between two sections, tracks the range when it was accepted, and lets the device continue |
//! | discards | pages of the range that are on their way into the channel, for [`FLUSH_PATIENCE`] | takes the range out of what is to be sent before it looks for the next page, and sends the change after the section |
//!
//! How much is kept is bounded: one populate of a manager at a time, and discards by what is populated, since a
//! range is populated again only by the engine, which takes all discards before that.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};
use ram_discard::{ByteRange, ExtentSet, OfBlock, RamDiscardListener, Section};

use super::MigrationBlock;
use crate::channel::patience::deadline;
use crate::page_bitmap::{DiscardMask, pages_touched};

/// How long a discard waits for pages that were gathered to be written.
const FLUSH_PATIENCE: Duration = Duration::from_millis(100);

/// A range of one of the blocks that are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Index of the block.
    pub(super) block: usize,
    /// Bytes from its start.
    pub(super) range: ByteRange,
}

impl Piece {
    fn overlaps(&self, other: &Self) -> bool {
        self.block == other.block && self.range.overlaps(other.range)
    }
}

/// What may be changed now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Open,
    /// Block state is about to be frozen: nothing is populated any more.
    Closing,
    /// Nothing is sent any more: what changes is of no concern.
    Ended,
}

/// A populate that waits, or whose answer is still to come.
pub(super) struct Populate {
    pub(super) piece: Piece,
    ticket: u64,
    /// Once the change was sent.
    pub(super) number: Option<u32>,
    /// The device has been refused it already.
    pub(super) abandoned: bool,
    pub(super) result: Option<Result<(), String>>,
}

/// What the device and the engine share. Locked by the engine while it gathers pages, and by the device for
/// moments.
pub(super) struct Changes {
    state: Mutex<State>,
    changed: Condvar,
    patience: Duration,
    /// Of each block, what was discarded while pages of it waited to be read. Held while some are: memory that is
    /// gone cannot always be had again, and reading it would raise SIGBUS then.
    gone: RwLock<Vec<DiscardMask>>,
}

pub(super) struct State {
    phase: Phase,
    tickets: u64,
    /// Of each block, what was discarded since the engine looked last.
    discards: Vec<ExtentSet<OfBlock>>,
    pub(super) populates: Vec<Populate>,
    /// Pages that were gathered, and are not written yet.
    in_flight: Vec<Piece>,
    /// How many discards wait for them.
    waiting: usize,
    /// What was discarded while pages of it were in flight: reading them may have brought memory back.
    noted: Vec<Piece>,
}

impl Changes {
    /// Of so many blocks. A populate waits for the destination for `patience`.
    pub(super) fn new(nr_blocks: usize, patience: Duration) -> Self {
        let state = State {
            phase: Phase::Open,
            tickets: 0,
            discards: (0..nr_blocks).map(|_| ExtentSet::default()).collect(),
            populates: Vec::new(),
            in_flight: Vec::new(),
            waiting: 0,
            noted: Vec::new(),
        };
        let gone = RwLock::new(vec![DiscardMask::default(); nr_blocks]);
        Self { state: Mutex::new(state), changed: Condvar::new(), patience, gone }
    }

    /// The engine's look: nothing changes while it is held.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Lets those continue who wait for what the engine did.
    pub(super) fn tell(&self) {
        self.changed.notify_all();
    }

    /// Refuses all that would populate from now on, also what waits.
    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        if state.phase == Phase::Open {
            state.phase = Phase::Closing;
        }
        drop(state);
        self.tell();
    }

    /// Has nothing wait any more.
    pub(super) fn end(&self) {
        self.state.lock().phase = Phase::Ended;
        self.tell();
    }

    /// What was gathered is written, or never will be. Of what was discarded meanwhile nothing is held then.
    pub(super) fn flushed(&self, blocks: impl Fn(usize) -> Arc<MigrationBlock>) {
        let mut state = self.state.lock();
        if state.in_flight.is_empty() && state.noted.is_empty() {
            return;
        }
        state.in_flight.clear();
        if !state.noted.is_empty() {
            self.gone.write().fill(DiscardMask::default());
        }
        for Piece { block, range } in std::mem::take(&mut state.noted) {
            let block = blocks(block);
            if let Err(error) = block.sweep(range) {
                tracing::warn!(block = block.id(), %range, %error, "cannot discard what was read");
            }
        }
        drop(state);
        self.tell();
    }

    /// Has `read` look at pages of a block that were gathered, in `runs`, without what has been discarded since: of that
    /// nothing may be read any more.
    pub(super) fn read<T>(
        &self,
        block: usize,
        runs: &[Range<u64>],
        read: impl FnOnce(&[Range<u64>]) -> T,
    ) -> T {
        let gone = self.gone.read();
        let left = runs.iter().flat_map(|run| gone[block].populated(run.clone()));
        read(&left.collect::<Vec<_>>())
    }

    /// Whether a device waits for the engine to send a change, or to hear of one.
    pub(super) fn is_waited_for(&self) -> bool {
        self.state.lock().is_waited_for()
    }

    /// Waits until a device waits, or until `ended`, of which [`tell_ended`](Self::tell_ended) tells.
    #[cfg(test)]
    pub(super) fn wait_for_request(&self, ended: impl Fn() -> bool) {
        let mut state = self.state.lock();
        while !state.is_waited_for() && !ended() {
            let late = self.changed.wait_for(&mut state, crate::test_support::PATIENCE).timed_out();
            assert!(!late, "a request does not come");
        }
    }

    #[cfg(test)]
    pub(super) fn tell_ended(&self) {
        // Not between a look at it and the wait.
        drop(self.state.lock());
        self.tell();
    }

    /// As [`is_waited_for`](Self::is_waited_for), or for pages that are on their way.
    pub(super) fn holds_up(&self) -> bool {
        let state = self.state.lock();
        state.waiting != 0 || state.is_waited_for()
    }

    /// Whether the destination may still accept what was sent.
    pub(super) fn has_unanswered(&self) -> bool {
        self.state.lock().populates.iter().any(|populate| populate.number.is_some())
    }

    fn populate(&self, piece: Piece) -> Result<(), String> {
        let mut state = self.state.lock();
        match state.phase {
            Phase::Open => {}
            Phase::Closing => return Err(closing()),
            Phase::Ended => return Ok(()),
        }
        if state.noted.iter().any(|noted| noted.overlaps(&piece)) {
            return Err("pages of it that were sent before are still being read".to_owned());
        }
        if state.populates.iter().any(|other| other.piece.overlaps(&piece)) {
            return Err("the destination has not answered what was asked for before".to_owned());
        }
        state.tickets += 1;
        let ticket = state.tickets;
        let (number, abandoned, result) = (None, false, None);
        state.populates.push(Populate { piece, ticket, number, abandoned, result });
        #[cfg(test)]
        self.tell();
        let deadline = deadline(self.patience);
        loop {
            let index = state.populates.iter().position(|populate| populate.ticket == ticket);
            let Some(index) = index else { return Ok(()) };
            if let Some(result) = state.populates[index].result.take() {
                state.populates.remove(index);
                return result;
            }
            let refused = match state.phase {
                Phase::Ended => {
                    state.populates.remove(index);
                    return Ok(());
                }
                Phase::Closing => closing(),
                Phase::Open => {
                    if !self.changed.wait_until(&mut state, deadline).timed_out() {
                        continue;
                    }
                    let index = state.populates.iter().position(|other| other.ticket == ticket);
                    if index.is_none_or(|index| state.populates[index].result.is_some()) {
                        continue;
                    }
                    format!("the destination did not answer within {:?}", self.patience)
                }
            };
            let index = state.populates.iter().position(|populate| populate.ticket == ticket);
            if let Some(index) = index {
                if state.populates[index].number.is_none() {
                    state.populates.remove(index);
                } else {
                    state.populates[index].abandoned = true;
                }
            }
            return Err(refused);
        }
    }

    /// All `pieces` of one change, which waits for [`FLUSH_PATIENCE`] at most, however many there are.
    fn discard(&self, pieces: &[Piece]) {
        let mut state = self.state.lock();
        if state.phase == Phase::Ended {
            return;
        }
        pieces.iter().for_each(|piece| state.discards[piece.block].insert(piece.range));
        let deadline = Instant::now() + FLUSH_PATIENCE;
        state.waiting += 1;
        let mut left: Vec<Piece> = pieces.to_vec();
        loop {
            left.retain(|piece| state.is_in_flight(piece));
            if left.is_empty() || self.changed.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        left.retain(|piece| state.is_in_flight(piece));
        if !left.is_empty() {
            let mut gone = self.gone.write();
            left.iter().for_each(|piece| gone[piece.block].add(pages_touched(piece.range)));
        }
        state.noted.extend(left);
        state.waiting -= 1;
    }
}

impl State {
    fn is_in_flight(&self, piece: &Piece) -> bool {
        self.in_flight.iter().any(|page| page.overlaps(piece))
    }

    fn is_waited_for(&self) -> bool {
        let waits = |populate: &Populate| !populate.abandoned && populate.result.is_none();
        self.populates.iter().any(waits)
    }

    /// What was discarded of each block since the last time.
    pub(super) fn take_discards(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for (block, ranges) in self.discards.iter_mut().enumerate() {
            pieces.extend(ranges.iter().map(|range| Piece { block, range }));
            *ranges = ExtentSet::default();
        }
        pieces
    }

    /// Pages are gathered, to be written.
    pub(super) fn gathered(&mut self, piece: Piece) {
        self.in_flight.push(piece);
    }
}

fn closing() -> String {
    "the guest is about to be stopped, to be moved".to_owned()
}

/// Follows the block state of a block that is sent.
pub(super) struct Follower {
    changes: Arc<Changes>,
    /// Index of the block.
    block: usize,
    /// Where the region starts in it.
    start: u64,
    used: Option<ByteRange>,
}

impl Follower {
    /// Of block `index`, in which the region starts at `start`.
    pub(super) fn new(
        changes: &Arc<Changes>,
        index: usize,
        start: u64,
        block: &MigrationBlock,
    ) -> Self {
        Self { changes: Arc::clone(changes), block: index, start, used: block.used() }
    }

    /// What of `section` is in the block, and in use.
    fn piece(&self, section: Section) -> Option<Piece> {
        let range = section.in_block(self.start)?.intersection(self.used?)?;
        Some(Piece { block: self.block, range })
    }
}

impl RamDiscardListener for Follower {
    fn name(&self) -> &str {
        "migration"
    }

    fn notify_populate(&mut self, section: Section) -> Result<(), String> {
        self.piece(section).map_or(Ok(()), |piece| self.changes.populate(piece))
    }

    fn notify_discard(&mut self, section: Section) {
        self.notify_discard_all(&[section]);
    }

    fn notify_discard_all(&mut self, sections: &[Section]) {
        let pieces = sections.iter().filter_map(|&section| self.piece(section));
        self.changes.discard(&pieces.collect::<Vec<_>>());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_bitmap::bytes_of;
    use crate::test_support::{BLOCK, PAGE, Side, wait_until};

    #[test]
    fn all_that_one_change_discards_waits_once_for_pages_on_their_way() {
        let side = Side::new(&[0, 1, 2]);
        let block = Arc::clone(side.blocks.get("vmem0").unwrap());
        let changes = Arc::new(Changes::new(1, Duration::from_secs(60)));
        let pages = BLOCK / PAGE;
        for page in [0, pages, 2 * pages] {
            changes.lock().gathered(Piece { block: 0, range: bytes_of(page..page + 1) });
        }
        let mut follower = Follower::new(&changes, 0, 0, &block);
        let sections = [0, 1, 2].map(|block| Section::new(block * BLOCK, BLOCK).unwrap());
        std::thread::scope(|scope| {
            scope.spawn(|| follower.notify_discard_all(&[sections[2], sections[0]]));
            wait_until(|| changes.holds_up());
            let taken = changes.lock().take_discards();
            let ranges = [sections[0], sections[2]].map(|section| section.in_block(0).unwrap());
            assert_eq!(taken, ranges.map(|range| Piece { block: 0, range }));
            changes.flushed(|_| Arc::clone(&block));
        });
    }
}
