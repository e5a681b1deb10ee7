//! Tests of the relay and the notifier.

mod exchange;
mod harness;
mod log;
mod malformed;
mod notifier;
mod postcopy;
mod real_crate;
mod rings;
