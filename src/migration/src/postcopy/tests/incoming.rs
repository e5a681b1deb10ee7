//! The destination between LISTEN and the running guest, while memory is outstanding.

mod trouble;

use std::ops::ControlFlow;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, Sender};

use ram_discard::{
    ByteRange, FreezeError, FreezeFor, FrozenBlockState, ListenerId, RamDiscardListener,
    RamDiscardManager, RegisterError, Unavailable, Visit,
};
use vmstate::wire::WireRead;

use super::peers::{ANNOUNCED, RawSource};
use super::*;
use crate::devices::{DevicePhase, DeviceSection, Devices};
use crate::stream::{Command, ReturnMessage, SectionHeader};
use crate::sys::page_faults::{FaultKind, PageFaults};
use crate::test_support::{BLOCK, PATIENCE, TestManager, wait_until};

type Outcome = Result<(), MigrationError>;

/// What a VMM does where memory may be outstanding, and what became of it.
#[derive(Default)]
pub(super) struct Vmm {
    /// When the guest is to run, and when the device is loaded.
    run: Option<Box<dyn Fn() -> Result<(), String> + Send + Sync>>,
    load: Option<Box<dyn Fn() + Send + Sync>>,
    runs: AtomicUsize,
    loaded: AtomicUsize,
    failures: AtomicUsize,
}

impl Vmm {
    fn running(run: impl Fn() -> Result<(), String> + Send + Sync + 'static) -> Self {
        Self { run: Some(Box::new(run)), ..Self::default() }
    }

    fn loading(load: impl Fn() + Send + Sync + 'static) -> Self {
        Self { load: Some(Box::new(load)), ..Self::default() }
    }
}

impl Guest for Vmm {
    fn stop(&self) -> Result<(), String> {
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        self.runs.fetch_add(1, Ordering::SeqCst);
        self.run.as_ref().map_or(Ok(()), |run| run())
    }
}

impl HandlerFailed for Vmm {
    fn handler_failed(&self, _error: &MigrationError) {
        self.failures.fetch_add(1, Ordering::SeqCst);
    }
}

/// One device, `dev`.
struct Device(Arc<Vmm>);

impl Devices for Device {
    fn save(&mut self, phase: DevicePhase) -> Result<Vec<DeviceSection>, MigrationError> {
        let section = DeviceSection {
            idstr: "dev".to_owned(),
            instance_id: 0,
            version_id: 1,
            payload: Vec::new(),
            description: serde_json::Value::Null,
        };
        Ok(if phase == DevicePhase::Early { Vec::new() } else { vec![section] })
    }

    fn load(
        &mut self,
        _header: &SectionHeader,
        _phase: DevicePhase,
        _reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        if let Some(load) = &self.0.load {
            load();
        }
        Ok(())
    }

