//! Clients of the discard channel: good, slow, refusing, dying, and those that freeze block state.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use ram_discard::{FreezeFor, FrozenBlockState, RamDiscardListener, RamDiscardManager, Section};
use virtio_mem::discard_channel::RemoteRamDiscardManager;

use crate::soak::host::{BLOCK, REGION};
use crate::soak::random::Random;
use crate::soak::world::{World, lock};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Good,
    Slow,
    Refusing,
    Dying,
}

pub(super) fn turn(world: &World, random: &mut Random) {
    let at = world.guest().0;
    let _counted = world.hosts[at].client();
    let Ok(stream) = UnixStream::connect(world.hosts[at].discard_socket()) else { return };
    let Ok(handle) = stream.try_clone() else { return };
    let Ok(manager) = RemoteRamDiscardManager::attach(stream, Duration::from_secs(5)) else {
        // The daemon is not there, or has no place.
        world.journal.count("discard clients turned away", 1);
        return;
    };
    let kind = random.pick(&[Kind::Good, Kind::Good, Kind::Slow, Kind::Refusing, Kind::Dying]);
    world.journal.did("discard clients", format_args!("{kind:?}"));
    let told =
        Arc::new(Mutex::new(Told { blocks: vec![false; (REGION / BLOCK) as usize], wrong: None }));
    let random_of_listener = Random::of(random.next(), 0);
    let listener = Client { kind, told: told.clone(), random: random_of_listener, stream: handle };
    let Some(region) = Section::new(0, REGION) else { return };
    if manager.register(region, Box::new(listener)).is_ok() {
        let mut hanging = Vec::new();
        for _ in 0..1 + random.below(4) {
            let time = random.millis(20, 600);
            world.journal.sleep(time);
            // A host that a guest comes to must not be frozen: it would refuse the guest.
            if random.percent(50) && world.guest().0 == at {
                hanging.extend(freeze(world, random, &manager, &told));
            }
        }
    }
    if let Some(wrong) = lock(&told).wrong.take() {
        world.journal.violated("a listener is told each block once", wrong);
    }
}

/// Freezes block state; while it is, what the listener was told is what is populated. A client that
/// does not thaw hangs, frozen, until it goes.
fn freeze(
    world: &World,
    random: &mut Random,
    manager: &RemoteRamDiscardManager,
    told: &Mutex<Told>,
) -> Option<FrozenBlockState> {
    // Else it was dropped, or the daemon is gone.
    let frozen = manager.freeze(FreezeFor::Source).ok()?;
    world.journal.did("discard clients freeze", "");
    let mut populated = vec![true; (REGION / BLOCK) as usize];
    for discarded in Section::new(0, REGION).iter().flat_map(|all| frozen.discarded(*all)) {
        populated[blocks(discarded)].fill(false);
    }
    let told = lock(told).blocks.clone();
    // A connection that is lost meanwhile thaws.
    if frozen.check().is_ok() && told != populated {
        let wrong: Vec<_> = (0..told.len()).filter(|at| told[*at] != populated[*at]).collect();
        let detail = format!("they differ in blocks {wrong:?}");
        world.journal.violated("what a listener was told is what is populated", detail);
    }
    let time = if random.percent(20) { random.millis(500, 2500) } else { random.millis(0, 300) };
    world.journal.sleep(time);
    if random.percent(70) {
        let _ = frozen.thaw();
        return None;
    }
    Some(frozen)
}

/// A client that says nothing, half a message, or nonsense.
pub(super) fn garbage(world: &World, random: &mut Random) {
    let Ok(mut stream) = UnixStream::connect(world.host().discard_socket()) else { return };
    let _ = stream.set_write_timeout(Some(Duration::from_millis(100)));
    let mut bytes = [1u8, 0, 0, 0, 16, 0, 0, 0].to_vec();
    bytes.extend(b"VMEMDISC\x01\0\x02\0\0\0\0\0");
    match random.below(4) {
        0 => bytes.clear(),
        1 => bytes.truncate(random.below(24) as usize),
        2 => bytes[random.below(24) as usize] = random.next() as u8,
        // Acknowledges what it was not asked.
        _ => bytes.extend([2, 0, 0, 0, 8, 0, 0, 0, 99, 0, 0, 0, 0, 0, 0, 0]),
    }
    let _ = stream.write_all(&bytes);
    world.journal.did("discard clients that send nonsense", bytes.len());
    let time = random.millis(0, 1500);
    world.journal.sleep(time);
}

/// What a listener was told.
struct Told {
    blocks: Vec<bool>,
    wrong: Option<String>,
}

struct Client {
    kind: Kind,
    told: Arc<Mutex<Told>>,
    random: Random,
    stream: UnixStream,
}

impl Client {
    fn behave(&mut self) {
        match self.kind {
            Kind::Slow if self.random.percent(50) => thread::sleep(self.random.millis(0, 400)),
            Kind::Dying if self.random.percent(10) => {
                let _ = self.stream.shutdown(Shutdown::Both);
            }
            _ => {}
        }
    }
}

impl RamDiscardListener for Client {
    fn name(&self) -> &str {
        "soak"
    }

    fn notify_populate(&mut self, section: Section) -> Result<(), String> {
        self.behave();
        let refuses = self.kind == Kind::Refusing && self.random.percent(30);
        let mut told = lock(&self.told);
        if told.blocks[blocks(section)].contains(&true) {
            told.wrong.get_or_insert(format!("{section} is populated a second time"));
        }
        if refuses {
            return Err("not now".to_owned());
        }
        told.blocks[blocks(section)].fill(true);
        Ok(())
    }

    fn notify_discard(&mut self, section: Section) {
        self.behave();
        lock(&self.told).blocks[blocks(section)].fill(false);
    }
}

fn blocks(section: Section) -> std::ops::Range<usize> {
    (section.start() / BLOCK) as usize..section.end().div_ceil(BLOCK) as usize
}
