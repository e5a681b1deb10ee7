//! Listeners for tests.

use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use crate::{MemoryState, RamDiscardListener, Section};

/// A call: whose it was, whether to populate, and what.
pub type Call = (&'static str, bool, Section);

/// The calls that several listeners write down, in the order in which they were told.
#[derive(Clone, Debug, Default)]
pub struct Calls(Arc<Mutex<Vec<Call>>>);

impl Calls {
    /// All that was written down.
    pub fn lock(&self) -> MutexGuard<'_, Vec<Call>> {
        self.0.lock()
    }

    /// What was written down since the last time.
    pub fn take(&self) -> Vec<Call> {
        std::mem::take(&mut *self.0.lock())
    }
}

/// Writes down what it is told, and refuses what overlaps a range.
#[derive(Debug)]
pub struct Recorder {
    name: &'static str,
    calls: Calls,
    refuses: Option<(Section, &'static str)>,
}

impl Recorder {
    /// One that refuses nothing.
    pub fn boxed(name: &'static str, calls: &Calls) -> Box<Self> {
        Box::new(Self { name, calls: calls.clone(), refuses: None })
    }

    /// One that refuses what overlaps `section`, for that reason.
    pub fn refusing(
        name: &'static str,
        calls: &Calls,
        section: Section,
        reason: &'static str,
    ) -> Box<Self> {
        Box::new(Self { name, calls: calls.clone(), refuses: Some((section, reason)) })
    }
}

impl RamDiscardListener for Recorder {
    fn name(&self) -> &str {
        self.name
    }

    fn notify_populate(&mut self, section: Section) -> Result<(), String> {
        if let Some((refused, reason)) = self.refuses
            && refused.overlaps(section)
        {
            return Err(reason.to_owned());
        }
        self.calls.0.lock().push((self.name, true, section));
        Ok(())
    }

    fn notify_discard(&mut self, section: Section) {
        self.calls.0.lock().push((self.name, false, section));
    }
}

/// What a listener was told of each granule.
#[derive(Debug)]
struct Told {
    granule: u64,
    populated: Vec<bool>,
    /// Granules that were told to be what they were already.
    twice: u64,
}

/// Knows of each granule of a region what it was told last, and counts what it is told twice.
#[derive(Clone, Debug)]
pub struct Exact(Arc<Mutex<Told>>);

impl Exact {
    /// Of a region of so many granules, each of `granule` bytes. Copies share what they were told.
    pub fn new(nr_granules: usize, granule: u64) -> Self {
        Self(Arc::new(Mutex::new(Told { granule, populated: vec![false; nr_granules], twice: 0 })))
    }

    /// The granules that are populated by what it was told, as maximal ascending sections.
    pub fn populated(&self) -> Vec<Section> {
        let Told { granule, populated, .. } = &*self.0.lock();
        let mut sections: Vec<Section> = Vec::new();
        for index in (0..).zip(populated).filter_map(|(index, told)| told.then_some(index)) {
            let (start, end): (u64, u64) = (index * granule, (index + 1) * granule);
            let joined = sections.pop_if(|last| last.end() == start);
            let start = joined.map_or(start, Section::start);
            sections.extend(Section::from_bounds(start, end));
        }
        sections
    }

    /// How many granules it was told to be what they were already.
    pub fn told_twice(&self) -> u64 {
        self.0.lock().twice
    }

    fn tell(&self, section: Section, state: MemoryState) {
        let told = &mut *self.0.lock();
        for granule in section.start() / told.granule..section.end() / told.granule {
            let populated = state.is_populated();
            let was = std::mem::replace(&mut told.populated[granule as usize], populated);
            told.twice += u64::from(was == populated);
        }
    }
}

impl RamDiscardListener for Exact {
    fn name(&self) -> &str {
        "exact"
    }

    fn notify_populate(&mut self, section: Section) -> Result<(), String> {
        self.tell(section, MemoryState::Populated);
        Ok(())
    }

    fn notify_discard(&mut self, section: Section) {
        self.tell(section, MemoryState::Discarded);
    }
}
