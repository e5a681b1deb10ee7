//! What it costs to be in another process than the device: replays from the shared bitmap against
//! those of the manager beside the device; and what a listener that acknowledges adds to a guest
//! request, against a bare request and response over such a socket.

#[expect(dead_code, reason = "each bench uses its part")]
mod common;
#[path = "common/guest.rs"]
mod guest;

use std::hint::black_box;
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use common::{compare, head, report, time};
use guest::{ADDR, BLOCK, Guest, on_cpus, ram, samples, start, stay_on};
use ram_discard::{MemoryState, RamDiscardListener, RamDiscardManager, Section};
use small_vmm::daemon::{Daemon, DaemonOptions};
use tempfile::TempDir;
use vhost_user_mem::discard_channel::DiscardChannel;
use vhost_user_mem::metrics::Metrics;
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{BlockBitmap, DeviceState, Geometry, VirtioMem};
use virtio_mem::discard_channel::RemoteRamDiscardManager;

/// With this argument and a path, the bench is the peer.
const ECHO: &str = "--echo-socket";
const PATIENCE: Duration = Duration::from_secs(10);

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const REGION: u64 = GIB;
const RUNS: usize = 11;
/// Pairs of requests in a round.
const SAMPLES: usize = 1000;
/// Bytes of the message that tells a section, and of the answer to it.
const TELL: usize = 32;
const ACK: usize = 16;

/// A device and its channel, and a client of it.
struct Rig {
    local: Arc<MemController>,
    remote: RemoteRamDiscardManager,
    _channel: DiscardChannel,
    _dir: TempDir,
}

impl Rig {
    /// A region of which `is_plugged` tells the plugged blocks.
    fn new(region: u64, is_plugged: impl Fn(usize) -> bool) -> anyhow::Result<Self> {
        let geometry = Geometry::new(TIB, region, BLOCK, None)?;
        let mut blocks = BlockBitmap::new(geometry.nr_blocks());
        (0..geometry.nr_blocks())
            .filter(|&block| is_plugged(block))
            .for_each(|block| blocks.set(block..block + 1, true));
        let state = DeviceState {
            requested_size: region,
            usable_region_size: region,
            plugged: blocks.words().to_vec(),
        };
        let device = VirtioMem::restore(geometry, state)?;
        let local = Arc::new(MemController::new(InitialState::volatile(device)));
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("discard");
        let channel = DiscardChannel::bind(&path, Arc::clone(&local), Arc::new(Metrics::new()))?;
        channel.start()?;
        let remote = RemoteRamDiscardManager::attach(UnixStream::connect(path)?, PATIENCE)?;
        Ok(Self { local, remote, _channel: channel, _dir: dir })
    }
}

/// How many ranges there are.
fn replay(manager: &dyn RamDiscardManager, section: Section, state: MemoryState) -> u64 {
    let mut ranges = 0;
    let mut visit = |range| {
        black_box(range);
        ranges += 1;
        ControlFlow::Continue(())
    };
    let _ = match state {
        MemoryState::Populated => manager.replay_populated(section, &mut visit).unwrap(),
        MemoryState::Discarded => manager.replay_discarded(section, &mut visit).unwrap(),
    };
    ranges
}

