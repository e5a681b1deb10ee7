//! Iterative handlers beside RAM.

use super::*;
use crate::channel::{BufferSink, Sink};
use crate::framing::Framing;
use crate::handler::LoadHandler;
use crate::lazy::HandlerFailed;
use crate::postcopy::{GiveUp, PostcopyIncoming, PostcopyOutgoing, SwitchWhen};
use crate::precopy::handlers;
use crate::stream::{SectionKind, read_header};
use vmstate::wire::{WireRead, WireReader, WireWrite};

const SECTOR: usize = 512;
const END: u64 = u64::MAX;

type Sectors = Arc<Mutex<Vec<[u8; SECTOR]>>>;

fn sectors(count: usize, byte: u8) -> Sectors {
    Arc::new(Mutex::new(vec![[byte; SECTOR]; count]))
}

/// A disk whose sectors are sent: sectors with their number, and an end mark, in each section.
#[derive(Clone)]
pub(super) struct Disk {
    instance: u32,
    version: u32,
    sectors: Sectors,
    left: Arc<Mutex<Vec<usize>>>,
    /// What it was asked for.
    log: Arc<Mutex<Vec<String>>>,
}

impl Disk {
    fn new(instance: u32, sectors: &Sectors) -> Self {
        let left = (0..sectors.lock().unwrap().len()).rev().collect();
        let (left, log) = (Arc::new(Mutex::new(left)), Arc::default());
        Self { instance, version: 2, sectors: Arc::clone(sectors), left, log }
    }

    fn note(&self, what: String) {
        self.log.lock().unwrap().push(what);
    }

    fn send(&self, out: &mut dyn Sink, budget: u64) -> Result<(), MigrationError> {
        let (mut bytes, sectors) = (Vec::new(), self.sectors.lock().unwrap());
        while (bytes.len() as u64) < budget {
            let Some(sector) = self.left.lock().unwrap().pop() else { break };
            bytes.put_be64(sector as u64);
            bytes.put(&sectors[sector]);
        }
        bytes.put_be64(END);
        out.write(&bytes).map_err(MigrationError::io("send sectors"))
    }
}

impl SaveHandler for Disk {
    fn idstr(&self) -> &str {
        "disk"
    }

    fn instance_id(&self) -> u32 {
        self.instance
    }

    fn version_id(&self) -> u32 {
        self.version
    }

    fn setup(&mut self, out: &mut dyn Sink) -> Result<(), MigrationError> {
        let mut bytes = Vec::new();
        bytes.put_be64(self.sectors.lock().unwrap().len() as u64);
        if self.version > 1 {
            bytes.put_be32(SECTOR as u32);
        }
        out.write(&bytes).map_err(MigrationError::io("send"))
    }

    fn pending_estimate(&self) -> u64 {
        (self.left.lock().unwrap().len() * SECTOR) as u64
    }

    fn pending_exact(&mut self) -> Result<u64, MigrationError> {
        self.note("exact".to_owned());
        Ok(self.pending_estimate())
    }

    fn iterate(&mut self, out: &mut dyn Sink, budget: u64) -> Result<(), MigrationError> {
        self.note(format!("iterate {budget}"));
        self.send(out, budget)
    }

    fn complete(&mut self, out: &mut dyn Sink) -> Result<(), MigrationError> {
        self.note("complete".to_owned());
        self.send(out, u64::MAX)
    }

    fn cleanup(&mut self) {
        self.note("cleanup".to_owned());
    }
}

impl LoadHandler for Disk {
    fn idstr(&self) -> &str {
        "disk"
    }

    fn instance_id(&self) -> u32 {
        self.instance
    }

    fn version_id(&self) -> u32 {
        self.version
    }

    fn minimum_version_id(&self) -> u32 {
        1
    }

    fn load_setup(&mut self) -> Result<(), MigrationError> {
        Ok(())
    }

    fn load(
        &mut self,
        kind: SectionKind,
        version_id: u32,
        reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        self.note(format!("{kind:?} {version_id}"));
        let mut sectors = self.sectors.lock().unwrap();
        if kind == SectionKind::Start {
            assert_eq!(reader.be64("sectors")?, sectors.len() as u64);
            if version_id > 1 {
                assert_eq!(reader.be32("bytes of a sector")?, SECTOR as u32);
            }
            return Ok(());
        }
        loop {
            match reader.be64("a sector")? {
                END => return Ok(()),
                sector => reader.read_exact(&mut sectors[sector as usize], "a sector")?,
            }
        }
    }

