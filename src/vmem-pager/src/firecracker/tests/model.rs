//! The states of pages, against a naive model of the kernel's side: any order of touches, discards, their reading
//! and their effect, of the background, of copies that stop half-way, of faults that are told twice or for nothing, and
//! of a memory file that is cut.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::sync::Arc;

use migration::lazy::vmm_faults::{Filled, MESSAGE_LEN, Stop};
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use proptest::prelude::*;
use ram_discard::memory::HostMapping;

use super::super::figures::Figures;
use super::super::fill::{Filling, Step, Uffd, Unplaced, Waiting};
use super::super::guest::Guest;
use super::super::memory_files::MemoryFiles;
use super::super::message::parse;
use super::super::order::Order;
use small_vmm::firecracker::PAGE;

use super::{Snapshot, content};
use crate::error::PagerError;
use crate::metrics::RunFigures;

const BASE: u64 = 0x10_0000;
const PAGES: u64 = 70;
const NOENT: i32 = 2;

/// What the kernel knows.
struct Kernel {
    /// The first bytes of pages that are there.
    pages: Vec<Option<u8>>,
    registered: Vec<bool>,
    faults: VecDeque<u64>,
    asleep: BTreeSet<u64>,
    /// Discards that were not read, and those that were and have had no effect yet.
    unread: VecDeque<(u64, u64)>,
    read: VecDeque<(u64, u64)>,
    /// Pages until the next copy stops half-way.
    stop_after: Option<u64>,
    /// What the guest must read; `None` while a discard is under way.
    expected: Vec<u8>,
}

impl Kernel {
    fn is_under_way(&self, page: u64) -> bool {
        self.unread.iter().chain(&self.read).any(|(start, end)| (*start..*end).contains(&page))
    }

    fn touch(&mut self, page: u64) {
        let (at, free) = (page as usize, !self.is_under_way(page));
        match self.pages[at] {
            Some(byte) if free => assert_eq!(byte, self.expected[at], "page {page}"),
            Some(_) => {}
            None if self.registered[at] => {
                if self.asleep.insert(page) {
                    self.faults.push_back(page);
                }
            }
            None => {
                self.pages[at] = Some(0);
                assert!(!free || self.expected[at] == 0, "page {page} is lost");
            }
        }
    }

    fn write(&mut self, page: u64, byte: u8) {
        if let Some(content) = &mut self.pages[page as usize] {
            *content = byte;
            self.expected[page as usize] = byte;
        }
    }

    /// The oldest discard that was read has its effect.
    fn discard(&mut self) {
        for page in self.read.pop_front().map_or(0..0, |(start, end)| start..end) {
            self.pages[page as usize] = None;
            self.expected[page as usize] = 0;
        }
    }

    fn wake(&mut self, address: u64, len: u64) {
        let pages = (address - BASE) / PAGE..(address + len - BASE) / PAGE;
        for page in self.asleep.clone().into_iter().filter(|page| pages.contains(page)) {
            self.faults.retain(|waits| *waits != page);
            self.asleep.remove(&page);
            self.touch(page);
        }
    }

    fn place(&mut self, address: u64, len: u64, bytes: Option<&[u8]>) -> io::Result<Filled> {
        if !self.unread.is_empty() || !self.read.is_empty() {
            return Ok(Filled { bytes: 0, stop: Stop::Busy });
        }
        let first = (address - BASE) / PAGE;
        for done in 0..len / PAGE {
            let (at, bytes_done) = ((first + done) as usize, done * PAGE);
            if !self.registered[at] {
                return Err(io::Error::from_raw_os_error(NOENT));
            }
            if self.pages[at].is_some() {
                return Ok(Filled { bytes: bytes_done, stop: Stop::Exists });
            }
            if self.stop_after.as_mut().is_some_and(|left| {
                *left = left.saturating_sub(1);
                *left == 0
            }) {
                self.stop_after = None;
                return Ok(Filled { bytes: bytes_done, stop: Stop::Busy });
            }
            self.pages[at] = Some(bytes.map_or(0, |bytes| bytes[bytes_done as usize]));
            self.wake(address + bytes_done, PAGE);
        }
        Ok(Filled { bytes: len, stop: Stop::Complete })
    }
}

