//! The destination of a postcopy under a hostile source: commands, device state and pages over two
//! channels and those of recoveries, right, edited, or bytes.
//!
//! What is promised: no panic and no end without an end; the guest runs only where it was taken,
//! and is then either complete or stopped; a page that never came is never read by a vCPU.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use migration::lazy::{HandlerFailed, LazyRam};
use migration::postcopy::{Channels, PostcopyIncoming, Reconnect};
use migration::ram::{BlockOptions, ListOptions, MigrationBlock, RamBlocks, RamLoad};
use migration::stream::{
    AdvisedSizes, Command, Configuration, PageHeader, PageKind, RAM_SECTION, RAM_VERSION,
    ReturnMessage, SectionHeader, SectionKind, TARGET_PAGE_SIZE, put_command, put_continued,
    put_end_of_section, put_eof, put_footer, put_header, put_list, put_section,
};
use migration::{Channel, Guest, Incoming, MigrationError, NoDevices, Progress};
use ram_discard::memory::RamBlock;
use ram_discard::{ByteRange, LocalRamDiscardManager};
use vmstate::wire::WireWrite;

use crate::input::Input;
use crate::migration_stream::{BLOCK, BLOCKS, PAGE, memfd, plugged};

const PAGES: u64 = BLOCKS as u64 * BLOCK / PAGE;

/// The ping that asks whether devices are loaded.
const PING_PACKAGE_LOADED: u32 = 0x42;

/// How long the source waits for the guest to be taken, where it may not be: longer than that takes,
/// which tests count on, and the fuzzer does not.
const PATIENCE: Duration = Duration::from_millis(if cfg!(test) { 500 } else { 5 });

/// More steps only take longer.
const STEPS: usize = 32;

/// Byte of every page that comes with content.
const FILL: u8 = 7;

const OPTIONS: ListOptions = ListOptions { ignore_shared: false, postcopy: true };

/// A VMM, with a vCPU that reads one page from the start of the guest on.
#[derive(Default)]
struct Vmm {
    runs: AtomicUsize,
    failures: AtomicUsize,
    vcpu: Mutex<Option<(Arc<MigrationBlock>, u64)>>,
    read: Arc<AtomicBool>,
}

impl Guest for Vmm {
    fn stop(&self) -> Result<(), String> {
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        self.runs.fetch_add(1, Ordering::SeqCst);
        if let Some((block, page)) = self.vcpu.lock().unwrap().take() {
            let read = Arc::clone(&self.read);
            thread::spawn(move || {
                block.mapping().read(page * PAGE, &mut [0]);
                read.store(true, Ordering::SeqCst);
            });
        }
        Ok(())
    }
}

impl HandlerFailed for Vmm {
    fn handler_failed(&self, _error: &MigrationError) {
        self.failures.fetch_add(1, Ordering::SeqCst);
    }
}

fn side() -> (Arc<RamBlocks>, Arc<MigrationBlock>) {
    let map = |id: &str, len: u64, options| {
        let file = memfd(id);
        file.set_len(len).unwrap();
        let ram = RamBlock::new(id.into(), 0, len, file, 0).unwrap();
        Arc::new(MigrationBlock::map(Arc::new(ram), options).unwrap())
    };
    let vmem = map("vmem0", BLOCKS as u64 * BLOCK, BlockOptions::migratable());
    let manager = LocalRamDiscardManager::new(BLOCKS as u64 * BLOCK);
    manager.add_source(Arc::new(plugged())).unwrap();
    vmem.set_discard_manager(0, Arc::new(manager)).unwrap();
    let resizable = BlockOptions { resizable: Some(4 * PAGE), ..BlockOptions::migratable() };
    let mut blocks = RamBlocks::new();
    blocks.register(Arc::clone(&vmem)).unwrap();
    blocks.register(map("rom", 8 * PAGE, resizable)).unwrap();
    (Arc::new(blocks), vmem)
}

/// A page that is populated, mostly.
fn page(input: &mut Input<'_>) -> u64 {
    let byte = u64::from(input.u8());
    match byte {
        0xff => u64::MAX / PAGE,
        // Every other block is plugged.
        _ => byte % 4 * 2 * (BLOCK / PAGE) + byte / 4 % (BLOCK / PAGE) + byte / 0xf0,
    }
}

