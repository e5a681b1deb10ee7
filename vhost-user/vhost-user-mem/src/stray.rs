//! Sweeps of memory that the guest uses without having plugged it.
//!
//! A sweep goes through the region in parts. In each it takes the place of a guest request at the gate:
//! none is executed meanwhile, and once a ring was stopped, or memory changes, nothing is discarded
//! any more, since from then on a front-end may bring memory that belongs to a state to come.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use management_api::Event;
use parking_lot::{Condvar, Mutex};
use thiserror::Error;
use virtio_mem::controller::SweepRefused;

use crate::confinement;
use crate::service::Service;

/// Bytes of the region that are swept while the guest's requests wait.
const PART: u64 = 1 << 30;

/// Why a sweep ended early.
#[derive(Debug, Error)]
pub enum NotSwept {
    /// No queue is served.
    #[error("the guest does not run, and its memory may belong to a state that is still to come")]
    Stopped,
    /// The device refused.
    #[error(transparent)]
    Refused(#[from] SweepRefused),
}

impl Service {
    /// Discards what the guest has in unplugged memory, and tells of it. Bytes that the host held.
    ///
    /// # Errors
    ///
    /// When the guest does not run, migration is active, or memory cannot be discarded. What was swept
    /// before is told of nevertheless.
    pub fn sweep(&self) -> Result<u64, NotSwept> {
        let region = self.controller().geometry().section();
        let part = PART.max(self.controller().geometry().block_size());
        let (mut swept, mut outcome) = (0, Ok(()));
        for section in region.into_iter().flat_map(|region| region.chunks(part)) {
            let Some(_inside) = self.gate().enter_if_open().filter(|_| self.resize().runs()) else {
                outcome = Err(NotSwept::Stopped);
                break;
            };
            match self.controller().sweep_stray(section) {
                Ok(held) => swept += held,
                Err(error) => {
                    outcome = Err(error.into());
                    break;
                }
            }
        }
        if swept != 0 {
            self.metrics().stray(swept);
            tracing::warn!(swept, "discarded what the guest had in unplugged memory");
            self.tell(Event::Stray(swept));
        }
        outcome.map(|()| swept)
    }
}

/// Sweeps again and again, until it is dropped.
pub(crate) struct Sweeper {
    end: Arc<(Mutex<bool>, Condvar)>,
}

impl Sweeper {
    /// Sweeps each time that `interval` has passed.
    ///
    /// # Errors
    ///
    /// When there is no thread to be had.
    pub(crate) fn start(service: Arc<Service>, interval: Duration) -> io::Result<Self> {
        let end = Arc::new((Mutex::new(false), Condvar::new()));
        let theirs = Arc::clone(&end);
        thread::Builder::new().name(confinement::SWEEP.into()).spawn(move || {
            sandbox::confine_thread(confinement::SWEEP);
            let (ended, changed) = &*theirs;
            while !has_ended(ended, changed, interval) {
                // What keeps it from sweeping now may be over the next time.
                if let Err(NotSwept::Refused(SweepRefused::Memory(error))) = service.sweep() {
                    tracing::error!(%error, "cannot sweep unplugged memory");
                }
            }
        })?;
        Ok(Self { end })
    }
}

/// Waits for the end, for this long at most.
fn has_ended(ended: &Mutex<bool>, changed: &Condvar, interval: Duration) -> bool {
    let mut ended = ended.lock();
    changed.wait_while_for(&mut ended, |ended| !*ended, interval);
    *ended
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        *self.end.0.lock() = true;
        self.end.1.notify_all();
    }
}
