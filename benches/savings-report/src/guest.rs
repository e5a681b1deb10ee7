//! A guest that writes what it has touched, over and over, at a given rate.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use migration::lazy::HandlerFailed;
use migration::{Guest, MigrationError};
use ram_discard::memory::HostMapping;

use crate::case::Case;
use crate::units::PAGE;

/// Between two batches of writes.
const TICK: Duration = Duration::from_millis(2);

/// The guest of one side. It does not run until it is told to.
pub struct Writer {
    state: Arc<State>,
    vcpu: Mutex<Option<JoinHandle<()>>>,
}

struct State {
    mapping: Arc<HostMapping>,
    case: Case,
    /// Held while a batch is written, so that stopping waits for its end.
    running: Mutex<bool>,
    end: AtomicBool,
}

impl Writer {
    /// A guest that has `mapping`.
    pub fn new(mapping: &Arc<HostMapping>, case: &Case) -> Arc<Self> {
        let state = State {
            mapping: Arc::clone(mapping),
            case: *case,
            running: Mutex::new(false),
            end: AtomicBool::new(false),
        };
        Arc::new(Self { state: Arc::new(state), vcpu: Mutex::default() })
    }

    fn set_running(&self, runs: bool) {
        *self.state.running.lock().unwrap_or_else(PoisonError::into_inner) = runs;
    }
}

impl State {
    /// Writes as many pages as are due, each with a number that is never 0.
    fn write(&self) {
        let (in_block, touched) = (self.case.touched_in_block() / PAGE, self.case.touched() / PAGE);
        if touched == 0 || self.case.dirty_rate == 0 {
            return;
        }
        let (mut written, mut due, mut last) = (0u64, 0.0, Instant::now());
        while !self.end.load(Ordering::Relaxed) {
            std::thread::sleep(TICK);
            let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            let passed = last.elapsed();
            last = Instant::now();
            if !*running {
                continue;
            }
            // What was missed while it waited for a page is not made up for.
            let passed = passed.min(10 * TICK);
            due += passed.as_secs_f64() * self.case.dirty_rate as f64 / PAGE as f64;
            while due >= 1.0 && !self.end.load(Ordering::Relaxed) {
                let page = written % touched;
                let offset = page / in_block * Case::BLOCK + page % in_block * PAGE;
                written += 1;
                self.mapping.write(offset, &written.to_le_bytes());
                due -= 1.0;
            }
        }
    }
}

impl Guest for Writer {
    fn stop(&self) -> Result<(), String> {
        self.set_running(false);
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        self.set_running(true);
        let mut vcpu = self.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        if vcpu.is_none() {
            let state = Arc::clone(&self.state);
            *vcpu = Some(std::thread::spawn(move || state.write()));
        }
        Ok(())
    }
}

impl HandlerFailed for Writer {
    fn handler_failed(&self, error: &MigrationError) {
        // A vCPU that waits for a page waits for ever: there is no report to be made of that.
        eprintln!("savings-report: memory cannot follow the guest: {error}");
        std::process::exit(2);
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.state.end.store(true, Ordering::Relaxed);
        let vcpu = self.vcpu.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(vcpu) = vcpu
            && vcpu.join().is_err()
        {
            eprintln!("savings-report: a guest's vCPU panicked");
        }
    }
}
