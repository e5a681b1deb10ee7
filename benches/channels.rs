//! Precopy over channels of its own, over TLS, and compressed: time and processor time against one channel, with
//! one core and with two, and against bare loops over the same sockets, which use the same libraries.

#[expect(dead_code, reason = "each bench uses its part")]
mod common;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use migration::dirty::{DirtyTracker, NeverWritten};
use migration::ram::{
    BlockOptions, ListOptions, MigrationBlock, PageChannels, RamBlocks, RamLoad, RamSave,
};
use migration::stream::{CAPABILITY_MULTIFD, CAPABILITY_MULTIFD_ZSTD, Configuration};
use migration::{
    Channel, Incoming, NoDevices, Outgoing, Parameters, Progress, TlsClient, TlsServer,
};
use ram_discard::memory::RamBlock;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
};
use tempfile::TempDir;
use zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd_safe::{CCtx, CParameter, DCtx, InBuffer, OutBuffer};

use common::{Idle, Kind, memfd, pair};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const SIZE: u64 = 4 * GIB;
const TOUCHED: u64 = 512 * MIB;
const RUNS: usize = 5;
/// What a bare loop moves at once.
const PIECE: usize = 512 << 10;
const NAME: &str = "localhost";

struct Side {
    file: File,
    block: Arc<MigrationBlock>,
    blocks: Arc<RamBlocks>,
}

fn side() -> Side {
    let file = memfd(SIZE);
    let ram = RamBlock::new("ram".into(), 0, SIZE, file.try_clone().unwrap(), 0).unwrap();
    let block = Arc::new(MigrationBlock::map(Arc::new(ram), BlockOptions::migratable()).unwrap());
    let mut blocks = RamBlocks::new();
    blocks.register(Arc::clone(&block)).unwrap();
    Side { file, block, blocks: Arc::new(blocks) }
}

fn fill(side: &Side) {
    let bytes: Vec<u8> = (0..MIB).map(|at| (at % 251) as u8 | 1).collect();
    (0..TOUCHED).step_by(MIB as usize).for_each(|at| side.block.mapping().write(at, &bytes));
}

/// Fills with words that come again, and nothing else within what a stream of zstd refers to.
fn fill_with_words(side: &Side) {
    let mut state = 1u64;
    let numbers = std::iter::repeat_with(|| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        state >> 33
    });
    let words = numbers.flat_map(|number| format!("word {}, ", number % 1013).into_bytes());
    let bytes: Vec<u8> = words.take(8 * MIB as usize).collect();
    (0..TOUCHED).step_by(bytes.len()).for_each(|at| side.block.mapping().write(at, &bytes));
}

/// Touches and frees as much memory as a run takes, so that the host has it at hand.
fn warm() {
    fill(&side());
}

/// Time and processor time, of all threads of this process.
#[derive(Clone, Copy)]
struct Cost {
    elapsed: Duration,
    cpu: Duration,
}

impl Cost {
    fn of(work: impl FnOnce()) -> Self {
        let cpu = || Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap();
        let (start, before) = (Instant::now(), cpu());
        work();
        Self { elapsed: start.elapsed(), cpu: cpu() - before }
    }
}

/// How pages travel.
#[derive(Clone, Copy)]
struct Link<'a> {
    kind: Kind,
    /// Channels of their own; none: the main one.
    channels: usize,
    tls: Option<&'a Certificates>,
    /// Whether pages are compressed, which only channels of their own can have.
    zstd: bool,
}

/// The folder with the certificates, and what was read of it.
struct Certificates {
    dir: TempDir,
    client: TlsClient,
    server: TlsServer,
}

impl Certificates {
    fn new() -> Self {
        let dir = small_vmm::demo::certificates::make().unwrap();
        let client = TlsClient::from_dir(dir.path(), NAME).unwrap();
        let server = TlsServer::from_dir(dir.path()).unwrap();
        Self { dir, client, server }
    }
}