    fn loaded(&mut self) -> Result<(), MigrationError> {
        self.0.loaded.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// A destination on a thread.
pub(super) struct Destination {
    vmm: Arc<Vmm>,
    progress: Arc<Progress>,
    pub(super) thread: JoinHandle<Outcome>,
}

impl Destination {
    /// How often the guest was let run, devices were taken over, and the guest was to be stopped.
    fn seen(&self) -> (usize, usize, usize) {
        let seen = [&self.vmm.runs, &self.vmm.loaded, &self.vmm.failures];
        seen.map(|count| count.load(Ordering::SeqCst)).into()
    }
}

fn receive(to: &Side, vmm: Vmm, main: UnixStream, urgent: Option<UnixStream>) -> Destination {
    receive_with(to, vmm, main, urgent, Box::new(GiveUp))
}

/// A destination, and a source of which the test says each message.
fn raw_source(vmm: Vmm) -> (Side, Destination, RawSource) {
    let to = Side::new(&[1, 4, 5, 9]);
    let (near, far) = UnixStream::pair().unwrap();
    let there = receive(&to, vmm, far, None);
    let source = RawSource::begin(near, &to);
    (to, there, source)
}

pub(super) fn receive_with(
    to: &Side,
    vmm: Vmm,
    main: UnixStream,
    urgent: Option<UnixStream>,
    reconnect: Box<dyn Reconnect>,
) -> Destination {
    let (vmm, progress) = (Arc::new(vmm), Arc::new(Progress::new()));
    let (blocks, given, seen) = (Arc::clone(&to.blocks), Arc::clone(&vmm), Arc::clone(&progress));
    let thread = thread::spawn(move || {
        let channel = |stream| Channel::new(stream, Arc::clone(&seen)).unwrap();
        let ram = RamLoad::new(Arc::clone(&blocks), OPTIONS, Arc::clone(&seen));
        let postcopy = PostcopyIncoming {
            blocks,
            urgent: urgent.map(channel),
            reconnect,
            failed: Arc::clone(&given) as Arc<dyn HandlerFailed>,
            listening: None,
        };
        let incoming = Incoming {
            configuration: Configuration::new("test"),
            guest: &*given,
            handlers: vec![Box::new(ram)],
            devices: &mut Device(Arc::clone(&given)),
            postcopy: Some(postcopy),
            progress: Arc::clone(&seen),
        };
        incoming.run(channel(main))
    });
    Destination { vmm, progress, thread }
}

/// Sends `from` by the engine's source; what became of it, and how often its guest was let run.
pub(super) fn send(
    from: &Side,
    main: UnixStream,
    urgent: Option<UnixStream>,
    progress: &Arc<Progress>,
) -> (Outcome, usize) {
    send_at(None, from, main, urgent, progress)
}

/// The same, at so many bytes a second of what is not asked for.
pub(super) fn send_at(
    max_postcopy_bandwidth: Option<u64>,
    from: &Side,
    main: UnixStream,
    urgent: Option<UnixStream>,
    progress: &Arc<Progress>,
) -> (Outcome, usize) {
    send_again(max_postcopy_bandwidth, from, (main, urgent), Box::new(GiveUp), progress)
}

/// As [`send_at`], with `reconnect` when the channel breaks.
pub(super) fn send_again(
    max_postcopy_bandwidth: Option<u64>,
    from: &Side,
    (main, urgent): (UnixStream, Option<UnixStream>),
    reconnect: Box<dyn Reconnect>,
    progress: &Arc<Progress>,
) -> (Outcome, usize) {
    let channel = |stream| Channel::new(stream, Arc::clone(progress)).unwrap();
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::new(NeverWritten) };
    let ram = RamSave::new(&from.blocks, OPTIONS, Arc::clone(progress), tracker).unwrap();
    let vmm = Arc::new(Vmm::default());
    let postcopy =
        PostcopyOutgoing { when: SwitchWhen::AtOnce, urgent: urgent.map(channel), reconnect };
    let mut parameters = Parameters::new(Configuration::new("test"));
    parameters.switchover_timeout = Duration::from_secs(60);
    parameters.max_postcopy_bandwidth = max_postcopy_bandwidth;
    let outgoing = Outgoing {
        parameters,
        guest: &*vmm,
        handlers: vec![Box::new(ram)],
        devices: &mut Device(Arc::clone(&vmm)),
        postcopy: Some(postcopy),
        progress: Arc::clone(progress),
    };
    let outcome = outgoing.run(channel(main));
    (outcome.map_err(|failed| failed.error), vmm.runs.load(Ordering::SeqCst))
}

/// Reads a page of the region where the guest has it.
fn page_of(side: &Side, page: u64) -> impl Fn() -> u8 + Send + Sync + use<> {
    let region = Arc::clone(side.blocks.get("vmem0").unwrap().mapping());
    move || {
        let mut byte = [0];
        region.read(page * PAGE, &mut byte);
        byte[0]
    }
}

fn assert_arrived(to: &Side, expected: &[u8]) {
    for (page, &byte) in expected.iter().enumerate() {
        assert_eq!(to.page(page as u64)[0], byte, "page {page}");
    }
}

fn pair(urgent: bool) -> (Option<UnixStream>, Option<UnixStream>) {
    urgent.then(|| UnixStream::pair().unwrap()).unzip()
}

/// A wait that ends when the sender is dropped.
fn gate() -> (Sender<()>, impl Fn() + Send + Sync) {
    let (open, waits): (_, Receiver<()>) = mpsc::channel();
    let waits = Mutex::new(waits);
    (open, move || {
        let _ = waits.lock().unwrap().recv();
    })
}

#[test]
fn a_guest_whose_start_reads_outstanding_memory_finds_it() {
    for urgent in [false, true] {
        let ((from, expected), to) = (filled(), Side::new(&[1, 4, 5, 9]));
        let (near, far) = UnixStream::pair().unwrap();
        let (near_urgent, far_urgent) = pair(urgent);
        let read = page_of(&to, 619);
        let vmm = Vmm::running(move || match read() {
            9 => Ok(()),
            other => Err(format!("it reads {other}")),
        });
        let there = receive(&to, vmm, far, far_urgent);
        let (sent, runs) = send(&from, near, near_urgent, &Arc::new(Progress::new()));
        sent.unwrap();
        wait_until(|| there.thread.is_finished());
        assert_eq!((runs, there.seen()), (0, (1, 1, 0)));
        there.thread.join().unwrap().unwrap();
        assert_arrived(&to, &expected);
    }
}

#[test]
fn a_device_whose_load_reads_outstanding_memory_finds_it() {
    for urgent in [false, true] {
        let ((from, expected), to) = (filled(), Side::new(&[1, 4, 5, 9]));
        let (near, far) = UnixStream::pair().unwrap();
        let (near_urgent, far_urgent) = pair(urgent);
        let reads = [page_of(&to, 619), page_of(&to, 64), page_of(&to, 700)];
        let (tell, told) = mpsc::channel();
        let vmm = Vmm::loading(move || tell.send([0, 1, 2].map(|n| reads[n]())).unwrap());
        let there = receive(&to, vmm, far, far_urgent);
        let (sent, runs) = send(&from, near, near_urgent, &Arc::new(Progress::new()));
        sent.unwrap();
        wait_until(|| there.thread.is_finished());
        assert_eq!((runs, there.seen()), (0, (1, 1, 0)));
        there.thread.join().unwrap().unwrap();
        assert_eq!(told.recv_timeout(PATIENCE).unwrap(), [9, 7, 0]);
        assert_arrived(&to, &expected);
    }
}

#[test]
fn memory_arrives_and_the_source_ends_though_the_start_of_the_guest_hangs() {
    let ((from, expected), to) = (filled(), Side::new(&[1, 4, 5, 9]));
    let (near, far) = UnixStream::pair().unwrap();
    let (open, wait) = gate();
    let vmm = Vmm::running(move || {
        wait();
        Ok(())
    });
    let there = receive(&to, vmm, far, None);
    let progress = Arc::new(Progress::new());
    let (sent, runs) = send(&from, near, None, &progress);
    sent.unwrap();
    assert_arrived(&to, &expected);
    // Too late: the guest is there, and nowhere else.
    progress.cancel();
    there.progress.cancel();
    assert!(!there.thread.is_finished());
    drop(open);
    wait_until(|| there.thread.is_finished());
    assert_eq!((runs, there.seen()), (0, (1, 1, 0)));
    there.thread.join().unwrap().unwrap();
}

#[test]
fn a_source_that_is_cancelled_while_a_device_hangs_has_the_guest_again() {
    let ((from, _), to) = (filled(), Side::new(&[1, 4, 5, 9]));
    let (near, far) = UnixStream::pair().unwrap();
    let (open, wait) = gate();
    let (tell, told) = mpsc::channel();
    let vmm = Vmm::loading(move || {
        tell.send(()).unwrap();
        wait();
    });
    let there = receive(&to, vmm, far, None);
    let progress = Arc::new(Progress::new());
    let cancelling = Arc::clone(&progress);
    thread::spawn(move || {
        told.recv_timeout(PATIENCE).unwrap();
        cancelling.cancel();
    });
    let (sent, runs) = thread::scope(|scope| {
        let sending = scope.spawn(|| send(&from, near, None, &progress));
        // The verdict would be waited for much longer.
        wait_until(|| sending.is_finished());
        sending.join().unwrap()
    });
    assert!(matches!(sent, Err(MigrationError::Cancelled)), "{sent:?}");
    assert_eq!(runs, 1);
    drop(open);
    wait_until(|| there.thread.is_finished());
    let (runs, _, failures) = there.seen();
    assert_eq!((runs, failures), (0, 0), "no guest is to be run or stopped there");
    there.thread.join().unwrap().unwrap_err();
}

#[test]
fn a_destination_that_is_cancelled_while_a_device_waits_for_a_page_leaves_the_guest() {
    let to = Side::new(&[1, 4, 5, 9]);
    let (near, far) = UnixStream::pair().unwrap();
    let read = page_of(&to, ANNOUNCED.start);
    let (tell, told) = mpsc::channel();
    let there = receive(&to, Vmm::loading(move || tell.send(read()).unwrap()), far, None);
    let mut source = RawSource::begin(near, &to);
    source.package("dev", &[Command::Ping(PING_PACKAGE_LOADED)]);
    // It says nothing more.
    let block = Some("vmem0".to_owned());
    let request = ReturnMessage::RequestPages { block, start: ANNOUNCED.start * PAGE, len: 4096 };
    source.hear(&request);
    assert!(told.try_recv().is_err(), "a page was read that never came");
    there.progress.cancel();
    source.hear(&ReturnMessage::Shut(libc::ECANCELED as u32));
    wait_until(|| there.thread.is_finished());
    assert_eq!((told.recv_timeout(PATIENCE).unwrap(), there.seen()), (0, (0, 0, 0)));
    assert_eq!(there.progress.status(), Status::Cancelled);
    let error = there.thread.join().unwrap().unwrap_err();
    assert!(matches!(error, MigrationError::Cancelled), "{error}");
}

#[test]
fn devices_are_taken_over_though_the_source_does_not_ask_for_a_verdict() {
    let (to, there, mut source) = raw_source(Vmm::default());
    // As QEMU before 10.2 has it.
    source.package("dev", &[Command::PostcopyRun]);
    source.hear(&ReturnMessage::SwitchoverAck);
    source.finish();
    source.hear(&ReturnMessage::Shut(0));
    wait_until(|| there.thread.is_finished());
    assert_eq!(there.seen(), (1, 1, 0));
    there.thread.join().unwrap().unwrap();
    assert_eq!((to.page(ANNOUNCED.start)[0], to.page(ANNOUNCED.end - 1)[0]), (7, 7));
}

#[test]
fn a_page_at_no_possible_offset_is_refused_and_what_is_outstanding_stays_so() {
    let (to, there, mut source) = raw_source(Vmm::default());
    source.hand_over();
    source.hear(&ReturnMessage::SwitchoverAck);
    let waits = thread::spawn(page_of(&to, ANNOUNCED.start));
    source.page(u64::MAX - (PAGE - 1));
    wait_until(|| there.thread.is_finished());
    assert_eq!(there.seen(), (1, 1, 1));
    let error = there.thread.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("a page at 0xfffffffffffff000 of block \"vmem0\""), "{error}");
    let begins = thread::spawn(page_of(&to, ANNOUNCED.start + 1));
    thread::sleep(Duration::from_millis(100));
    assert!(!waits.is_finished() && !begins.is_finished(), "they read zeros");
}

