//! How a receiver with `memory_mode=postcopy` asks for pages: over a connection of its own, one at a time; first what
//! the guest touches, and in between all other pages of its boot memory, ascending in each range (the sweep).

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};

use super::frames::{self, Command, answer};

/// What the first bytes of the connection say.
const ROLE: [u8; 2] = [2, 0];

/// How pages are asked for.
#[derive(Clone, Debug, Default)]
pub struct Asking {
    /// Addresses that the guest touches before State is answered, instead of a device's touching the second page.
    pub before: Vec<u64>,
    /// Addresses that the guest touches while the sweep lasts, one between two of its pages.
    pub touches: Vec<u64>,
    /// The range that the sweep begins with.
    pub first_range: usize,
    /// What goes otherwise, once the guest runs.
    pub trap: Option<Trap>,
    /// The sweep is not done: the connection is left once the guest has touched what it touches.
    pub no_sweep: bool,
}

/// What goes otherwise than it should when pages are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// The guest discards a page while the sweep lasts, and touches it again.
    Balloon,
    /// A page that is no memory is asked for.
    Outside,
    /// An address that no page begins at is asked for.
    Unaligned,
    /// Another length than a page's is asked for.
    OddLength,
    /// Another command comes.
    Other,
    /// A command that there is not comes.
    Unknown,
    /// Half of a request comes, and the connection ends.
    Cut,
    /// Half of a request comes, and no more.
    Half,
    /// The sweep ends before it has begun, and so does the connection.
    Stop,
    /// Nothing is asked for any more, and the connection stays; until the other end closes it.
    Silent,
    /// Answers are not read.
    Unread,
    /// A page is asked for twice.
    Again,
}

/// A range of memory that is registered for faults.
#[derive(Debug)]
pub struct Range {
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Bytes of a page.
    pub page: u64,
    /// Where its bytes begin in the file.
    pub offset: u64,
    /// Its memory.
    pub file: File,
}

/// The connection.
#[derive(Debug)]
pub struct Faults {
    stream: UnixStream,
    ranges: Vec<Range>,
    how: Asking,
    served: BTreeSet<u64>,
    asked: u64,
    waited: Vec<Duration>,
}

impl Faults {
    /// Over a connection, of whose role is asked first; `None` when it is another one.
    pub fn new(mut stream: UnixStream, mut ranges: Vec<Range>, how: Asking) -> Option<Self> {
        let mut role = [0; 2];
        stream.read_exact(&mut role).ok()?;
        let first = how.first_range.min(ranges.len().saturating_sub(1));
        ranges.rotate_left(first);
        let (served, asked, waited) = (BTreeSet::new(), 0, Vec::new());
        (role == ROLE).then_some(Self { stream, ranges, how, served, asked, waited })
    }

    /// What is asked for before State is answered. Whether all of it was had.
    pub fn begin(&mut self) -> bool {
        let before = match &self.how.before[..] {
            [] => self.ranges.first().map(|range| range.gpa + range.page).into_iter().collect(),
            before => before.to_vec(),
        };
        before.into_iter().all(|gpa| self.touch(gpa))
    }

    /// The guest touches a page.
    fn touch(&mut self, gpa: u64) -> bool {
        let begun = Instant::now();
        let had = self.ask(gpa);
        self.waited.push(begun.elapsed());
        had
    }

    /// Asks for the page at an address, and looks whether it is there.
    fn ask(&mut self, gpa: u64) -> bool {
        let found =
            self.ranges.iter().find(|range| (range.gpa..range.gpa + range.size).contains(&gpa));
        let Range { gpa: base, page, offset, file, .. } = found.expect("an address of memory");
        let gpa = gpa / page * page;
        self.asked += 1;
        let mut answered = [0; frames::FRAME_LEN];
        let sent = self.stream.write_all(&fault(gpa, *page));
        if sent.is_err() || self.stream.read_exact(&mut answered).is_err() {
            return false;
        }
        if answered != answer(1, 0) {
            return false;
        }
        self.served.insert(gpa);
        // UFFDIO_CONTINUE of a hole is EFAULT. Of huge pages the file does not tell.
        let at = offset + gpa - base;
        *page != super::guest::PAGE || seek(file, SeekFrom::Data(at)).is_ok_and(|data| data == at)
    }

    /// Asks for every page that was not asked for; `false` when the VM has ended or the sweep is over for good.
    pub fn sweep(&mut self) -> bool {
        if let Some(trap) = self.how.trap
            && !self.spring(trap)
        {
            return false;
        }
        let mut touches = std::mem::take(&mut self.how.touches).into_iter();
        if self.how.no_sweep {
            return touches.all(|gpa| self.touch(gpa));
        }
        for range in 0..self.ranges.len() {
            let Range { gpa, size, page, .. } = self.ranges[range];
            for gpa in (gpa..gpa + size).step_by(page as usize) {
                if let Some(touched) = touches.next()
                    && !self.touch(touched)
                {
                    return false;
                }
                if !self.served.contains(&gpa) && !self.ask(gpa) {
                    return false;
                }
            }
        }
        true
    }

    /// How many pages were asked for, and how long the guest waited for each.
    pub fn end(self) -> (u64, Vec<Duration>) {
        (self.asked, self.waited)
    }

    /// Whether the sweep can begin after that.
    fn spring(&mut self, trap: Trap) -> bool {
        let Range { gpa, page, offset, .. } = self.ranges[0];
        let bytes = match trap {
            Trap::Balloon => {
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                return self.touch(gpa)
                    && fallocate(&self.ranges[0].file, hole, offset, page).is_ok()
                    && self.touch(gpa);
            }
            Trap::Again => return self.touch(gpa) && self.touch(gpa),
            Trap::Stop => return false,
            Trap::Silent => {
                frames::wait_for_end(&mut self.stream);
                return false;
            }
            Trap::Cut | Trap::Half => {
                let _ = self.stream.write_all(&fault(gpa, page)[..19]);
                if trap == Trap::Half {
                    frames::wait_for_end(&mut self.stream);
                }
                return false;
            }
            Trap::Unread => {
                // As much as the socket holds, and then some.
                while self.stream.write_all(&fault(gpa, page)).is_ok() {}
                return false;
            }
            Trap::Outside => fault(1 << 40, page),
            Trap::Unaligned => fault(gpa + 1, page),
            Trap::OddLength => fault(gpa, page + 1),
            Trap::Other => frames::request(Command::Start.number(), 0).to_vec(),
            Trap::Unknown => frames::request(77, 0).to_vec(),
        };
        let _ = self.stream.write_all(&bytes);
        // Asked for by a guest fault, anything but Ok ends the VM.
        frames::read_answer(&mut self.stream) == Some(true)
    }
}

fn fault(gpa: u64, len: u64) -> Vec<u8> {
    let mut bytes = frames::request(Command::PageFault.number(), 16).to_vec();
    bytes.extend_from_slice(&gpa.to_le_bytes());
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes
}