fn replays() -> anyhow::Result<()> {
    type State = (&'static str, u64, fn(usize) -> bool);
    let states: [State; 6] = [
        ("1 GiB, all plugged", GIB, |_| true),
        ("1 GiB, every other block", GIB, |block| block % 2 == 0),
        ("1 TiB, all plugged", TIB, |_| true),
        ("1 TiB, the first GiB plugged", TIB, |block| block < 512),
        ("1 TiB, every other 128 MiB", TIB, |block| block / 64 % 2 == 0),
        ("1 TiB, every other block", TIB, |block| block % 2 == 0),
    ];
    head("Replays by a client, from the shared bitmap", "in process");
    for (name, region, is_plugged) in states {
        let rig = Rig::new(region, is_plugged)?;
        let local: &dyn RamDiscardManager = &**rig.local.manager();
        let whole = Section::new(0, region).context("a region")?;
        let times = if region == GIB { 256 } else { 8 };
        for (kind, state) in
            [("populated", MemoryState::Populated), ("discarded", MemoryState::Discarded)]
        {
            let found = replay(&rig.remote, whole, state);
            assert_eq!(found, replay(local, whole, state));
            compare(
                &format!("replay_{kind}, {name}"),
                RUNS,
                || time(times, || _ = replay(&rig.remote, whole, state)),
                || time(times, || _ = replay(local, whole, state)),
            );
        }
        let block = Section::new(region / 2, BLOCK).context("a block")?;
        compare(
            &format!("is_populated of a block, {name}"),
            RUNS,
            || time(1024, || _ = black_box(rig.remote.is_populated(block).unwrap())),
            || time(1024, || _ = black_box(local.is_populated(block).unwrap())),
        );
    }
    Ok(())
}

struct Listener;

impl RamDiscardListener for Listener {
    fn name(&self) -> &str {
        "bench"
    }

    fn notify_populate(&mut self, _section: Section) -> Result<(), String> {
        Ok(())
    }

    fn notify_discard(&mut self, _section: Section) {}
}

/// So many clients of a daemon, each with a listener.
fn listen(daemon: &Daemon, count: usize) -> anyhow::Result<Vec<RemoteRamDiscardManager>> {
    let attach = || {
        let stream = UnixStream::connect(daemon.discard_socket())?;
        let manager = RemoteRamDiscardManager::attach(stream, PATIENCE)?;
        let whole = Section::new(0, REGION).context("a region")?;
        manager.register(whole, Box::new(Listener))?;
        Ok(manager)
    };
    (0..count).map(|_| attach()).collect()
}

/// The peer: takes messages and answers them, in a process of its own as the daemon is.
struct Echo {
    child: Child,
    stream: UnixStream,
    _dir: TempDir,
}

impl Echo {
    fn start() -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path)?;
        let child = Command::new(std::env::current_exe()?).arg(ECHO).arg(path).spawn()?;
        let (stream, _) = listener.accept()?;
        Ok(Self { child, stream, _dir: dir })
    }

    fn serve(path: &Path) -> anyhow::Result<()> {
        let mut stream = UnixStream::connect(path)?;
        let mut message = [0; TELL];
        // Until the other side has left.
        while stream.read_exact(&mut message).is_ok() {
            stream.write_all(&[0; ACK])?;
        }
        Ok(())
    }

    fn ask(&mut self) {
        self.stream.write_all(&[0; TELL]).unwrap();
        self.stream.read_exact(&mut [0; ACK]).unwrap();
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Requests of a guest whose VMM listens, and of one whose VMM does not.
fn requests(cpus: &str, driver: usize, back_end: usize) -> anyhow::Result<()> {
    stay_on(back_end)?;
    let options = DaemonOptions::new(ADDR, REGION).requested_size(REGION).discard_socket();
    let daemons = [0, 1, 4].map(|listeners| (listeners, start(options.clone())));
    let mut echo = Echo::start()?;
    stay_on(driver)?;
    let mut alone = None;
    let mut listening = Vec::new();
    for (listeners, daemon) in daemons {
        let daemon = daemon?;
        let guest = Guest::connect(&daemon.socket(), &ram(REGION)?)?;
        let clients = listen(&daemon, listeners)?;
        match listeners {
            0 => alone = Some((guest, daemon)),
            _ => listening.push((listeners, guest, clients, daemon)),
        }
    }
    let (mut alone, _daemon) = alone.context("the first one")?;
    let median = |work: &mut dyn FnMut()| samples(SAMPLES, work)[SAMPLES / 2];
    let mut rows = Vec::new();
    for (listeners, guest, clients, _) in &mut listening {
        let rounds: Vec<_> = (0..=RUNS)
            .map(|_| {
                let with = median(&mut || guest.plug_and_unplug());
                let without = median(&mut || alone.plug_and_unplug());
                let bare = median(&mut || (0..2).for_each(|_| echo.ask()));
                (with, without, bare)
            })
            .skip(1)
            .collect();
        assert!(clients.iter().all(|client| client.lost().is_none()), "no client was dropped");
        rows.push((*listeners, rounds));
    }
    head(&format!("PLUG then UNPLUG, told to listeners, {cpus}"), "none");
    for (listeners, rounds) in &rows {
        let rounds: Vec<_> = rounds.iter().map(|(with, without, _)| (*with, *without)).collect();
        report(&format!("{listeners} listening, p50"), &rounds);
    }
    head("    what that adds, against two bare requests and responses", "bare");
    for (listeners, rounds) in &rows {
        let added =
            |with: Duration, without| with.saturating_sub(without).max(Duration::from_nanos(1));
        let rounds: Vec<_> =
            rounds.iter().map(|(with, without, bare)| (added(*with, *without), *bare)).collect();
        report(&format!("{listeners} listening"), &rounds);
    }
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args_os().skip(1);
    if args.next().is_some_and(|arg| arg == ECHO) {
        let path = args.next().context("no socket")?;
        return Echo::serve(Path::new(&path));
    }
    replays()?;
    on_cpus(requests)
}
