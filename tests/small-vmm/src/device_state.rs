//! The back-end's state, saved and loaded over a pipe as front-ends do it for migration.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::thread;

use crate::connection::Error;
use crate::frontend::Frontend;

/// In the reply to `SET_DEVICE_STATE_FD`: the front-end's descriptor is used.
const OUR_FD: u64 = 0x100;

/// Saves the state of a back-end whose rings are stopped; `None` when it refuses or fails.
///
/// # Errors
///
/// When the connection or the pipe fails.
pub fn save(frontend: &Frontend) -> Result<Option<Vec<u8>>, Error> {
    let (mut reader, writer) = io::pipe()?;
    let (reply, _) = frontend.set_device_state_fd(false, writer.as_fd())?;
    drop(writer);
    if reply != OUR_FD {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes)?;
    Ok((frontend.check_device_state()? == 0).then_some(bytes))
}

/// Loads a state into a back-end whose rings are stopped; whether it took it over.
///
/// # Errors
///
/// When the connection fails.
pub fn load(frontend: &Frontend, bytes: &[u8]) -> Result<bool, Error> {
    let (reader, mut writer) = io::pipe()?;
    let (reply, _) = frontend.set_device_state_fd(true, reader.as_fd())?;
    drop(reader);
    if reply != OUR_FD {
        return Ok(false);
    }
    thread::scope(|scope| {
        // A back-end that has seen enough closes its end, and says so when it is asked.
        scope.spawn(move || {
            let _ = writer.write_all(bytes);
        });
        Ok(frontend.check_device_state()? == 0)
    })
}
