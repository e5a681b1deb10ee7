//! The part of a process that is counted.

use std::hint::black_box;

/// What `--toggle-collect` is given to find [`collected`] by: its name as it is in the symbol table,
/// which does not depend on what callgrind knows of Rust's names, and as callgrind may show it.
pub const TOGGLE: [&str; 2] = ["*7counted9collected*", "*counted::collected*"];

/// Does the work, which callgrind counts; nothing outside is.
pub fn counted<R>(work: impl FnOnce() -> R) -> R {
    let mut work = Some(work);
    let mut result = None;
    collected(&mut || result = work.take().map(|work| work()));
    result.expect("the work was done")
}

/// One function for whatever is counted.
#[inline(never)]
fn collected(work: &mut dyn FnMut()) {
    work();
    // A call at the very end would be a jump, by which callgrind could not tell that this returns.
    black_box(work);
}