fn put_page(out: &mut Vec<u8>, input: &mut Input<'_>) {
    let how = input.u8();
    let kind = if how & 3 == 0 { PageKind::Zero } else { PageKind::Normal };
    let continued = how & 0x0c == 0x0c;
    out.put_be64(PageHeader::page_word(kind, page(input).wrapping_mul(PAGE), continued));
    if !continued {
        out.put_name(if how & 0xf0 == 0xf0 { "rom" } else { "vmem0" });
    }
    match kind {
        PageKind::Zero => out.put_u8(u8::from(how & 0x70 == 0x70)),
        _ => out.put(&[FILL; PAGE as usize]),
    }
}

fn put_section_of_pages(out: &mut Vec<u8>, input: &mut Input<'_>) {
    put_continued(out, SectionKind::Part, 0);
    (0..1 + input.u8() % 4).for_each(|_| put_page(out, input));
    put_end_of_section(out);
    put_footer(out, 0);
}

/// All of the announced pages, so that a postcopy can be completed.
fn put_all(out: &mut Vec<u8>, announced: &[(u64, u64)]) {
    put_continued(out, SectionKind::Part, 0);
    for page in announced.iter().flat_map(|&(start, nr)| start..start.saturating_add(nr)) {
        out.put_be64(PageHeader::page_word(PageKind::Normal, page.wrapping_mul(PAGE), false));
        out.put_name("vmem0");
        out.put(&[FILL; PAGE as usize]);
    }
    put_end_of_section(out);
    put_footer(out, 0);
}

/// What a source says while memory is outstanding.
fn steps(input: &mut Input<'_>, announced: &[(u64, u64)]) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        match input.u8() % 12 {
            0..=3 => put_section_of_pages(&mut out, input),
            4 | 5 => put_all(&mut out, announced),
            6 => put_eof(&mut out),
            7 => {
                let block = if input.u8() & 7 == 0 { "none" } else { "vmem0" }.to_owned();
                put_command(&mut out, &Command::RecvBitmap { block });
            }
            8 => put_command(&mut out, &Command::PostcopyResume),
            9 => put_command(&mut out, &Command::Ping(input.u8().into())),
            10 => put_command(&mut out, &Command::PostcopyRun),
            // The end of what is said on this channel: a recovery follows.
            _ if input.u8() & 1 == 0 => break,
            _ => {
                let len = usize::from(input.u8() % 16);
                out.put(input.bytes(len));
            }
        }
    }
    out
}

/// Up to LISTEN and the package; returns what is announced as well, pages.
fn beginning(blocks: &RamBlocks, input: &mut Input<'_>) -> (Vec<u8>, Vec<(u64, u64)>) {
    let mut out = Vec::new();
    put_header(&mut out, &Configuration::new("fuzz"));
    put_command(&mut out, &Command::OpenReturnPath);
    let sizes = AdvisedSizes { page_sizes: PAGE, target_page_size: TARGET_PAGE_SIZE };
    put_command(&mut out, &Command::PostcopyAdvise(Some(sizes)));
    let header = SectionHeader {
        kind: SectionKind::Start,
        section_id: 0,
        idstr: RAM_SECTION.to_owned(),
        instance_id: 0,
        version_id: RAM_VERSION,
    };
    put_section(&mut out, &header);
    put_list(&mut out, &blocks.list(OPTIONS).unwrap());
    put_end_of_section(&mut out);
    put_footer(&mut out, 0);
    let announced: Vec<_> =
        (0..1 + input.u8() % 3).map(|_| (page(input), u64::from(input.u8() % 4))).collect();
    let bytes = |&(start, nr): &(u64, u64)| (start.wrapping_mul(PAGE), nr * PAGE);
    let ranges = announced.iter().map(bytes).collect();
    put_command(&mut out, &Command::PostcopyRamDiscard { block: "vmem0".into(), ranges });
    let mut package = Vec::new();
    put_command(&mut package, &Command::PostcopyListen);
    let how = input.u8();
    if how & 1 == 0 {
        put_command(&mut package, &Command::Ping(PING_PACKAGE_LOADED));
    }
    if how & 6 == 0 {
        put_command(&mut package, &Command::PostcopyRun);
    }
    put_command(&mut out, &Command::Packaged { len: package.len() as u32 });
    out.put(&package);
    if how & 6 != 0 {
        put_command(&mut out, &Command::PostcopyRun);
    }
    (out, announced)
}