impl Link<'_> {
    fn configuration(self) -> Configuration {
        let mut configuration = Configuration::new("bench");
        if self.channels != 0 {
            configuration.capabilities.push(CAPABILITY_MULTIFD.to_owned());
            configuration.uuid = Some([0x5a; 16]);
        }
        if self.zstd {
            configuration.capabilities.push(CAPABILITY_MULTIFD_ZSTD.to_owned());
        }
        configuration
    }

    /// The main channel of the source, and those for pages.
    fn here(self, ends: Vec<OwnedFd>, progress: &Arc<Progress>) -> (Channel, Option<PageChannels>) {
        channels(ends, |end| match self.tls {
            None => Channel::new(end, Arc::clone(progress)).unwrap(),
            Some(tls) => tls.client.connect(end, progress).unwrap(),
        })
    }

    /// Those of the destination.
    fn there(
        self,
        ends: Vec<OwnedFd>,
        progress: &Arc<Progress>,
    ) -> (Channel, Option<PageChannels>) {
        channels(ends, |end| match self.tls {
            None => Channel::new(end, Arc::clone(progress)).unwrap(),
            Some(tls) => tls.server.accept(end, progress).unwrap(),
        })
    }

    /// Moves the guest to a fresh side. The connections are there before.
    fn migrate(self, from: &Side) -> Cost {
        warm();
        let to = side();
        let (near, far): (Vec<_>, Vec<_>) = (0..=self.channels).map(|_| pair(self.kind)).unzip();
        let (here, there) = (Arc::new(Progress::new()), Arc::new(Progress::new()));
        let ((main, pages), (main_far, pages_far)) = thread::scope(|scope| {
            let accepting = scope.spawn(|| self.there(far, &there));
            (self.here(near, &here), accepting.join().unwrap())
        });
        let cost = Cost::of(|| {
            thread::scope(|scope| {
                scope.spawn(|| self.receive(&to, main_far, pages_far, there));
                self.send(from, main, pages, here);
            });
        });
        let mut byte = [0];
        to.file.read_exact_at(&mut byte, TOUCHED - 1).unwrap();
        assert_ne!(byte, [0]);
        cost
    }

    fn send(
        self,
        from: &Side,
        main: Channel,
        pages: Option<PageChannels>,
        progress: Arc<Progress>,
    ) {
        let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::new(NeverWritten) };
        let options = ListOptions::default();
        let ram = RamSave::new(&from.blocks, options, Arc::clone(&progress), tracker).unwrap();
        let ram = match pages {
            Some(pages) => ram.with_channels(pages),
            None => ram,
        };
        let outgoing = Outgoing {
            parameters: Parameters::new(self.configuration()),
            guest: &Idle,
            handlers: vec![Box::new(ram)],
            devices: &mut NoDevices,
            postcopy: None,
            progress,
        };
        outgoing.run(main).unwrap();
    }

    fn receive(
        self,
        to: &Side,
        main: Channel,
        pages: Option<PageChannels>,
        progress: Arc<Progress>,
    ) {
        let blocks = Arc::clone(&to.blocks);
        let ram = RamLoad::new(blocks, ListOptions::default(), Arc::clone(&progress));
        let ram = match pages {
            Some(pages) => ram.with_channels(pages),
            None => ram,
        };
        let incoming = Incoming {
            configuration: self.configuration(),
            guest: &Idle,
            handlers: vec![Box::new(ram)],
            devices: &mut NoDevices,
            postcopy: None,
            progress,
        };
        incoming.run(main).unwrap();
    }
}

fn channels(
    ends: Vec<OwnedFd>,
    channel: impl Fn(OwnedFd) -> Channel,
) -> (Channel, Option<PageChannels>) {
    let mut all: Vec<_> = ends.into_iter().map(channel).collect();
    let main = all.remove(0);
    (main, (!all.is_empty()).then(|| PageChannels::new(all).unwrap()))
}

/// Writes as many bytes to as many sockets, each from a thread, and at the other ends into fresh memory.
fn bare(from: &Side, kind: Kind, count: usize) -> Cost {
    let ends: Vec<_> = (0..count).map(|_| pair(kind)).collect();
    let ends = ends.into_iter().map(|(near, far)| (File::from(near), File::from(far)));
    copy(from, ends.collect())
}

