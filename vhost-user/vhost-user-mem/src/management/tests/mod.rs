//! Tests of the API over a real socket.

mod fake;
mod http;
mod lists;
mod refusals;
mod resources;
mod strain;
mod stream;
mod unsaved;

pub(crate) use fake::{Fake, device};
