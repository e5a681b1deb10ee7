//! What must hold, looked at all the time, and more of it when all is quiet.

mod device;
mod memory;
mod process;
mod quiet;

use std::sync::{Arc, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::world::World;
pub(super) use quiet::quiet;

/// Between two looks.
const STEP: Duration = Duration::from_millis(120);

/// Looks at all that must hold at any time.
pub(super) fn watch(world: &Arc<World>) -> std::io::Result<JoinHandle<()>> {
    let world = Arc::clone(world);
    thread::Builder::new().name("invariants".to_owned()).spawn(move || {
        let mut sizes = device::Sizes::default();
        while !world.journal.is_over() {
            memory::look(&world);
            process::look(&world);
            {
                let _settled = world.settled.read().unwrap_or_else(PoisonError::into_inner);
                sizes.look(&world);
                memory::look_at_blocks(&world);
            }
            world.journal.count("looks at the invariants", 1);
            thread::sleep(STEP);
        }
    })
}
