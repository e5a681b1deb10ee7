//! What needs `unsafe`. This is the only folder of the package with such code.

#![allow(
    unsafe_code,
    reason = "a handler of SIGSYS, and calls of libc and the kernel that no crate here wraps; each block says why"
)]

mod refusal;
pub(crate) mod user;

pub(crate) use refusal::{has_action, logs_actions, name_refused, say};