/// The same by rustls alone, over one socket. The handshake is not counted.
fn bare_tls(from: &Side, kind: Kind, certificates: &Certificates) -> Cost {
    let dir = certificates.dir.path();
    let file = |name: &str| dir.join(name);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(file("ca-cert.pem")).unwrap()).unwrap();
    let mine = |side: &str| {
        let chain = vec![CertificateDer::from_pem_file(file(&format!("{side}-cert.pem"))).unwrap()];
        (chain, PrivateKeyDer::from_pem_file(file(&format!("{side}-key.pem"))).unwrap())
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = Arc::new(roots);
    let ((client, client_key), (server, server_key)) = (mine("client"), mine("server"));
    let clients = rustls::server::WebPkiClientVerifier::builder_with_provider(
        Arc::clone(&roots),
        Arc::clone(&provider),
    );
    let versions = &[&rustls::version::TLS13];
    let client = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(client, client_key)
        .unwrap();
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_client_cert_verifier(clients.build().unwrap())
        .with_single_cert(server, server_key)
        .unwrap();
    server.send_tls13_tickets = 0;
    let (near, far) = pair(kind);
    let mut client = StreamOwned::new(
        ClientConnection::new(Arc::new(client), ServerName::try_from(NAME).unwrap()).unwrap(),
        File::from(near),
    );
    let mut server =
        StreamOwned::new(ServerConnection::new(Arc::new(server)).unwrap(), File::from(far));
    client.conn.set_buffer_limit(Some(PIECE));
    thread::scope(|scope| {
        scope.spawn(|| {
            while server.conn.is_handshaking() {
                server.conn.complete_io(&mut server.sock).unwrap();
            }
        });
        while client.conn.is_handshaking() {
            client.conn.complete_io(&mut client.sock).unwrap();
        }
    });
    copy(from, vec![(Ending(client), server)])
}

/// A client that says that it ends.
struct Ending(StreamOwned<ClientConnection, File>);

impl Write for Ending {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.conn.send_close_notify();
        self.0.flush().unwrap();
    }
}

/// As [`bare`], over one socket, by zstd alone: as much at once as a packet has, at the engine's usual level.
fn bare_zstd(from: &Side, kind: Kind) -> Cost {
    warm();
    let to = memfd(SIZE);
    let (near, far) = pair(kind);
    let (mut near, mut far) = (File::from(near), File::from(far));
    Cost::of(|| {
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut context = DCtx::create();
                let (mut bytes, mut payload) = (vec![0; PIECE], vec![0; 2 * PIECE]);
                for at in (0..TOUCHED).step_by(PIECE) {
                    let mut len = [0; 4];
                    far.read_exact(&mut len).unwrap();
                    let payload = &mut payload[..u32::from_be_bytes(len) as usize];
                    far.read_exact(payload).unwrap();
                    let mut input = InBuffer::around(payload);
                    let mut output = OutBuffer::around(&mut bytes[..]);
                    while output.pos() < PIECE {
                        context.decompress_stream(&mut output, &mut input).unwrap();
                    }
                    to.write_all_at(&bytes, at).unwrap();
                }
            });
            let mut context = CCtx::create();
            context.set_parameter(CParameter::CompressionLevel(1)).unwrap();
            let (mut bytes, mut payload) = (vec![0; PIECE], vec![0; 2 * PIECE]);
            for at in (0..TOUCHED).step_by(PIECE) {
                from.block.mapping().read(at, &mut bytes);
                let mut output = OutBuffer::around(&mut payload[..]);
                let (mut input, flush) =
                    (InBuffer::around(&bytes), ZSTD_EndDirective::ZSTD_e_flush);
                assert_eq!(context.compress_stream2(&mut output, &mut input, flush), Ok(0));
                let len = output.pos();
                near.write_all(&u32::try_from(len).unwrap().to_be_bytes()).unwrap();
                near.write_all(&payload[..len]).unwrap();
            }
        });
    })
}

fn copy<W: Write + Send, R: Read + Send>(from: &Side, ends: Vec<(W, R)>) -> Cost {
    warm();
    let to = memfd(SIZE);
    let share = TOUCHED / ends.len() as u64;
    Cost::of(|| {
        thread::scope(|scope| {
            for (index, (mut near, mut far)) in ends.into_iter().enumerate() {
                let (start, to) = (share * index as u64, &to);
                scope.spawn(move || {
                    let (mut buffer, mut at) = (vec![0; PIECE], start);
                    loop {
                        let read = far.read(&mut buffer).unwrap();
                        if read == 0 {
                            break;
                        }
                        to.write_all_at(&buffer[..read], at).unwrap();
                        at += read as u64;
                    }
                    assert_eq!(at - start, share);
                });
                scope.spawn(move || {
                    let mut buffer = vec![0; PIECE];
                    for at in (start..start + share).step_by(PIECE) {
                        from.block.mapping().read(at, &mut buffer);
                        near.write_all(&buffer).unwrap();
                    }
                });
            }
        });
    })
}

