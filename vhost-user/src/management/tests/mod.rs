//! Tests of the API over a real socket.

mod fake;

pub(crate) use fake::{Fake, device};
