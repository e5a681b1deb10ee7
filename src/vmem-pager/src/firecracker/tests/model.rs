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
use small_vmm::firecracker::{HUGE, PAGE};

use super::{Snapshot, content};
use crate::error::PagerError;
use crate::metrics::RunFigures;

const NOENT: i32 = 2;
const INVAL: i32 = 22;

/// Regions in the order of the memory file: address, pages, and bytes of a page.
type Layout = [(u64, u64, u64)];
const ONE: &Layout = &[(0x10_0000, 70, PAGE)];
const SEVERAL: &Layout = &[(0x4000_0000, 30, PAGE), (0x10_0000, 1, PAGE), (0x2000_0000, 39, PAGE)];
const HUGE_PAGES: &Layout =
    &[(0x4000_0000, 3, HUGE), (0x2000_0000, 4, HUGE), (0x10_0000, 20, PAGE)];

/// A page: where the VMM has it, and where the memory file has it.
#[derive(Clone, Copy, Debug)]
struct Place {
    address: u64,
    size: u64,
    offset: u64,
    region: usize,
}

fn places(layout: &Layout) -> Vec<Place> {
    let (mut places, mut offset) = (Vec::new(), 0);
    for (region, (base, pages, size)) in layout.iter().enumerate() {
        for page in 0..*pages {
            places.push(Place { address: base + page * size, size: *size, offset, region });
            offset += size;
        }
    }
    places
}

/// What the kernel knows.
struct Kernel {
    places: Vec<Place>,
    /// The first bytes of pages that are there.
    pages: Vec<Option<u8>>,
    registered: Vec<bool>,
    faults: VecDeque<usize>,
    asleep: BTreeSet<usize>,
    /// Discards that were not read, and those that were and have had no effect yet: addresses.
    unread: VecDeque<(u64, u64)>,
    read: VecDeque<(u64, u64)>,
    /// Pages until the next copy stops half-way.
    stop_after: Option<u64>,
    /// What the guest must read; nothing is said of it while a discard is under way.
    expected: Vec<u8>,
}

impl Kernel {
    /// Pages that lie in a range as a whole.
    fn within(&self, start: u64, end: u64) -> Vec<usize> {
        let inside = |place: &Place| start <= place.address && place.address + place.size <= end;
        (0..self.places.len()).filter(|page| inside(&self.places[*page])).collect()
    }

    fn is_under_way(&self, page: usize) -> bool {
        let Place { address, size, .. } = self.places[page];
        self.unread
            .iter()
            .chain(&self.read)
            .any(|(start, end)| *start <= address && address + size <= *end)
    }

    fn touch(&mut self, page: usize) {
        let free = !self.is_under_way(page);
        match self.pages[page] {
            Some(byte) if free => assert_eq!(byte, self.expected[page], "page {page}"),
            Some(_) => {}
            None if self.registered[page] => {
                if self.asleep.insert(page) {
                    self.faults.push_back(page);
                }
            }
            None => {
                self.pages[page] = Some(0);
                assert!(!free || self.expected[page] == 0, "page {page} is lost");
            }
        }
    }

    fn write(&mut self, page: usize, byte: u8) {
        if let Some(content) = &mut self.pages[page] {
            *content = byte;
            self.expected[page] = byte;
        }
    }

    /// The VMM begins to discard, which is told where it is registered.
    fn begin_discard(&mut self, start: u64, end: u64) {
        let of = |address: u64| {
            self.places.iter().position(|it| (it.address..it.address + it.size).contains(&address))
        };
        let mut parts: Vec<(u64, u64, bool)> = Vec::new();
        for at in (start..end).step_by(PAGE as usize) {
            let told = of(at).is_some_and(|page| self.registered[page]);
            match parts.last_mut() {
                Some((_, end, last)) if *last == told => *end = at + PAGE,
                _ => parts.push((at, at + PAGE, told)),
            }
        }
        for (start, end, told) in parts {
            if told {
                self.unread.push_back((start, end));
                continue;
            }
            self.read.push_back((start, end));
            while !self.read.is_empty() {
                self.discard();
            }
        }
    }

    /// The oldest discard that was read has its effect. Of huge pages, those go that lie in it as a whole.
    fn discard(&mut self) {
        let Some((start, end)) = self.read.pop_front() else { return };
        for page in self.within(start, end) {
            self.pages[page] = None;
            self.expected[page] = 0;
        }
    }

    fn wake(&mut self, address: u64, len: u64) {
        for page in self.within(address, address + len) {
            if self.asleep.remove(&page) {
                self.faults.retain(|waits| *waits != page);
                self.touch(page);
            }
        }
    }

