//! Calls to the device, which may block.

use std::sync::Arc;

use management_api::Event;
use tokio::sync::{Semaphore, broadcast};
use tokio::task::{JoinError, spawn_blocking};

use super::Management;

/// Calls under way at a time; those behind them wait with their connections.
pub(super) const CALLS: usize = 16;

/// Calls the device where blocking does no harm. All clones share the bound.
#[derive(Clone)]
pub(super) struct Caller {
    management: Arc<dyn Management>,
    calls: Arc<Semaphore>,
}

impl Caller {
    pub(super) fn new(management: Arc<dyn Management>) -> Self {
        Self { management, calls: Arc::new(Semaphore::new(CALLS)) }
    }

    /// A call that was begun runs to its end, also when its client has gone. So its place
    /// goes with it: clients that leave and come again do not make more of them.
    pub(super) async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn Management) -> T + Send + 'static,
    ) -> Result<T, JoinError> {
        let management = Arc::clone(&self.management);
        // Never closed, so that this cannot fail.
        let place = Arc::clone(&self.calls).acquire_owned().await;
        spawn_blocking(move || {
            let _place = place;
            call(&*management)
        })
        .await
    }

    /// Events from now on.
    pub(super) fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.management.subscribe()
    }
}
