//! A store that counts what it does not take.

use std::io;
use std::sync::Arc;

use virtio_mem::controller::{StateRecord, StateStore};

use super::Metrics;

/// Another store, whose errors are counted.
pub struct CountedStore {
    store: Box<dyn StateStore>,
    metrics: Arc<Metrics>,
}

impl CountedStore {
    /// Counts the errors of `store`.
    pub fn new(store: Box<dyn StateStore>, metrics: Arc<Metrics>) -> Self {
        Self { store, metrics }
    }

    fn count(&self, done: &io::Result<()>) {
        if done.is_err() {
            self.metrics.state_file_error();
        }
    }
}

impl StateStore for CountedStore {
    fn commit(&mut self, record: &StateRecord<'_>) -> io::Result<()> {
        let done = self.store.commit(record);
        self.count(&done);
        done
    }

    fn mark_answered(&mut self) -> io::Result<()> {
        let done = self.store.mark_answered();
        self.count(&done);
        done
    }
}