/// Changes a few bytes.
fn edit(bytes: &mut [u8], input: &mut Input<'_>) {
    for _ in 0..input.u8() % 4 {
        let at = usize::from(input.u16()) % bytes.len();
        bytes[at] = input.u8();
    }
}

/// What one channel carries: `first` until the guest is taken, or does not come to that, and then
/// `then`.
struct Said {
    stream: UnixStream,
    first: Vec<u8>,
    then: Vec<u8>,
}

impl Said {
    fn say(mut self) {
        let mut taken = Vec::new();
        ReturnMessage::SwitchoverAck.put(&mut taken);
        // Each fails when the destination has seen enough.
        let _ = self.stream.write_all(&self.first);
        if !self.first.is_empty() {
            self.stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let (mut heard, mut buffer) = (Vec::new(), [0; 256]);
            while !heard.windows(taken.len()).any(|part| part == taken) {
                match self.stream.read(&mut buffer) {
                    Ok(read @ 1..) => heard.extend_from_slice(&buffer[..read]),
                    _ => break,
                }
            }
            self.stream.set_read_timeout(None).unwrap();
        }
        let _ = self.stream.write_all(&self.then);
        let _ = self.stream.shutdown(Shutdown::Write);
        let _ = self.stream.read_to_end(&mut Vec::new());
    }
}

/// Has the other end of a channel say it. One thread serves all inputs, a channel after the other.
fn converse(said: Said) {
    thread_local! {
        static SOURCE: mpsc::Sender<Said> = {
            let (jobs, next) = mpsc::channel::<Said>();
            thread::spawn(move || next.iter().for_each(Said::say));
            jobs
        };
    }
    SOURCE.with(|source| source.send(said).unwrap());
}

/// A channel on which pages come that were asked for.
fn urgent(input: &mut Input<'_>, progress: &Arc<Progress>) -> Option<Channel> {
    let nr_pages = input.u8() % 8;
    if nr_pages == 0 {
        return None;
    }
    let mut bytes = Vec::new();
    (0..nr_pages).for_each(|_| put_page(&mut bytes, input));
    if input.u8() & 1 == 0 {
        put_end_of_section(&mut bytes);
    }
    let (mut near, far) = UnixStream::pair().unwrap();
    // Less than the socket takes at once.
    near.write_all(&bytes).unwrap();
    near.shutdown(Shutdown::Write).unwrap();
    Some(Channel::new(far, Arc::clone(progress)).unwrap())
}

/// New channels, each with what is said on it.
struct Recoveries {
    left: Vec<Vec<u8>>,
    progress: Arc<Progress>,
}

impl Reconnect for Recoveries {
    fn reconnect(&mut self, _error: &MigrationError) -> Option<Channels> {
        let then = self.left.pop()?;
        let (stream, far) = UnixStream::pair().unwrap();
        converse(Said { stream, first: Vec::new(), then });
        let main = Channel::new(far, Arc::clone(&self.progress)).unwrap();
        Some(Channels { main, urgent: None })
    }
}

/// The body of the target.
pub fn run(data: &[u8]) {
    drive(data);
}

/// How far an input came.
#[derive(Debug, PartialEq, Eq)]
enum Reached {
    Refused,
    Stopped,
    Completed,
}