struct Fake(Arc<Mutex<Kernel>>);

impl Uffd for Fake {
    fn read(&self, to: &HostMapping, offset: u64, room: usize) -> io::Result<usize> {
        let mut kernel = self.0.lock();
        // As the kernel does: faults first, also those that follow a discard.
        for index in 0..room {
            let mut message = [0; MESSAGE_LEN];
            if let Some(page) = kernel.faults.pop_front() {
                message[0] = 0x12;
                message[16..24].copy_from_slice(&(BASE + page * PAGE + 8).to_le_bytes());
            } else if let Some((start, end)) = kernel.unread.pop_front() {
                message[0] = 0x15;
                message[8..16].copy_from_slice(&(BASE + start * PAGE).to_le_bytes());
                message[16..24].copy_from_slice(&(BASE + end * PAGE).to_le_bytes());
                kernel.read.push_back((start, end));
            } else {
                return Ok(index);
            }
            to.write(offset + (index * MESSAGE_LEN) as u64, &message);
        }
        Ok(room)
    }

    fn copy(&self, address: u64, bytes: &[u8]) -> io::Result<Filled> {
        self.0.lock().place(address, bytes.len() as u64, Some(bytes))
    }

    fn zero(&self, address: u64, len: u64) -> io::Result<Filled> {
        self.0.lock().place(address, len, None)
    }

    fn wake(&self, address: u64, len: u64) -> io::Result<()> {
        self.0.lock().wake(address, len);
        Ok(())
    }

    fn unregister(&self, address: u64, len: u64) -> io::Result<()> {
        let mut kernel = self.0.lock();
        for page in (address - BASE) / PAGE..(address + len - BASE) / PAGE {
            kernel.registered[page as usize] = false;
        }
        kernel.wake(address, len);
        Ok(())
    }
}

