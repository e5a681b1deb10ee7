//! Tests of the API over a real socket.

mod http;
mod lists;
mod refusals;
mod resources;
mod strain;
mod stream;
mod unsaved;

use super::fake::{Fake, device};