/// Also returns how often the destination recovered.
fn drive(data: &[u8]) -> (Reached, u64) {
    let mut input = Input::new(data);
    let ((blocks, vmem), progress) = (side(), Arc::new(Progress::new()));
    let how = input.u8();
    let (mut first, announced) = beginning(&blocks, &mut input);
    let vcpu = announced[0].0;
    let vmm = Arc::new(Vmm::default());
    // Discarded memory that a vCPU reads is resident for as long as it reads.
    let populated = |page| ByteRange::new(page * PAGE, PAGE).map(|range| vmem.is_populated(range));
    if how & 1 == 0 && vcpu < PAGES && matches!(populated(vcpu), Some(Ok(true))) {
        *vmm.vcpu.lock().unwrap() = Some((Arc::clone(&vmem), vcpu));
    }
    if how & 6 == 0 {
        edit(&mut first, &mut input);
    }
    let urgent = if how & 8 == 0 { urgent(&mut input, &progress) } else { None };
    let then = steps(&mut input, &announced);
    let recoveries = usize::from(how >> 6);
    let mut left: Vec<_> = (0..recoveries).map(|_| steps(&mut input, &announced)).collect();
    left.reverse();
    let (stream, far) = UnixStream::pair().unwrap();
    converse(Said { stream, first, then });

    let mut memory: Option<Arc<LazyRam>> = None;
    let result = {
        let ram = RamLoad::new(Arc::clone(&blocks), OPTIONS, Arc::clone(&progress));
        let postcopy = PostcopyIncoming {
            blocks,
            urgent,
            reconnect: Box::new(Recoveries { left, progress: Arc::clone(&progress) }),
            failed: Arc::clone(&vmm) as Arc<dyn HandlerFailed>,
            listening: Some(Box::new(|lazy| {
                memory = Some(Arc::clone(lazy));
                Ok(())
            })),
        };
        let incoming = Incoming {
            configuration: Configuration::new("fuzz"),
            guest: &*vmm,
            handlers: vec![Box::new(ram)],
            devices: &mut NoDevices,
            postcopy: Some(postcopy),
            progress: Arc::clone(&progress),
        };
        incoming.run(Channel::new(far, Arc::clone(&progress)).unwrap())
    };

    let (runs, failures) = (vmm.runs.load(Ordering::SeqCst), vmm.failures.load(Ordering::SeqCst));
    let outstanding = memory.as_ref().map_or(0, |memory| memory.outstanding());
    match &result {
        Ok(()) => assert_eq!((runs, failures, outstanding), (1, 0, 0)),
        // Not taken, or stopped for good.
        Err(error) => assert_eq!(runs, failures, "{error}"),
    }
    if let Some(memory) = memory {
        if runs == 1 {
            check_outstanding(&memory, &vmem, &vmm, vcpu);
        }
        // No guest runs any more: the vCPU's thread may end.
        memory.abandon();
    }
    for range in vmem.discarded().unwrap() {
        vmem.for_each_data(range, |data| panic!("data in discarded {data}")).unwrap();
    }
    let reached = match (result, runs) {
        (Ok(()), _) => Reached::Completed,
        (Err(_), 0) => Reached::Refused,
        (Err(_), _) => Reached::Stopped,
    };
    (reached, progress.counters.postcopy_recoveries.load(Ordering::Relaxed))
}

/// A page that is outstanding is not there, and was not read.
fn check_outstanding(memory: &LazyRam, vmem: &MigrationBlock, vmm: &Vmm, vcpu: u64) {
    let Some(index) = memory.find("vmem0") else { return };
    let outstanding = memory.outstanding_of(index);
    for page in (0..PAGES).filter(|&page| outstanding.test(page)) {
        let range = ByteRange::new(page * PAGE, PAGE).unwrap();
        vmem.for_each_data(range, |data| panic!("page {page} is outstanding and there: {data}"))
            .unwrap();
        let read = page == vcpu && vmm.read.load(Ordering::SeqCst);
        assert!(!read, "page {page} never came and was read");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_reach_what_they_are_there_for() {
        let reached: Vec<_> =
            crate::seeds::of("postcopy_stream").iter().map(|seed| drive(seed)).collect();
        for expected in [
            (Reached::Completed, 0),
            (Reached::Stopped, 0),
            (Reached::Completed, 1),
            (Reached::Refused, 0),
        ] {
            assert!(reached.contains(&expected), "{expected:?} is none of {reached:?}");
        }
    }
}