/// What happens next.
#[derive(Clone, Copy, Debug)]
enum Op {
    Touch(u64),
    Write(u64, u8),
    Discard(u64, u64),
    Effect,
    StopAfter(u64),
    Events,
    Background,
    /// The pager dies, and another one takes over.
    Restart,
    /// A fault is told that was told before, or of a page that is there.
    FaultAgain(u64),
    /// The memory file is cut to so many pages.
    Cut(u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..PAGES).prop_map(Op::Touch),
        2 => (0..PAGES, any::<u8>()).prop_map(|(page, byte)| Op::Write(page, byte)),
        3 => (0..PAGES, 1..9u64).prop_map(|(page, len)| Op::Discard(page, (page + len).min(PAGES))),
        4 => Just(Op::Effect),
        1 => (1..20u64).prop_map(Op::StopAfter),
        6 => Just(Op::Events),
        2 => Just(Op::Background),
        1 => Just(Op::Restart),
        2 => (0..PAGES).prop_map(Op::FaultAgain),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn a_guest_reads_the_file_or_what_it_wrote_or_zeros_after_a_discard(
        data in prop::collection::btree_set(0..PAGES, 0..60),
        ops in prop::collection::vec(op(), 0..120),
        cut in prop::option::weighted(0.3, (any::<prop::sample::Index>(), 1..PAGES)),
    ) {
        let mut ops = ops;
        if let Some((at, pages)) = cut {
            ops.insert(at.index(ops.len() + 1), Op::Cut(pages));
        }
        let data: Vec<u64> = data.into_iter().collect();
        let snapshot = Snapshot::new(PAGES * PAGE, &data);
        let files = || MemoryFiles::open(&snapshot.files).unwrap();
        let text = format!(
            "[{{\"base_host_virt_addr\":{BASE},\"size\":{},\"offset\":0,\"page_size\":{PAGE}}}]",
            PAGES * PAGE
        );
        let regions = parse(text.as_bytes(), PAGES * PAGE).unwrap().unwrap();
        let expected = (0..PAGES).map(|page| if data.contains(&page) { content(page) } else { 0 });
        let kernel = Arc::new(Mutex::new(Kernel {
            pages: vec![None; PAGES as usize],
            registered: vec![true; PAGES as usize],
            faults: VecDeque::new(),
            asleep: BTreeSet::new(),
            unread: VecDeque::new(),
            read: VecDeque::new(),
            stop_after: None,
            expected: expected.collect(),
        }));
        let start = |guest: Guest| {
            let figures = Figures::new(&Arc::new(Mutex::new(Registry::default())));
            let order = Mutex::new(Order::new(&guest, None));
            let filling = Filling::new(Fake(Arc::clone(&kernel)), files(), guest, figures, None);
            filling.begin().unwrap();
            (filling, order, Waiting::default())
        };
        let guest = Guest::new(text.as_bytes(), &regions, &files()).unwrap();
        let (mut filling, mut order, mut waiting) = start(guest);
        let (mut buffer, mut ahead) = (Vec::new(), Vec::new());
        let mut is_cut = false;
        // A page that is lost ends the VM, which has read nothing wrong by then.
        macro_rules! placed {
            ($result:expr) => {
                match $result {
                    Ok(value) => value,
                    Err(Unplaced::Failed(PagerError::File { .. })) if is_cut => return Ok(()),
                    Err(error) => return Err(TestCaseError::fail(format!("{error:?}"))),
                }
            };
        }
        for op in ops {
            match op {
                Op::Touch(page) => kernel.lock().touch(page),
                Op::Write(page, byte) => kernel.lock().write(page, byte),
                Op::Discard(start, end) => {
                    let mut kernel = kernel.lock();
                    // Where nothing is registered, nothing is told.
                    match kernel.registered[start as usize] {
                        true => kernel.unread.push_back((start, end)),
                        false => {
                            kernel.read.push_back((start, end));
                            while !kernel.read.is_empty() {
                                kernel.discard();
                            }
                        }
                    }
                }
                Op::Effect => kernel.lock().discard(),
                Op::StopAfter(pages) => kernel.lock().stop_after = Some(pages),
                Op::Events => {
                    placed!(filling.take_events(&mut waiting));
                    placed!(filling.serve(&mut waiting, &mut buffer));
                }
                Op::Background => {
                    placed!(filling.step(&order, &mut ahead, 3 * PAGE));
                }
                Op::FaultAgain(page) => {
                    let mut kernel = kernel.lock();
                    if kernel.registered[page as usize] {
                        kernel.faults.push_back(page);
                    }
                }
                Op::Cut(pages) => {
                    let file = std::fs::File::options().write(true).open(&snapshot.files[0]);
                    file.unwrap().set_len(pages * PAGE).unwrap();
                    is_cut = true;
                }
                // One that finds other files than the one before ends the VM.
                Op::Restart if is_cut => {}
                Op::Restart => {
                    let journal = filling.guest().journal().try_clone_to_owned().unwrap();
                    // As one that is killed after it has read and before it has done anything.
                    let (map, at) = (journal.try_clone().unwrap(), filling.guest().messages().1);
                    let map = HostMapping::map(&std::fs::File::from(map), 0, 4096).unwrap();
                    filling.uffd.read(&map, at, 8).unwrap();
                    let guest = Guest::take_over(journal, &files()).unwrap();
                    (filling, order, waiting) = start(guest);
                }
            }
        }
        // In the end all is with the VMM, and no one waits.
        for round in 0.. {
            prop_assert!(round < 1000, "it never ends");
            placed!(filling.take_events(&mut waiting));
            kernel.lock().discard();
            placed!(filling.serve(&mut waiting, &mut buffer));
            let step = placed!(filling.step(&order, &mut ahead, 3 * PAGE));
            if step == Step::Nothing && waiting.is_empty() && filling.is_complete().unwrap() {
                break;
            }
        }
        let mut kernel = kernel.lock();
        prop_assert!(kernel.asleep.is_empty(), "{:?} wait", kernel.asleep);
        (0..PAGES).for_each(|page| kernel.touch(page));
        prop_assert!(kernel.asleep.is_empty());
    }
}