#[test]
fn outstanding_pages_that_cannot_be_are_refused_with_the_byte_of_their_command() {
    for (block, range, what) in [
        ("other", (0, PAGE), "outstanding pages of block \"other\", which is unknown"),
        ("vmem0", (1, PAGE), "0x1000 outstanding bytes at 0x1 of block \"vmem0\""),
        ("vmem0", (0, u64::MAX), "0xffffffffffffffff outstanding bytes at 0x0"),
        ("vmem0", (700 * PAGE, PAGE), "RAM block \"vmem0\": a page at 0x2bc000"),
    ] {
        let (_to, there, mut source) = raw_source(Vmm::default());
        let (block, ranges) = (block.to_owned(), vec![range]);
        let at = source.command(&Command::PostcopyRamDiscard { block, ranges });
        wait_until(|| there.thread.is_finished());
        assert_eq!(there.seen(), (0, 0, 0));
        let error = there.thread.join().unwrap().unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
        assert!(error.contains(&format!("byte {at:#x} of the stream")), "{at:#x}: {error}");
    }
}

#[test]
fn received_pages_of_an_unknown_block_are_refused_with_the_byte_of_their_command() {
    let (_to, there, mut source) = raw_source(Vmm::default());
    source.hand_over();
    source.hear(&ReturnMessage::SwitchoverAck);
    let at = source.command(&Command::RecvBitmap { block: "other".to_owned() });
    wait_until(|| there.thread.is_finished());
    let error = there.thread.join().unwrap().unwrap_err().to_string();
    let what = format!("byte {at:#x} of the stream: received pages of block \"other\"");
    assert!(error.contains(&what), "{at:#x}: {error}");
}

