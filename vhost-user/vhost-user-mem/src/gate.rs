//! The gate that every guest request passes.

use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// How often it is looked whether waiting is of any use.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

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
    /// Waits until the gate is open and no thread is inside.
    pub fn enter(&self) -> Inside<'_> {
        let mut state = self.state.lock();
        self.changed.wait_while(&mut state, |state| state.busy || state.closed != 0);
        state.busy = true;
        Inside(self)
    }

    /// Waits until no thread is inside; `None` when the gate is closed meanwhile.
    pub fn enter_if_open(&self) -> Option<Inside<'_>> {
        let mut state = self.state.lock();
        self.changed.wait_while(&mut state, |state| state.busy && state.closed == 0);
        if state.closed != 0 {
            return None;
        }
        state.busy = true;
        Some(Inside(self))
    }

    /// Closes the gate and waits until no thread is inside. Every call needs one of
    /// [`open`](Self::open).
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closed += 1;
        self.changed.wait_while(&mut state, |state| state.busy);
    }

    /// Closes the gate like [`close`](Self::close), but gives up when `hopeless` says so: then it
    /// is false, and the gate is as it was. A thread inside may wait for a page that only the
    /// front-end can bring.
    pub fn close_unless(&self, hopeless: &dyn Fn() -> bool) -> bool {
        let mut state = self.state.lock();
        state.closed += 1;
        while state.busy {
            self.changed.wait_for(&mut state, LOOK_AGAIN);
            if state.busy && hopeless() {
                state.closed = state.closed.saturating_sub(1);
                self.changed.notify_all();
                return false;
            }
        }
        true
    }

    /// Whether a request is inside.
    pub fn is_busy(&self) -> bool {
        self.state.lock().busy
    }

    /// Takes back one [`close`](Self::close).
    pub fn open(&self) {
        let mut state = self.state.lock();
        state.closed = state.closed.saturating_sub(1);
        self.changed.notify_all();
    }

    /// Waits until the threads that are inside now have left.
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

    #[test]
    fn who_enters_only_an_open_gate_does_not_wait_for_a_closed_one() {
        let gate = Gate::default();
        drop(gate.enter_if_open().unwrap());
        gate.close();
        assert!(gate.enter_if_open().is_none());
        gate.open();
        assert!(gate.enter_if_open().is_some());
    }

    #[test]
    fn waiting_ends_when_it_is_hopeless() {
        let gate = Gate::default();
        let inside = gate.enter();
        assert!(!gate.close_unless(&|| true));
        drop(inside);
        drop(gate.enter());
        assert!(gate.close_unless(&|| true));
    }

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
