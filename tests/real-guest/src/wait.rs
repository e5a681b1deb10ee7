//! Waiting for others by asking again and again, with a bound.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// For programs on this host.
pub const SHORT: Duration = Duration::from_secs(20);
/// For the guest, which is slow without KVM.
pub const LONG: Duration = Duration::from_secs(120);

/// Between two questions, where it does not matter.
const PERIOD: Duration = Duration::from_millis(50);

/// Asks until there is an answer; the error names `what` when there is none in time.
pub fn until<T>(
    what: &str,
    patience: Duration,
    ask: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    until_every(PERIOD, what, patience, ask)
}

/// The same with a period of its own, for those who measure how long it takes.
pub fn until_every<T>(
    period: Duration,
    what: &str,
    patience: Duration,
    mut ask: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if Instant::now() > deadline {
            bail!("waited {} s for {what}", patience.as_secs());
        }
        thread::sleep(period);
    }
}