    fn complete(&mut self) -> Result<(), MigrationError> {
        self.note("complete".to_owned());
        Ok(())
    }

    fn cleanup(&mut self) {
        self.note("cleanup".to_owned());
    }
}

impl HandlerFailed for Witness {
    fn handler_failed(&self, error: &MigrationError) {
        panic!("{error}");
    }
}

/// Migrates RAM and disks.
pub(super) fn run(
    from: &Side,
    to: &Side,
    disks: [&[Disk]; 2],
    when: Option<SwitchWhen>,
) -> (Outcome, Outcome) {
    let (near, far) = UnixStream::pair().unwrap();
    let options = ListOptions { ignore_shared: false, postcopy: when.is_some() };
    let (blocks, theirs) = (Arc::clone(&to.blocks), disks[1].to_vec());
    let there = thread::spawn(move || {
        let progress = Arc::new(Progress::new());
        let guest = Arc::new(Witness::default());
        let ram = RamLoad::new(Arc::clone(&blocks), options, Arc::clone(&progress));
        let mut handlers: Vec<Box<dyn LoadHandler>> = vec![Box::new(ram)];
        handlers.extend(theirs.into_iter().map(|disk| Box::new(disk) as Box<dyn LoadHandler>));
        let postcopy = PostcopyIncoming {
            blocks,
            urgent: None,
            reconnect: Box::new(GiveUp),
            failed: Arc::clone(&guest) as Arc<dyn HandlerFailed>,
            listening: None,
        };
        let incoming = Incoming {
            configuration: Configuration::new("test"),
            guest: &*guest,
            handlers,
            devices: &mut NoDevices,
            postcopy: when.map(|_| postcopy),
            progress: Arc::clone(&progress),
        };
        incoming.run(Channel::new(far, progress).unwrap())
    });
    let progress = Arc::new(Progress::new());
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Script>::default() };
    let ram = RamSave::new(&from.blocks, options, Arc::clone(&progress), tracker).unwrap();
    let ours = disks[0].iter().map(|disk| Box::new(disk.clone()) as Box<dyn SaveHandler>);
    let mut handlers: Vec<Box<dyn SaveHandler>> = ours.collect();
    handlers.insert(handlers.len().min(1), Box::new(ram));
    let outgoing = Outgoing {
        parameters: parameters(),
        guest: &Witness::default(),
        handlers,
        devices: &mut NoDevices,
        postcopy: when.map(|when| PostcopyOutgoing {
            when,
            urgent: None,
            reconnect: Box::new(GiveUp),
        }),
        progress: Arc::clone(&progress),
    };
    let sent = outgoing.run(Channel::new(near, Arc::clone(&progress)).unwrap());
    let sent = sent.map_err(|failed| failed.error);
    (sent, there.join().unwrap())
}

fn filled() -> Side {
    let from = Side::new(&[1, 4, 5]);
    fill(&from.region, 64..96, 7);
    fill(&from.boot, 3..5, 5);
    from
}

#[test]
fn handlers_beside_ram_go_along_each_instance_by_itself() {
    for when in [None, Some(SwitchWhen::AtOnce), Some(SwitchWhen::Rounds(0))] {
        let (from, to) = (filled(), Side::new(&[1, 4, 5]));
        let source = [sectors(900, 3), sectors(17, 4)];
        let destination = [sectors(900, 0), sectors(17, 0)];
        let ours = [Disk::new(0, &source[0]), Disk::new(7, &source[1])];
        // In another order than they come.
        let theirs = [Disk::new(7, &destination[1]), Disk::new(0, &destination[0])];
        let (sent, received) = run(&from, &to, [&ours, &theirs], when);
        sent.unwrap();
        received.unwrap();
        for (from, to) in source.iter().zip(&destination) {
            assert!(*from.lock().unwrap() == *to.lock().unwrap(), "{when:?}");
        }
        assert_eq!(to.page(95), [7; 4096]);
        for disk in &ours {
            let log = disk.log.lock().unwrap();
            assert_eq!(log.iter().filter(|call| *call == "complete").count(), 1, "{log:?}");
            assert!(log.iter().any(|call| call.starts_with("iterate ")), "{log:?}");
            assert_eq!(log.last().map(String::as_str), Some("cleanup"));
            if when.is_none() {
                assert!(log.iter().any(|call| call == "exact"), "{log:?}");
            }
        }
        let log = theirs[0].log.lock().unwrap();
        assert_eq!(log.first().map(String::as_str), Some("Start 2"));
        let end = log.iter().position(|call| call == "End 2").unwrap();
        assert_eq!(log[end + 1..], ["complete", "cleanup"]);
    }
}

