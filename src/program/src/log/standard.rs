//! Standard output and error, without the buffers, the locks and the panics of the standard library's.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// How long a line waits for room in stderr.
const SAY: Duration = Duration::from_secs(1);

/// What a pipe takes at once whenever it says that it takes anything (PIPE_BUF).
const AT_ONCE: usize = 4096;

/// Writes to standard error.
#[derive(Clone, Copy, Debug)]
pub struct Stderr;

/// Writes to standard output.
#[derive(Clone, Copy, Debug)]
pub struct Stdout;

impl io::Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_all(&io::stderr(), bytes).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl io::Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_all(&io::stdout(), bytes).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes a line to stderr on the spot. Errors are ignored, and a pipe that nothing is read from is waited for only
/// so long.
pub fn say(line: &[u8]) {
    let stderr = io::stderr();
    let deadline = Instant::now() + SAY;
    for part in line.chunks(AT_ONCE) {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or_default();
        let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
        if !matches!(poll(&mut fds, Some(&timeout)), Ok(1..)) || write_all(&stderr, part).is_err() {
            return;
        }
    }
}

fn write_all(to: &impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            // Another process that has the same pipe may have set it to not block.
            Err(Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::new(to, PollFlags::OUT)], None);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
