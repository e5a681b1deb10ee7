//! Pages that are being placed while the VMM discards them.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use migration::lazy::vmm_faults::{Filled, MESSAGE_LEN, Stop};
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use ram_discard::memory::HostMapping;
use small_vmm::firecracker::{PAGE, Vm};

use super::super::figures::Figures;
use super::super::fill::{Filling, Step, Uffd, Waiting};
use super::super::guest::{Guest, State};
use super::super::memory_files::MemoryFiles;
use super::super::message::parse;
use super::super::order::Order;
use super::{Snapshot, content, pages};
use crate::metrics::RunFigures;

const BASE: u64 = 0x10_0000;
/// How long a copy gives a discard to overtake it.
/// Much longer than it takes until the copy is under way.
const PATIENCE: Duration = Duration::from_secs(60);
const OVERTAKES: Duration = Duration::from_millis(200);

/// A kernel whose VMM discards all of its memory while that is being copied.
struct Kernel {
    pages: Mutex<[Option<u8>; 3]>,
    /// Told when the copy is under way.
    copying: Sender<()>,
    /// Tells the copy that the VMM has discarded.
    discarded: Mutex<Receiver<()>>,
    discards: Sender<()>,
    was_read: OnceLock<()>,
}

impl Uffd for Arc<Kernel> {
    fn read(&self, to: &HostMapping, offset: u64, _room: usize) -> io::Result<usize> {
        if self.was_read.set(()).is_err() {
            return Ok(0);
        }
        let mut message = [0; MESSAGE_LEN];
        message[0] = 0x15;
        message[8..16].copy_from_slice(&BASE.to_le_bytes());
        message[16..24].copy_from_slice(&(BASE + 3 * PAGE).to_le_bytes());
        to.write(offset, &message);
        // The VMM waits for no more than that.
        *self.pages.lock() = [None; 3];
        self.discards.send(()).unwrap();
        Ok(1)
    }

    fn copy(&self, address: u64, bytes: &[u8]) -> io::Result<Filled> {
        self.copying.send(()).unwrap();
        let _ = self.discarded.lock().recv_timeout(OVERTAKES);
        let first = ((address - BASE) / PAGE) as usize;
        for (page, bytes) in bytes.chunks(PAGE as usize).enumerate() {
            self.pages.lock()[first + page] = Some(bytes[0]);
        }
        Ok(Filled { bytes: bytes.len() as u64, stop: Stop::Complete })
    }

    fn zero(&self, _address: u64, _len: u64) -> io::Result<Filled> {
        unreachable!("no page was asked for")
    }

    fn wake(&self, _address: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn unregister(&self, _address: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
}

/// The VMM discards as soon as that was read: what is copied then would be there after it.
#[test]
fn a_discard_that_crosses_a_copy_leaves_nothing_of_the_file() {
    let snapshot = Snapshot::new(3 * PAGE, &[0, 1, 2]);
    let files = MemoryFiles::open(&snapshot.files).unwrap();
    let text = format!(
        "[{{\"base_host_virt_addr\":{BASE},\"size\":{},\"offset\":0,\"page_size\":{PAGE}}}]",
        3 * PAGE
    );
    let regions = parse(text.as_bytes(), 3 * PAGE).unwrap().unwrap();
    let guest = Guest::new(text.as_bytes(), &regions, &files).unwrap();
    let order = Mutex::new(Order::new(&guest, None));
    let ((copying, is_copying), (discards, discarded)) = (channel(), channel());
    let kernel = Arc::new(Kernel {
        pages: Mutex::default(),
        copying,
        discarded: Mutex::new(discarded),
        discards,
        was_read: OnceLock::new(),
    });
    let figures = Figures::new(&Arc::new(Mutex::new(Registry::default())));
    let filling = Filling::new(Arc::clone(&kernel), files, guest, figures, None);
    thread::scope(|scope| {
        let placing = scope.spawn(|| filling.step(&order, &mut Vec::new(), 3 * PAGE).unwrap());
        is_copying.recv_timeout(PATIENCE).unwrap();
        filling.take_events(&mut Waiting::default()).unwrap();
        assert_eq!(placing.join().unwrap(), Step::Placed);
    });
    assert_eq!(*kernel.pages.lock(), [None; 3]);
    for page in 0..3 {
        assert_eq!(filling.guest().state(0, page), State::Zeros, "{page}");
    }
}

/// As that, of what was read from the file before, and is copied after.
#[test]
fn what_the_vmm_discards_while_all_is_placed_at_once_is_zeros() {
    const PAGES: u64 = 8192;
    let snapshot = Snapshot::new(PAGES * PAGE, &(0..PAGES).collect::<Vec<_>>());
    for round in 0..4 {
        let restore = snapshot.restore("--eager");
        let vm = Vm::new(&[(PAGES / 2, PAGE), (PAGES / 2, PAGE)]);
        vm.load(&snapshot.socket());
        // Around where the threads are, and where they are not.
        let discarded = |page: u64| page % 64 >= 40 + round;
        for start in (0..PAGES).step_by(64) {
            vm.discard(pages(start + 40 + round, start + 64));
            for page in [start + 40 + round, start + 63] {
                assert_eq!(vm.read(page), 0, "{page}");
            }
        }
        restore.end().unwrap();
        for page in 0..PAGES {
            let expected = if discarded(page) { 0 } else { content(page) };
            assert_eq!(vm.read(page), expected, "{page}");
        }
    }
}
