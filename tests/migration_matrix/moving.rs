//! A guest that is moved over sockets: the two ends, and channels that break.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use migration::dirty::{DirtyTracker, WriteProtect};
use migration::lazy::HandlerFailed;
use migration::postcopy::{Channels, PostcopyIncoming, PostcopyOutgoing, Reconnect, SwitchWhen};
use migration::ram::{ListOptions, MigrationBlock, PageChannels, RamLoad, RamSave};
use migration::stream::{CAPABILITY_MULTIFD, CAPABILITY_MULTIFD_ZSTD, Configuration};
use migration::{Channel, Incoming, MigrationError, MigrationInfo, Outgoing, Parameters, Progress};

use crate::device::{Reserving, Sending};
use crate::guest::Vm;
use crate::memory::Side;

/// How pages go before the guest is handed over.
#[derive(Clone, Copy, Debug)]
pub enum PageWay {
    /// On the main channel.
    Main,
    /// Over so many channels of their own.
    Channels(usize),
    /// Over so many, compressed.
    Compressed(usize),
}

impl PageWay {
    fn channels(self) -> usize {
        match self {
            Self::Main => 0,
            Self::Channels(count) | Self::Compressed(count) => count,
        }
    }

    fn capabilities(self) -> &'static [&'static str] {
        match self {
            Self::Main => &[],
            Self::Channels(_) => &[CAPABILITY_MULTIFD],
            Self::Compressed(_) => &[CAPABILITY_MULTIFD, CAPABILITY_MULTIFD_ZSTD],
        }
    }
}

pub type Sent = Result<MigrationInfo, MigrationError>;
pub type Received = Result<(), MigrationError>;

/// Migrates over the first of `links`, and after each break over the next, before which the
/// destination calls `between`; how it ended on both sides.
pub fn run(
    from: &Side,
    to: &Side,
    here: &Arc<Vm>,
    there: &Arc<Vm>,
    when: Option<SwitchWhen>,
    links: Vec<(UnixStream, UnixStream)>,
    between: impl FnMut() + Send + 'static,
) -> (Sent, Received) {
    run_by(from, to, (here, there), (when, PageWay::Main), links, between)
}

/// As [`run`], with the pages of precopy on this way.
pub fn run_by(
    from: &Side,
    to: &Side,
    (here, there): (&Arc<Vm>, &Arc<Vm>),
    (when, way): (Option<SwitchWhen>, PageWay),
    links: Vec<(UnixStream, UnixStream)>,
    between: impl FnMut() + Send + 'static,
) -> (Sent, Received) {
    let mut configuration = Configuration::new("matrix");
    configuration.capabilities.extend(way.capabilities().iter().map(|&name| name.to_owned()));
    if way.channels() != 0 {
        configuration.uuid = Some([9; 16]);
    }
    let (near, far): (Vec<_>, Vec<_>) =
        (0..way.channels()).map(|_| UnixStream::pair().unwrap()).unzip();
    let theirs = configuration.clone();
    let options = ListOptions { postcopy: when.is_some(), ..ListOptions::default() };
    let ((tell_here, here_hears), (tell_there, there_hears)) = (channel(), channel());
    let mut first = None;
    for main in links {
        let urgent = UnixStream::pair().unwrap();
        if first.is_none() {
            first = Some((main, urgent));
        } else {
            tell_here.send((main.0, urgent.0)).unwrap();
            tell_there.send((main.1, urgent.1)).unwrap();
        }
    }
    drop((tell_here, tell_there));
    let (main, urgent) = first.expect("a link to begin with");
    let (vm, blocks, block) = (Arc::clone(there), Arc::clone(&to.blocks), Arc::clone(&to.block));
    let device = Arc::clone(&to.device);
    let receiving = thread::spawn(move || {
        vm.start();
        let progress = Arc::new(Progress::new());
        let mut ram = RamLoad::new(Arc::clone(&blocks), options, Arc::clone(&progress));
        if !far.is_empty() {
            ram = ram.with_channels(page_channels(far, &progress));
        }
        let postcopy = when.map(|_| PostcopyIncoming {
            blocks,
            urgent: Some(Channel::new(urgent.1, Arc::clone(&progress)).unwrap()),
            reconnect: Box::new(Next(there_hears, Arc::clone(&progress), Box::new(between))),
            failed: Arc::clone(&vm) as Arc<dyn HandlerFailed>,
            listening: None,
        });
        Incoming {
            configuration: theirs,
            guest: &*vm,
            handlers: vec![Box::new(ram)],
            devices: &mut Reserving(block, device),
            postcopy,
            progress: Arc::clone(&progress),
        }
        .run(Channel::new(main.1, progress).unwrap())
    });
    let progress = Arc::new(Progress::new());
    let tracker = |block: &MigrationBlock| -> Box<dyn DirtyTracker> {
        let (mapping, ram) = (Arc::clone(block.mapping()), Arc::clone(block.ram()));
        Box::new(WriteProtect::new(mapping, Some(ram)).unwrap())
    };
    let mut ram = RamSave::new(&from.blocks, options, Arc::clone(&progress), tracker).unwrap();
    if !near.is_empty() {
        ram = ram.with_channels(page_channels(near, &progress));
    }
    let postcopy = when.map(|when| PostcopyOutgoing {
        when,
        urgent: Some(Channel::new(urgent.0, Arc::clone(&progress)).unwrap()),
        reconnect: Box::new(Next(here_hears, Arc::clone(&progress), Box::new(|| {}))),
    });
    let mut parameters = Parameters::new(configuration);
    // The vCPUs never rest, so that precopy has to stop them with something left.
    // A page of 1 GiB is dirty as a whole with every byte, and mostly zeros, which makes the channel look slow.
    let gigantic = from.block.page_size() >= 1 << 30;
    parameters.downtime_limit = Duration::from_secs(if gigantic { 2000 } else { 2 });
    let sending = Arc::clone(&progress);
    let outgoing = Outgoing {
        parameters,
        guest: &**here,
        handlers: vec![Box::new(ram)],
        devices: &mut Sending(Arc::clone(&from.device)),
        postcopy,
        progress: Arc::clone(&progress),
    };
    let sent = outgoing.run(Channel::new(main.0, progress).unwrap());
    let sent = sent.map(|()| sending.snapshot()).map_err(|failed| failed.error);
    (sent, receiving.join().unwrap())
}

fn page_channels(streams: Vec<UnixStream>, progress: &Arc<Progress>) -> PageChannels {
    let channel = |stream| Channel::new(stream, Arc::clone(progress)).unwrap();
    PageChannels::new(streams.into_iter().map(channel).collect()).unwrap()
}

/// Channels that were made before.
struct Next(
    Receiver<(UnixStream, UnixStream)>,
    Arc<Progress>,
    /// Called before each is used.
    Box<dyn FnMut() + Send>,
);

impl Reconnect for Next {
    fn reconnect(&mut self, _error: &MigrationError) -> Option<Channels> {
        let (main, urgent) = self.0.recv().ok()?;
        (self.2)();
        let channel = |stream| Channel::new(stream, Arc::clone(&self.1)).unwrap();
        Some(Channels { main: channel(main), urgent: Some(channel(urgent)) })
    }
}
