//! The listeners of a manager, in the order in which they registered.

use super::{ListenerId, PopulateRefused, RamDiscardListener};
use crate::{Section, try_all};

/// Listeners, each with the section it registered for: what every manager is made of, whether it has the
/// device or is told of it by another process.
#[derive(Default)]
pub struct Listeners {
    last_id: u64,
    registered: Vec<Registered>,
}

/// A listener and its section.
pub struct Registered {
    id: ListenerId,
    /// What it registered for.
    pub section: Section,
    /// The listener.
    pub listener: Box<dyn RamDiscardListener>,
}

impl Listeners {
    /// Tells a new listener of `populated`, which lies in its section, and adds it.
    ///
    /// # Errors
    ///
    /// When it refuses; it is then told to discard what it had accepted, in reverse.
    pub fn add(
        &mut self,
        section: Section,
        mut listener: Box<dyn RamDiscardListener>,
        populated: &[Section],
    ) -> Result<ListenerId, PopulateRefused> {
        try_all(
            &mut *listener,
            populated,
            |listener, &section| {
                listener.notify_populate(section).map_err(|reason| {
                    let listener = listener.name().to_owned();
                    PopulateRefused { listener, section, reason }
                })
            },
            |listener, &section| listener.notify_discard(section),
        )?;
        self.last_id += 1;
        let id = ListenerId(self.last_id);
        self.registered.push(Registered { id, section, listener });
        Ok(id)
    }

    /// Takes a listener out without telling it anything.
    pub fn remove(&mut self, id: ListenerId) -> Option<Registered> {
        let index = self.registered.iter().position(|registered| registered.id == id)?;
        Some(self.registered.remove(index))
    }

    /// Tells the listeners in order.
    ///
    /// # Errors
    ///
    /// When one refuses; those told before it are then told to discard, in reverse.
    pub fn populate(&mut self, section: Section) -> Result<(), PopulateRefused> {
        let all = 0..self.registered.len();
        try_all(
            &mut *self.registered,
            all,
            |registered, index| registered[index].populate(section),
            |registered, index| registered[index].discard(section),
        )
    }

    /// As [`populate`](Self::populate) of each of several sections, one after the other.
    ///
    /// # Errors
    ///
    /// As [`populate`](Self::populate); the sections before have then been discarded again, in reverse.
    pub fn populate_each(&mut self, sections: &[Section]) -> Result<(), PopulateRefused> {
        try_all(
            self,
            sections,
            |listeners, &section| listeners.populate(section),
            |listeners, &section| listeners.discard(section),
        )
    }

    /// Tells the listeners in reverse.
    pub fn discard(&mut self, section: Section) {
        for registered in self.registered.iter_mut().rev() {
            registered.discard(section);
        }
    }

    /// As [`populate`](Self::populate) of several sections of one change, in this order.
    ///
    /// # Errors
    ///
    /// As [`populate`](Self::populate).
    pub fn populate_all(&mut self, sections: &[Section]) -> Result<(), PopulateRefused> {
        let all = 0..self.registered.len();
        try_all(
            &mut *self.registered,
            all,
            |registered, index| registered[index].populate_all(sections),
            |registered, index| {
                let reversed: Vec<_> = sections.iter().rev().copied().collect();
                registered[index].discard_all(&reversed);
            },
        )
    }

    /// As [`discard`](Self::discard) of several sections of one change, in this order: each listener
    /// is told of all of them before the next one is.
    pub fn discard_all(&mut self, sections: &[Section]) {
        for registered in self.registered.iter_mut().rev() {
            registered.discard_all(sections);
        }
    }

    /// Tells the listeners that a change has ended.
    pub fn change_ended(&mut self) {
        for registered in &mut self.registered {
            registered.listener.notify_change_ended();
        }
    }

    /// Tells the listeners, in reverse, that they will be told nothing any more.
    pub fn lost(&mut self, reason: &str) {
        for registered in self.registered.iter_mut().rev() {
            registered.listener.notify_lost(reason);
        }
    }
}

impl Registered {
    /// What of the sections the listener registered for.
    fn parts(&self, sections: &[Section]) -> Vec<Section> {
        sections.iter().filter_map(|&section| self.section.intersection(section)).collect()
    }

    fn populate(&mut self, section: Section) -> Result<(), PopulateRefused> {
        let Some(section) = self.section.intersection(section) else { return Ok(()) };
        let told = self.listener.notify_populate(section);
        told.map_err(|reason| self.refused(section, reason))
    }

    fn populate_all(&mut self, sections: &[Section]) -> Result<(), PopulateRefused> {
        let told = self.listener.notify_populate_all(&self.parts(sections));
        told.map_err(|(section, reason)| self.refused(section, reason))
    }

    fn refused(&self, section: Section, reason: String) -> PopulateRefused {
        PopulateRefused { listener: self.listener.name().to_owned(), section, reason }
    }

    fn discard_all(&mut self, sections: &[Section]) {
        let ranges = self.parts(sections);
        if !ranges.is_empty() {
            self.listener.notify_discard_all(&ranges);
        }
    }

    fn discard(&mut self, section: Section) {
        if let Some(range) = self.section.intersection(section) {
            self.listener.notify_discard(range);
        }
    }
}
