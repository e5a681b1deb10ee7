//! Two sides with real memory, for the tests of whatever moves it.

mod manager;

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use ram_discard::memory::RamBlock;
use ram_discard::{ByteRange, RamDiscardManager};
use rustix::fs::MemfdFlags;

use super::ram::{BlockOptions, MigrationBlock, RamBlocks};

pub(crate) use manager::{Changing, Log, TestManager};

pub(super) const PAGE: u64 = 4096;
pub(super) const BLOCK: u64 = 64 * PAGE;

/// One side: a region of blocks, some of them plugged, and boot memory.
pub(super) struct Side {
    pub(super) region: File,
    pub(super) boot: File,
    pub(super) blocks: Arc<RamBlocks>,
    /// Of the region, where it has one.
    pub(super) manager: Option<Arc<TestManager>>,
}

pub(crate) fn memfd(size: u64) -> File {
    let file = File::from(rustix::fs::memfd_create("precopy", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    file
}

pub(crate) fn migration_block(
    id: &str,
    file: &File,
    size: u64,
    options: BlockOptions,
) -> MigrationBlock {
    let file = file.try_clone().unwrap();
    let ram = RamBlock::new(id.to_owned(), 1 << 32, size, file, 0).unwrap();
    MigrationBlock::map(Arc::new(ram), options).unwrap()
}

impl Side {
    pub(super) fn new(plugged: &[usize]) -> Self {
        let (region, boot) = (memfd(16 * BLOCK), memfd(BLOCK));
        let mut blocks = RamBlocks::new();
        let vmem = migration_block("vmem0", &region, 16 * BLOCK, BlockOptions::migratable());
        let manager = TestManager::new(plugged, 16);
        vmem.set_discard_manager(0, Arc::clone(&manager) as Arc<dyn RamDiscardManager>).unwrap();
        blocks.register(Arc::new(vmem)).unwrap();
        let ram = migration_block("ram", &boot, BLOCK, BlockOptions::migratable());
        blocks.register(Arc::new(ram)).unwrap();
        Self { region, boot, blocks: Arc::new(blocks), manager: Some(manager) }
    }

    /// As [`new`](Self::new), of a device whose block state may change while it migrates.
    pub(super) fn elastic(plugged: &[usize]) -> Self {
        let side = Self::new(plugged);
        side.device().elastic.store(true, Ordering::SeqCst);
        side
    }

    /// The manager of the region.
    pub(super) fn device(&self) -> &Arc<TestManager> {
        self.manager.as_ref().unwrap()
    }

    /// Resident pages of a block.
    pub(super) fn resident_of(&self, block: usize) -> u64 {
        let vmem = self.blocks.get("vmem0").unwrap();
        let (mut pages, range) = (0, ByteRange::new(block as u64 * BLOCK, BLOCK).unwrap());
        vmem.for_each_data(range, |data| pages += data.len() / PAGE).unwrap();
        pages
    }

    /// Blocks that hold memory though they are not plugged.
    pub(super) fn leaked(&self) -> Vec<usize> {
        let leaks =
            |block: &usize| !self.device().is_plugged(*block) && self.resident_of(*block) != 0;
        (0..16).filter(leaks).collect()
    }

    /// With a region of `size` bytes of which all is populated, and no boot memory to migrate.
    pub(super) fn of_region(size: u64) -> Self {
        let region = memfd(size);
        let mut blocks = RamBlocks::new();
        let vmem = migration_block("vmem0", &region, size, BlockOptions::migratable());
        blocks.register(Arc::new(vmem)).unwrap();
        Self { region, boot: memfd(BLOCK), blocks: Arc::new(blocks), manager: None }
    }

    pub(super) fn resident(&self) -> (u64, u64) {
        let pages = |file: &File| file.metadata().unwrap().blocks() * 512 / PAGE;
        (pages(&self.region), pages(&self.boot))
    }

    pub(super) fn page(&self, page: u64) -> Vec<u8> {
        let mut bytes = vec![0; PAGE as usize];
        self.region.read_exact_at(&mut bytes, page * PAGE).unwrap();
        bytes
    }
}

pub(crate) fn fill(file: &File, pages: Range<u64>, byte: u8) {
    for page in pages {
        file.write_all_at(&[byte; PAGE as usize], page * PAGE).unwrap();
    }
}

/// A connection over TCP within this host.
pub(super) fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let far = listener.accept().unwrap().0;
    (near, far)
}

/// What a destination says up to its verdict: the PONG of one of the two pings that ask for it.
fn read_verdict(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut said = Vec::new();
    loop {
        // All are of the same length until then.
        let mut pong = [0; 8];
        from.read_exact(&mut pong)?;
        said.extend(pong);
        if matches!(&pong, b"\0\x02\0\x04\0\0\0\x05" | b"\0\x02\0\x04\0\0\0\x42") {
            return Ok(said);
        }
    }
}

/// Source and destination of a connection on which `then` is done when the destination has said its
/// verdict, and before the source hears it.
pub(super) fn at_the_verdict(then: impl FnOnce() + Send + 'static) -> (UnixStream, UnixStream) {
    let (source, mut near) = UnixStream::pair().unwrap();
    let (mut far, destination) = UnixStream::pair().unwrap();
    let (mut back_from, mut back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
    thread::spawn(move || {
        if let Ok(verdict) = read_verdict(&mut back_from) {
            then();
            let _ = back_to.write_all(&verdict);
        }
        let _ = io::copy(&mut back_from, &mut back_to);
        let _ = back_to.shutdown(Shutdown::Both);
    });
    thread::spawn(move || {
        let _ = io::copy(&mut near, &mut far);
        let _ = far.shutdown(Shutdown::Both);
    });
    (source, destination)
}

/// A subscriber of the log that calls this with each event.
pub(super) struct OnEvent<F>(pub(super) F);

impl<F: Fn() + 'static> tracing::Subscriber for OnEvent<F> {
    fn enabled(&self, _metadata: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _span: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _span: &tracing::span::Id, _values: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _span: &tracing::span::Id, _follows: &tracing::span::Id) {}

    fn event(&self, _event: &tracing::Event<'_>) {
        self.0();
    }

    fn enter(&self, _span: &tracing::span::Id) {}

    fn exit(&self, _span: &tracing::span::Id) {}
}

/// Much longer than anything takes that a test waits for.
pub(crate) const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// Waits for what another thread does. Fails when that does not come, as when the thread has failed.
#[track_caller]
pub(crate) fn wait_until(mut what: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !what() {
        assert!(begun.elapsed() < PATIENCE, "what is waited for does not come");
        thread::sleep(std::time::Duration::from_micros(200));
    }
}

/// What is late after the destination's verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Late {
    /// What the source says.
    There,
    /// What the destination says.
    Back,
}