    fn place(&mut self, address: u64, len: u64, bytes: Option<&[u8]>) -> io::Result<Filled> {
        if !self.unread.is_empty() || !self.read.is_empty() {
            return Ok(Filled { bytes: 0, stop: Stop::Busy });
        }
        let pages = self.within(address, address + len);
        let whole = pages.iter().map(|page| self.places[*page].size).sum::<u64>() == len;
        for page in pages.iter().copied() {
            if !self.registered[page] {
                return Err(io::Error::from_raw_os_error(NOENT));
            }
            // Whole pages, and none of zeros where they are huge.
            if !whole || bytes.is_none() && self.places[page].size == HUGE {
                return Err(io::Error::from_raw_os_error(INVAL));
            }
            let done = self.places[page].address - address;
            if self.pages[page].is_some() {
                return Ok(Filled { bytes: done, stop: Stop::Exists });
            }
            if self.stop_after.as_mut().is_some_and(|left| {
                *left = left.saturating_sub(1);
                *left == 0
            }) {
                self.stop_after = None;
                return Ok(Filled { bytes: done, stop: Stop::Busy });
            }
            self.pages[page] = Some(bytes.map_or(0, |bytes| bytes[done as usize]));
            self.wake(self.places[page].address, self.places[page].size);
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
                let Place { address, size, .. } = kernel.places[page];
                message[0] = 0x12;
                message[16..24].copy_from_slice(&(address + size / 2 + 8).to_le_bytes());
            } else if let Some((start, end)) = kernel.unread.pop_front() {
                message[0] = 0x15;
                message[8..16].copy_from_slice(&start.to_le_bytes());
                message[16..24].copy_from_slice(&end.to_le_bytes());
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
        for page in kernel.within(address, address + len) {
            kernel.registered[page] = false;
        }
        kernel.wake(address, len);
        Ok(())
    }
}

/// What happens next. Pages are taken by their place among all, as often as there are.
#[derive(Clone, Copy, Debug)]
enum Op {
    Touch(usize),
    Write(usize, u8),
    /// From a page on, some pages of 4096 bytes into it, so many pages of 4096 bytes and whole ones.
    Discard(usize, u64, u64, u64),
    Effect,
    StopAfter(u64),
    Events,
    Background,
    /// The pager dies, and another one takes over.
    Restart,
    /// A fault is told that was told before, or of a page that is there.
    FaultAgain(usize),
    /// The memory file is cut to so many pages.
    Cut(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let page = || 0..70usize;
    let small = || prop_oneof![Just(0u64), 1..1024u64];
    prop_oneof![
        6 => page().prop_map(Op::Touch),
        2 => (page(), any::<u8>()).prop_map(|(page, byte)| Op::Write(page, byte)),
        3 => (page(), small(), small(), 0..9u64)
            .prop_map(|(page, into, small, whole)| Op::Discard(page, into, small, whole)),
        4 => Just(Op::Effect),
        1 => (1..20u64).prop_map(Op::StopAfter),
        6 => Just(Op::Events),
        2 => Just(Op::Background),
        1 => Just(Op::Restart),
        2 => page().prop_map(Op::FaultAgain),
    ]
}

/// What may happen: pages with data, what is done, and where among it the file is cut, and to how many pages.
fn cases() -> impl Strategy<Value = (BTreeSet<usize>, Vec<Op>)> {
    let data = prop::collection::btree_set(0..70usize, 0..60);
    let ops = prop::collection::vec(op(), 0..120);
    let cut = prop::option::weighted(0.3, (any::<prop::sample::Index>(), 1..70usize));
    (data, ops, cut).prop_map(|(data, mut ops, cut)| {
        if let Some((at, pages)) = cut {
            ops.insert(at.index(ops.len() + 1), Op::Cut(pages));
        }
        (data, ops)
    })
}

/// Has all of it happen to a guest.
fn check(layout: &Layout, data: &BTreeSet<usize>, ops: Vec<Op>) -> Result<(), TestCaseError> {
    let places = places(layout);
    let count = places.len();
    let len = places[count - 1].offset + places[count - 1].size;
    // The first 4096 bytes of each page with data.
    let has_data = |page: &usize| data.contains(page);
    let first = |page: usize| places[page].offset / PAGE;
    let in_file: Vec<u64> = (0..count).filter(has_data).map(first).collect();
    let snapshot = Snapshot::new(len, &in_file);
    let files = || MemoryFiles::open(&snapshot.files).unwrap();
    // Not in the order of the file.
    let text: Vec<_> = (0..layout.len())
        .rev()
        .map(|region| {
            let (base, pages, size) = layout[region];
            let offset = places.iter().find(|place| place.region == region).unwrap().offset;
            format!(
                "{{\"base_host_virt_addr\":{base},\"size\":{},\"offset\":{offset},\"page_size\":{size}}}",
                pages * size
            )
        })
        .collect();
    let text = format!("[{}]", text.join(","));
    let regions = parse(text.as_bytes(), len).unwrap().unwrap();
    let expected = |page| if has_data(&page) { content(first(page)) } else { 0 };
    let kernel = Arc::new(Mutex::new(Kernel {
        places: places.clone(),
        pages: vec![None; count],
        registered: vec![true; count],
        faults: VecDeque::new(),
        asleep: BTreeSet::new(),
        unread: VecDeque::new(),
        read: VecDeque::new(),
        stop_after: None,
        expected: (0..count).map(expected).collect(),
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
            Op::Touch(page) => kernel.lock().touch(page % count),
            Op::Write(page, byte) => kernel.lock().write(page % count, byte),
            Op::Discard(page, into, small, whole) => {
                let Place { address, size, region, .. } = places[page % count];
                let (base, pages, _) = layout[region];
                let start = address + into * PAGE % size;
                let len = if size == HUGE { small * PAGE } else { 0 } + whole * size;
                let end = (start + len).min(base + pages * size);
                kernel.lock().begin_discard(start, end);
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
                if kernel.registered[page % count] {
                    kernel.faults.push_back(page % count);
                }
            }
            Op::Cut(page) => {
                let file = std::fs::File::options().write(true).open(&snapshot.files[0]);
                file.unwrap().set_len(places[page % count].offset).unwrap();
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
    (0..count).for_each(|page| kernel.touch(page));
    prop_assert!(kernel.asleep.is_empty());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_guest_reads_the_file_or_what_it_wrote_or_zeros_after_a_discard((data, ops) in cases()) {
        check(ONE, &data, ops)?;
    }

    #[test]
    fn a_guest_of_several_regions_reads_the_same((data, ops) in cases()) {
        check(SEVERAL, &data, ops)?;
    }

    #[test]
    fn a_guest_of_huge_pages_reads_the_same((data, ops) in cases()) {
        check(HUGE_PAGES, &data, ops)?;
    }
}
