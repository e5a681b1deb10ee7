//! The gate that every guest request passes.

use parking_lot::{Condvar, Mutex};

/// Lets one guest request in at a time, and none while it is closed.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    busy: bool,
    /// How many want it closed.
    closed: usize,
}

/// Proof of being the one request inside.
#[derive(Debug)]
pub struct Inside<'a>(&'a Gate);

impl Gate {
    /// Waits until the gate is open and nobody is inside.
    pub fn enter(&self) -> Inside<'_> {
        let mut state = self.state.lock();
        self.changed.wait_while(&mut state, |state| state.busy || state.closed != 0);
        state.busy = true;
        Inside(self)
    }

    /// Closes the gate and waits until nobody is inside. Every call needs one of
    /// [`open`](Self::open).
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closed += 1;
        self.changed.wait_while(&mut state, |state| state.busy);
    }

    /// Takes back one [`close`](Self::close).
    pub fn open(&self) {
        let mut state = self.state.lock();
        state.closed = state.closed.saturating_sub(1);
        self.changed.notify_all();
    }

    /// Waits until whoever is inside now has left.
    pub fn drain(&self) {
        self.close();
        self.open();
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.state.lock().busy = false;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    #[test]
    fn close_waits_for_the_one_inside_and_keeps_the_next_out() {
        let gate = Gate::default();
        let entered = AtomicBool::new(false);
        let first = gate.enter();
        std::thread::scope(|scope| {
            let closer = scope.spawn(|| gate.close());
            std::thread::sleep(Duration::from_millis(20));
            assert!(!closer.is_finished());
            drop(first);
            closer.join().unwrap();
            scope.spawn(|| {
                drop(gate.enter());
                entered.store(true, Ordering::SeqCst);
            });
            std::thread::sleep(Duration::from_millis(20));
            assert!(!entered.load(Ordering::SeqCst));
            gate.open();
        });
        assert!(entered.load(Ordering::SeqCst));
    }
}