/// The median of ratios of neighbours, and the medians of both sides; a GiB each.
fn row(what: &str, ours: &dyn Fn() -> Cost, against: &dyn Fn() -> Cost) {
    // The first round warms up.
    let rounds: Vec<_> = (0..=RUNS).map(|_| (ours(), against())).skip(1).collect();
    let middle = |of: &dyn Fn(&(Cost, Cost)) -> f64| {
        let mut values: Vec<_> = rounds.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let a_gib = GIB as f64 / TOUCHED as f64;
    let time = |cost: &Cost| cost.elapsed.as_secs_f64() * a_gib;
    let cpu = |cost: &Cost| cost.cpu.as_secs_f64() * a_gib;
    println!(
        "{what:<46} {:>7.0} {:>7.0} ms/GiB {:>6.2}x   CPU {:>6.3} {:>6.3} s/GiB {:>6.2}x",
        middle(&|round| time(&round.0)) * 1e3,
        middle(&|round| time(&round.1)) * 1e3,
        middle(&|round| time(&round.0) / time(&round.1)),
        middle(&|round| cpu(&round.0)),
        middle(&|round| cpu(&round.1)),
        middle(&|round| cpu(&round.0) / cpu(&round.1)),
    );
}

fn head(title: &str, peer: &str) {
    println!("\n{title}; ours, {peer}, and ours as a multiple");
}

fn main() {
    let from = side();
    fill(&from);
    let certificates = Certificates::new();
    let all = sched_getaffinity(None).unwrap();
    let cpus: Vec<_> = (0..CpuSet::MAX_CPU).filter(|&cpu| all.is_set(cpu)).collect();
    for cores in [1, 2] {
        let Some(used) = cpus.get(..cores) else { break };
        let mut set = CpuSet::new();
        used.iter().for_each(|&cpu| set.set(cpu));
        // Of this thread and those that it starts.
        sched_setaffinity(None, &set).unwrap();
        for (name, kind) in [("Unix socket", Kind::Unix), ("TCP loopback", Kind::Tcp)] {
            let (from, certificates) = (&from, &certificates);
            let by =
                |channels| move || Link { kind, channels, tls: None, zstd: false }.migrate(from);
            head(&format!("Precopy over a {name}, {cores} cores"), "one channel for pages");
            row("no channel but the main one", &by(0), &by(1));
            row("2 channels", &by(2), &by(1));
            row("4 channels", &by(4), &by(1));
            row("a bare loop, one socket", &|| bare(from, kind, 1), &by(1));
            let one = || bare(from, kind, 1);
            row("bare loops, 2 sockets against 1", &|| bare(from, kind, 2), &one);
            row("bare loops, 4 sockets against 1", &|| bare(from, kind, 4), &one);
            let tls = |channels| {
                let tls = Some(certificates);
                move || Link { kind, channels, tls, zstd: false }.migrate(from)
            };
            let bare = || bare_tls(from, kind, certificates);
            head(&format!("TLS 1.3 over a {name}, {cores} cores"), "a bare rustls loop");
            row("the main channel", &tls(0), &bare);
            row("1 channel for pages", &tls(1), &bare);
            row("4 channels for pages", &tls(4), &bare);
        }
    }
    fill_with_words(&from);
    for cores in [1, 2] {
        let Some(used) = cpus.get(..cores) else { break };
        let mut set = CpuSet::new();
        used.iter().for_each(|&cpu| set.set(cpu));
        sched_setaffinity(None, &set).unwrap();
        let (kind, from) = (Kind::Unix, &from);
        let zstd = |channels| move || Link { kind, channels, tls: None, zstd: true }.migrate(from);
        let bare = || bare_zstd(from, kind);
        head(&format!("zstd at level 1 over a Unix socket, {cores} cores"), "a bare loop of zstd");
        row("1 channel for pages", &zstd(1), &bare);
        row("2 channels for pages", &zstd(2), &bare);
    }
    sched_setaffinity(None, &all).unwrap();
}
