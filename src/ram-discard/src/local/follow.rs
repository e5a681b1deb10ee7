//! A listener that follows block state from the moment at which it was frozen.

use std::sync::Arc;

use parking_lot::Mutex;

use super::{LocalFreeze, Shared};
use crate::{
    ExtentSet, Follow, Freeze, FreezeFor, FreezeLost, ListenerId, Listeners, OfRegion,
    RamDiscardListener, Section,
};

/// What the listener was told is discarded, and what was when it was registered.
type Told = Arc<Mutex<ExtentSet<OfRegion>>>;

/// A listener that follows.
pub(super) struct LocalFollow {
    shared: Arc<Shared>,
    purpose: FreezeFor,
    /// None of a region without bytes.
    id: Option<ListenerId>,
    told: Told,
}

impl LocalFollow {
    /// Registers `listener`, which knows of `discarded`, without telling it what is populated.
    pub(super) fn register(
        shared: &Arc<Shared>,
        listeners: &mut Listeners,
        purpose: FreezeFor,
        discarded: Vec<Section>,
        listener: Box<dyn RamDiscardListener>,
    ) -> Self {
        let told: Told = Arc::new(Mutex::new(discarded.into_iter().collect()));
        let noting = Box::new(Noting { listener, discarded: Arc::clone(&told) });
        // Nothing that it could refuse.
        let id = Section::new(0, shared.region_size)
            .and_then(|region| listeners.add(region, noting, &[]).ok());
        Self { shared: Arc::clone(shared), purpose, id, told }
    }
}

impl Follow for LocalFollow {
    fn check(&self) -> Result<(), FreezeLost> {
        let inner = self.shared.inner.lock();
        match inner.is_discarded_exactly(self.told.lock().iter()) {
            true => Ok(()),
            false => Err(unannounced()),
        }
    }

    fn freeze(&mut self) -> Result<(Vec<Section>, Box<dyn Freeze>), FreezeLost> {
        let mut transaction = self.shared.begin();
        let listener = self.id.take().and_then(|id| transaction.inner.listeners.remove(id));
        let same = transaction.inner.is_discarded_exactly(self.told.lock().iter());
        let frozen = same.then(|| LocalFreeze::begin(&self.shared, &mut transaction, self.purpose));
        drop(transaction);
        // Not under the manager's lock, which it may ask for.
        drop(listener);
        let (discarded, freeze) = frozen.ok_or_else(unannounced)?;
        Ok((discarded, Box::new(freeze)))
    }

    fn end(&mut self) {
        let Some(id) = self.id.take() else { return };
        let removed = self.shared.inner.lock().listeners.remove(id);
        drop(removed);
    }
}

fn unannounced() -> FreezeLost {
    FreezeLost("a source changed what is discarded without a word".to_owned())
}

/// Notes what a listener is told.
struct Noting {
    listener: Box<dyn RamDiscardListener>,
    discarded: Told,
}

impl RamDiscardListener for Noting {
    fn name(&self) -> &str {
        self.listener.name()
    }

    fn notify_populate(&mut self, section: Section) -> Result<(), String> {
        self.listener.notify_populate(section)?;
        self.discarded.lock().remove(section);
        Ok(())
    }

    fn notify_discard(&mut self, section: Section) {
        self.listener.notify_discard(section);
        self.discarded.lock().insert(section);
    }

    fn notify_populate_all(&mut self, sections: &[Section]) -> Result<(), (Section, String)> {
        self.listener.notify_populate_all(sections)?;
        let mut discarded = self.discarded.lock();
        sections.iter().for_each(|&section| discarded.remove(section));
        Ok(())
    }

    fn notify_discard_all(&mut self, sections: &[Section]) {
        self.listener.notify_discard_all(sections);
        let mut discarded = self.discarded.lock();
        sections.iter().for_each(|&section| discarded.insert(section));
    }

    fn notify_change_ended(&mut self) {
        self.listener.notify_change_ended();
    }

    fn notify_lost(&mut self, reason: &str) {
        self.listener.notify_lost(reason);
    }
}
