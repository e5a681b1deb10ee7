//! What a migration stream in a file holds, or the files of a snapshot.

mod firecracker;
mod json;
#[cfg(test)]
mod tests;
mod text;

use std::fs::File;
use std::path::{Path, PathBuf};

use migration::inspect;
use migration::stream::Command;
use vmem_pager::firecracker::state_file::StateFile;

use super::{Console, Failure};

/// Prints what is in a file; with memory files, in a snapshot of Firecracker's, of which it is the state. What could be read of a damaged one is printed before the error.
pub(super) fn run(
    path: &Path,
    memory: &[PathBuf],
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    if !memory.is_empty() {
        return firecracker::run(path, memory, console);
    }
    let unreadable = |source| Failure::Unreadable { path: path.to_owned(), source };
    let file = File::open(path).map_err(unreadable)?;
    // Reading a directory would give an error without a reason; a pipe has no end to look at.
    if !file.metadata().map_err(unreadable)?.is_file() {
        return Err(unreadable(std::io::Error::other("not a file")));
    }
    if StateFile::read(path).is_ok_and(|state| state.is_whole) {
        return Err(Failure::NoMemory(path.to_owned()));
    }
    let mut inspection = inspect::inspect(file);
    let error = inspection.error.take();
    let message = error.as_ref().map(ToString::to_string);
    console.show(&json::inspection(path, &inspection, message.as_deref()), || {
        text::inspection(path, &inspection)
    })?;
    match error {
        Some(source) => Err(Failure::Damaged { path: path.to_owned(), source: Box::new(source) }),
        None => Ok(()),
    }
}

/// A command in QEMU's words, with what it says.
fn command_words(command: &Command) -> (&'static str, String) {
    let none = String::new();
    match command {
        Command::OpenReturnPath => ("OPEN_RETURN_PATH", none),
        Command::Ping(value) => ("PING", value.to_string()),
        Command::PostcopyAdvise(None) => ("POSTCOPY_ADVISE", none),
        Command::PostcopyAdvise(Some(sizes)) => {
            ("POSTCOPY_ADVISE", format!("{:#x} {}", sizes.page_sizes, sizes.target_page_size))
        }
        Command::PostcopyListen => ("POSTCOPY_LISTEN", none),
        Command::PostcopyRun => ("POSTCOPY_RUN", none),
        Command::PostcopyRamDiscard { block, ranges } => {
            ("POSTCOPY_RAM_DISCARD", format!("{block}{}", ranges_words(ranges.iter().copied())))
        }
        Command::Packaged { len } => ("PACKAGED", format!("{len} bytes")),
        Command::PostcopyResume => ("POSTCOPY_RESUME", none),
        Command::RecvBitmap { block } => ("RECV_BITMAP", block.clone()),
        Command::SwitchoverStart => ("SWITCHOVER_START", none),
        Command::BlockState(change) => {
            let kind = if change.state.is_populated() { "populate" } else { "discard" };
            let ranges =
                ranges_words(change.ranges.iter().map(|range| (range.start(), range.len())));
            ("BLOCK_STATE", format!("{} {kind} {}{ranges}", change.number, change.block))
        }
    }
}

/// Ranges of a block, each with a space before it.
fn ranges_words(ranges: impl Iterator<Item = (u64, u64)>) -> String {
    ranges.map(|(start, len)| format!(" {start:#x}+{len:#x}")).collect()
}

/// The name of the way in which pages are laid out.
fn layout(inspection: &inspect::Inspection) -> &'static str {
    use migration::stream::CAPABILITY_MAPPED_RAM;
    let mapped = inspection.configuration.has(CAPABILITY_MAPPED_RAM);
    if mapped { CAPABILITY_MAPPED_RAM } else { "plain" }
}

/// Bytes in hexadecimal.
fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