/// Source and destination of a connection over TCP on which, after the destination's verdict, one
/// direction stands still until the source ends its own.
pub(super) fn late(late: Late) -> (OwnedFd, OwnedFd) {
    let (source, mut near) = tcp_pair();
    let (mut far, destination) = tcp_pair();
    let (mut back_from, mut back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
    let decided = Arc::new(AtomicBool::new(false));
    let (tell_ended, ended) = mpsc::channel();
    let deciding = Arc::clone(&decided);
    thread::spawn(move || {
        let verdict = read_verdict(&mut back_from).unwrap_or_default();
        deciding.store(true, Ordering::SeqCst);
        let _ = back_to.write_all(&verdict);
        if late == Late::Back {
            let _ = ended.recv();
        }
        let _ = io::copy(&mut back_from, &mut back_to);
        let _ = back_to.shutdown(Shutdown::Both);
    });
    thread::spawn(move || {
        let (mut buffer, mut kept) = (vec![0; 4096], Vec::new());
        while let Ok(read @ 1..) = near.read(&mut buffer) {
            if late == Late::There && decided.load(Ordering::SeqCst) {
                kept.extend_from_slice(&buffer[..read]);
            } else if far.write_all(&buffer[..read]).is_err() {
                break;
            }
        }
        // What was kept comes at once with the end.
        let _ = rustix::net::sockopt::set_tcp_cork(&far, true);
        let _ = far.write_all(&kept);
        let _ = far.shutdown(Shutdown::Write);
        let _ = tell_ended.send(());
    });
    (source.into(), destination.into())
}

/// How a peer reads that is not to hold up what writes to it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Slow {
    /// Not at all, with its connection left open.
    Nothing,
    /// A byte now and then.
    Trickle,
}

/// Reads so until it is dropped.
pub(super) struct SlowReader(Arc<AtomicBool>, Option<thread::JoinHandle<()>>);

impl SlowReader {
    pub(super) fn start(mut stream: impl Read + Send + 'static, slow: Slow) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&done);
        let thread = thread::spawn(move || {
            while !ends.load(Ordering::SeqCst) {
                match slow {
                    Slow::Nothing => {}
                    Slow::Trickle => drop(stream.read(&mut [0])),
                }
                thread::sleep(std::time::Duration::from_millis(1));
            }
        });
        Self(done, Some(thread))
    }
}

impl Drop for SlowReader {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
        // Of a test that has failed it may be in a read that nothing ends.
        if let Some(thread) = self.1.take().filter(|_| !thread::panicking()) {
            let _ = thread.join();
        }
    }
}