#[test]
fn what_a_device_puts_where_a_page_is_outstanding_keeps_the_guest_at_the_source() {
    let to = Side::new(&[1, 4, 5, 9]);
    let (near, far) = UnixStream::pair().unwrap();
    // By a mapping of its own, or a process of its own: no fault is seen.
    let file = to.region.try_clone().unwrap();
    let vmm = Vmm::loading(move || fill(&file, ANNOUNCED.start..ANNOUNCED.start + 1, 0xee));
    let there = receive(&to, vmm, far, None);
    let mut source = RawSource::begin(near, &to);
    source.hand_over();
    wait_until(|| there.thread.is_finished());
    assert_eq!(there.seen(), (0, 1, 0));
    let error = there.thread.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("0x40000 of block \"vmem0\" has data here"), "{error}");
}

#[test]
fn memory_that_cannot_do_postcopy_is_found_before_precopy() {
    let to = Side::new(&[1, 4, 5, 9]);
    // Another userfaultfd has it.
    let mut other = PageFaults::open(FaultKind::Missing).unwrap();
    let index = other.add(Arc::clone(to.blocks.get("vmem0").unwrap().mapping()));
    other.register(index, ByteRange::new(0, 16 * PAGE).unwrap()).unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    let there = receive(&to, Vmm::default(), far, None);
    // The guest still runs there.
    let mut source = RawSource::begin(near, &to);
    source.hear(&ReturnMessage::Shut(libc::EBUSY as u32));
    let error = there.thread.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("\"vmem0\": cannot have accesses to its memory wait"), "{error}");
}
