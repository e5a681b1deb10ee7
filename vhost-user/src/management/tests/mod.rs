//! Tests of the API over a real socket.
#![allow(dead_code, unused_imports)]

mod fake;

pub(crate) use fake::{Fake, device};