#[test]
fn a_handler_is_told_an_older_version_and_a_newer_one_is_refused() {
    let outcome = |version: u32| {
        let (from, to) = (filled(), Side::new(&[1, 4, 5]));
        let (source, destination) = (sectors(3, 3), sectors(3, 0));
        let ours = Disk { version, ..Disk::new(0, &source) };
        let theirs = Disk::new(0, &destination);
        let (_, received) = run(&from, &to, [&[ours], std::slice::from_ref(&theirs)], None);
        let log = theirs.log.lock().unwrap().clone();
        (received.map_err(|error| error.to_string()), log)
    };
    let (received, log) = outcome(1);
    received.unwrap();
    assert_eq!((&*log[0], &*log[log.len() - 3]), ("Start 1", "End 1"));
    for version in [0, 3] {
        let error = outcome(version).0.unwrap_err();
        let expected = format!("version {version}; 1 to 2 are understood");
        assert!(error.starts_with("section \"disk\"") && error.ends_with(&expected), "{error}");
    }
}

#[test]
fn instances_are_told_apart_and_unknown_ones_refused() {
    let (from, to) = (filled(), Side::new(&[1, 4, 5]));
    let disk = Disk::new(2, &sectors(3, 3));
    let (_, received) =
        run(&from, &to, [std::slice::from_ref(&disk), &[Disk::new(1, &sectors(3, 0))]], None);
    let error = received.unwrap_err().to_string();
    assert!(error.ends_with("instance 2 is not known as a Start section"), "{error}");
    // Two of one instance are refused before anything is sent.
    let (sent, _) =
        run(&from, &to, [&[disk.clone(), disk.clone()], std::slice::from_ref(&disk)], None);
    let error = sent.unwrap_err().to_string();
    assert!(error.contains("\"disk\" are of instance 2"), "{error}");
    let (_, received) = run(&from, &to, [&[], &[disk.clone(), disk]], None);
    let error = received.unwrap_err().to_string();
    assert!(error.ends_with("two handlers here are of this id string and instance"), "{error}");
}

#[test]
fn pages_of_zeros_count_as_what_less_is_left() {
    let from = Side::new(&[0]);
    fill(&from.region, 0..50, 0);
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Script>::default() };
    let progress = Arc::new(Progress::new());
    let ram = RamSave::new(&from.blocks, ListOptions::default(), progress, tracker).unwrap();
    let mut all: handlers::Handlers<'_> = vec![Box::new(ram)];
    let mut out = CountedStream::default();
    let mut framing = Framing::begin(&mut out, &Configuration::new("test")).unwrap();
    framing.start(&mut out, &mut *all[0]).unwrap();
    let before = out.written();
    let handled = handlers::iterate(&mut all, &mut out, &framing, u64::MAX).unwrap();
    assert_eq!(handled, 50 * PAGE);
    assert!(out.written() - before < PAGE);
}

#[test]
fn the_budget_is_shared_and_what_one_leaves_is_the_others() {
    let disks = [1, 0, 100, 100].map(|count| Disk::new(count, &sectors(count as usize, 1)));
    let mut all: handlers::Handlers<'_> =
        disks.iter().map(|disk| Box::new(disk.clone()) as Box<dyn SaveHandler>).collect();
    let mut out = BufferSink::default();
    let framing = Framing::begin(&mut out, &Configuration::new("test")).unwrap();
    handlers::iterate(&mut all, &mut out, &framing, 30_000).unwrap();
    let budgets: Vec<u64> = disks
        .iter()
        .flat_map(|disk| disk.log.lock().unwrap().clone())
        .map(|call| call.strip_prefix("iterate ").unwrap().parse().unwrap())
        .collect();
    // The first leaves most of its third; the second has nothing left, and is not asked.
    let (first, second, third) = (budgets[0], budgets[1], budgets[2]);
    assert_eq!((budgets.len(), first), (3, 10_000));
    assert!((14_000..15_000).contains(&second), "{second}");
    assert!((14_000..15_000).contains(&third), "{third}");
    let mut reader = WireReader::new(&out.bytes[..]);
    read_header(&mut reader).unwrap();
}
