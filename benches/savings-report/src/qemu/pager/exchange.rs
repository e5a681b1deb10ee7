//! Requests for pages, and how long their answers take: of the pager, and of a thread that knows no pages.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use migration::inspect::inspect;
use migration::stream::ReturnMessage;
use real_guest::machine::Parts;
use serde::{Deserialize, Serialize};

use super::process::Pager;
use crate::units::PAGE;

/// Pages that are asked for, and how far they lie apart: nothing is read ahead so far.
const REQUESTS: u64 = 4000;
const STRIDE: u64 = 17;
/// Bits of a page's header: a page of zeros, one with content, one of the block before.
const ZEROS: u64 = 0x02;
const CONTENT: u64 = 0x08;
const CONTINUED: u64 = 0x20;
/// Nothing takes longer.
const PATIENCE: Duration = Duration::from_secs(30);
/// For the pager to see that its page was read.
const SEEN: Duration = Duration::from_millis(200);

/// How long requests took to be answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Exchange {
    /// By the pager; otherwise by a thread that sends a page at once.
    pub pager: bool,
    /// Median and 99th percentile, microseconds.
    pub took: [f64; 2],
}

/// Both, one after the other, over sockets in `dir`.
pub fn both(parts: &Parts<'_>, image: &Path, dir: &Path) -> Result<[Exchange; 2]> {
    Ok([
        Exchange { pager: false, took: bare()? },
        Exchange { pager: true, took: pager(parts, image, dir)? },
    ])
}

/// An answer with content is read to its end; whether it had any.
fn read_answer(from: &mut UnixStream, bytes: &mut [u8]) -> Result<bool> {
    let mut word = [0; 8];
    from.read_exact(&mut word)?;
    let word = u64::from_be_bytes(word);
    if word & CONTINUED == 0 {
        let mut len = [0];
        from.read_exact(&mut len)?;
        from.read_exact(&mut bytes[..usize::from(len[0])])?;
    }
    match word & (CONTENT | ZEROS) {
        CONTENT => from.read_exact(bytes)?,
        _ => from.read_exact(&mut bytes[..1])?,
    }
    Ok(word & CONTENT != 0)
}

/// Asks on one stream, reads on another, one page after the other.
fn ask(to: &mut UnixStream, from: &mut UnixStream, block: &str) -> Result<[f64; 2]> {
    let mut page = vec![0; PAGE as usize];
    let mut took = Vec::new();
    for request in 0..REQUESTS {
        let mut bytes = Vec::new();
        let block = (request == 0).then(|| block.to_owned());
        let (start, len) = (request * STRIDE * PAGE, PAGE as u32);
        ReturnMessage::RequestPages { block, start, len }.put(&mut bytes);
        let begun = Instant::now();
        to.write_all(&bytes)?;
        if read_answer(from, &mut page)? {
            took.push(begun.elapsed().as_secs_f64() * 1e6);
        }
    }
    ensure!(took.len() as u64 > REQUESTS / 4, "{} of {REQUESTS} pages have content", took.len());
    took.sort_by(f64::total_cmp);
    let share = |percent| took[(took.len() - 1) * percent / 100];
    Ok([share(50), share(99)])
}

fn bare() -> Result<[f64; 2]> {
    let (near, mut far) = UnixStream::pair()?;
    let answering = thread::spawn(move || -> std::io::Result<()> {
        let mut request = [0; 256];
        let mut answer = vec![7; 8 + PAGE as usize];
        answer[..8].copy_from_slice(&(CONTENT | CONTINUED).to_be_bytes());
        // A request is written at once, and the next one when this one is answered.
        while far.read(&mut request)? != 0 {
            far.write_all(&answer)?;
        }
        Ok(())
    });
    near.set_read_timeout(Some(PATIENCE))?;
    let took = ask(&mut near.try_clone()?, &mut near.try_clone()?, "region");
    drop(near);
    answering.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    took
}

/// Poses as a QEMU that has postcopy-preempt, and reads nothing of what it is not asked for.
fn pager(parts: &Parts<'_>, image: &Path, dir: &Path) -> Result<[f64; 2]> {
    let blocks = inspect(File::open(image)?).blocks;
    let block = blocks.iter().max_by_key(|block| block.normal).context("no RAM in the image")?;
    let socket = dir.join("exchange.sock");
    let listener = UnixListener::bind(&socket)?;
    let mut words = vec!["restore".to_owned(), "--bandwidth".to_owned(), "1".to_owned()];
    for (option, path) in [("--socket", socket.as_path()), ("--image", image)] {
        words.extend([option.to_owned(), path.display().to_string()]);
    }
    let pager = Pager::start(parts, &words)?;
    let mut main = listener.accept()?.0;
    let mut unread = main.try_clone()?;
    thread::spawn(move || {
        let mut bytes = vec![0; 1 << 16];
        while unread.read(&mut bytes).is_ok_and(|read| read != 0) {}
    });
    let mut say = |pong| {
        let mut bytes = Vec::new();
        ReturnMessage::Pong(pong).put(&mut bytes);
        main.write_all(&bytes)
    };
    // Connected; about to listen for faults, for which the second connection is waited for; the guest is there.
    say(1)?;
    say(5)?;
    let mut urgent = listener.accept()?.0;
    urgent.set_read_timeout(Some(PATIENCE))?;
    say(4)?;
    say(0x42)?;
    // The page with which the pager sees that this is read.
    read_answer(&mut urgent, &mut vec![0; PAGE as usize])?;
    thread::sleep(SEEN);
    let took = ask(&mut main, &mut urgent, &block.id);
    drop(pager);
    std::fs::remove_file(&socket)?;
    took
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_is_answered_and_timed() {
        let [median, most] = bare().unwrap();
        assert!(0.0 < median && median <= most);
    }
}
