//! `vhost-user-mem`: a vhost-user back-end for virtio-mem (device id 24).
//!
//! ```text
//!   front-end ── vhost-user ──> front_door ──> backend, queue ──> MemController (crate virtio-mem)
//!                                                                    ^   │   │
//!   vmemctl ──── HTTP ────────> management ──> service ──────────────┘   │   └──> state_file
//!   other VMMs <── discard ──── discard_channel <── RamDiscardManager <──┘
//! ```
//!
//! - [`args`]: the command line.
//! - [`front_door`]: the connection to the front-end, and config-change messages to it.
//! - [`connection`]: one front-end at a time, from its arrival until it has left.
//! - [`backend`], [`queue`], [`vring`], [`gate`]: the vhost-user device and its queue.
//! - [`worker`]: the end of the queue's worker.
//! - [`device_state`]: the device's state on its way to or from another daemon.
//! - [`postcopy`]: guest memory that is used while it still arrives.
//! - [`resize`]: how the guest is doing with the requested size, and why it stands still.
//! - [`service`]: what the management API sees of the device.
//! - [`discard_channel`]: tells VMMs in other processes what is populated and discarded.
//! - [`management`]: the API's server; [`metrics`].
//! - [`stray`]: sweeps of memory that the guest uses without having plugged it.
//! - [`state_file`]: the device's state between two lives of the daemon.
//! - [`supervision`], [`watchdog`]: the service manager.
//! - [`log`]: lines on stderr that nothing waits for.
//! - `confinement`: which system calls the daemon makes, by thread, and which files it opens.
//!
//! ```
//! use clap::Parser;
//! use vhost_user_mem::args::{Args, Config};
//!
//! let words = "vhost-user-mem --socket-path vm.sock --addr 4G --region-size 1G --block-size 2M --requested-size 3M";
//! let error = Config::try_from(Args::try_parse_from(words.split(' '))?).unwrap_err();
//! // It is not a multiple of the size of a block.
//! assert!(error.to_string().starts_with("--requested-size 3M: "), "{error}");
//! # Ok::<(), clap::Error>(())
//! ```

#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod args;
pub mod backend;
mod confinement;
pub mod connection;
mod descriptors;
pub mod device_state;
pub mod discard_channel;
pub mod front_door;
pub mod gate;
pub mod log;
pub mod management;
pub mod metrics;
mod overdue;
pub mod postcopy;
mod private_socket;
pub mod queue;
mod ram_blocks;
mod renew;
mod reserve;
pub mod resize;
pub mod service;
mod shared_file;
mod socket;
mod start;
pub mod state_file;
pub mod stray;
pub mod supervision;
mod sys;
pub mod vring;
pub mod watchdog;
pub mod worker;

use std::sync::Arc;

use anyhow::Context;
use program::listener;
use program::signals::Signals;
use sandbox::SandboxError;

use args::{ArgsError, Config, Endpoint};
use connection::Connections;
use discard_channel::DiscardChannel;
use front_door::Notifier;
use management::Server;
use metrics::{CountedStore, Metrics};
use service::Service;
use socket::{FrontEnds, Shutdown};
use stray::Sweeper;
use supervision::Supervision;

/// What `--print-capabilities` prints.
pub const CAPABILITIES: &str = r#"{"type":"mem"}"#;

/// Has this process survive guest memory that its owner takes away, or never had: connections end then,
/// and not the process, as it would by SIGBUS.
///
/// # Errors
///
/// When there is no `/proc`, or the system refuses otherwise.
pub fn survive_lost_memory() -> std::io::Result<()> {
    sys::lost_memory::install()
}

/// Runs the daemon until a signal ends it, or the one front-end that came with `--fd` leaves.
///
/// # Errors
///
/// When it cannot start: a socket or the state file is not to be had. An [`ArgsError`] when the
/// descriptor is none that could be used.
pub fn run(mut config: Config) -> anyhow::Result<()> {
    // Before there is a second thread, which would not know what is blocked.
    let signals = Signals::watch().context("cannot watch signals")?;
    let continued = renew::is_continued();
    let policy = confinement::policy(&config);
    let confined =
        sandbox::begin(&config.sandbox, &policy, continued).map_err(|error| match error {
            SandboxError::User { user, reason } => ArgsError::new("user", &user, reason).into(),
            error => anyhow::Error::from(error),
        })?;
    log::start(config.log_format).context("cannot start the log")?;
    survive_lost_memory().context(
        "/proc/self/maps is needed to survive memory that a front-end takes away: mount /proc",
    )?;
    if !continued && let Err(error) = sys::guest_memory::limit_core_dumps() {
        tracing::warn!(%error, "a core dump may have the guest's memory in it");
    }
    descriptors::raise_limit();
    reserve::RESERVE.fill();
    listener::allow(config.access);
    let supervision = Supervision::from_env();
    let left = renew::left()?;
    supervision.take_sockets(&mut config)?;
    let watchdog = supervision.watchdog()?;
    let (mut start, state) = start::open(&config, left)?;
    let metrics = Arc::new(Metrics::new());
    start.store = Box::new(CountedStore::new(start.store, Arc::clone(&metrics)));
    let controller = Arc::new(virtio_mem::controller::MemController::new(start));
    let notifier = Arc::new(Notifier::new().context("cannot start the notifier")?);
    if state.is_some() {
        // The process before may have ended between a change and its message.
        notifier.notify();
    }
    let service = Service::with_metrics(controller, Arc::clone(&notifier), metrics)?;
    let connections = Connections::new(Arc::clone(&service), notifier)
        .offer_postcopy(config.postcopy && can_postcopy())
        .allow_files(config.allow_file_memory)
        .watched_by(watchdog.clone());
    let connections = Arc::new(connections);
    // Before there is a socket that a signal would leave behind.
    let shutdown = Shutdown::on_signals(signals, Arc::clone(&connections), supervision.clone())
        .context("cannot wait for signals")?;
    let front_ends =
        match &config.endpoint {
            Endpoint::Path(path) => FrontEnds::bind(path)
                .with_context(|| format!("--socket-path {}", path.display()))?,
            Endpoint::Fd(fd) => FrontEnds::inherit(*fd)
                .map_err(|error| ArgsError::new("fd", &fd.to_string(), error))?,
            Endpoint::Passed => anyhow::bail!("no socket for front-ends"),
        };
    let discard_channel = match &config.discard_socket {
        None => None,
        Some(path) => {
            let (controller, metrics) = (service.controller(), service.metrics());
            let channel = DiscardChannel::bind(path, Arc::clone(controller), Arc::clone(metrics))
                .with_context(|| format!("--discard-socket {}", path.display()))?;
            Some(channel)
        }
    };
    let mut servers = Vec::new();
    if let Some(path) = &config.metrics_socket {
        let server = Server::bind_metrics(path, Arc::clone(&service) as Arc<_>);
        servers.push(server.with_context(|| format!("--metrics-socket {}", path.display()))?);
    }
    // The last one: a client that finds it finds the others as well.
    if let Some(path) = &config.api_socket {
        let server = Server::bind(path, Arc::clone(&service) as Arc<_>);
        servers.push(server.with_context(|| format!("--api-socket {}", path.display()))?);
    }
    supervision.store_sockets(&mut config)?;
    let reach = confinement::reach(&config).context("cannot find out what to confine to")?;
    for note in confined.enter(&reach)? {
        tracing::warn!("{note}");
    }
    // Threads that are started from here on are confined.
    let sweeper = match config.sweep_interval {
        None => None,
        Some(interval) => Some(
            Sweeper::start(Arc::clone(&service), interval).context("cannot start the sweeper")?,
        ),
    };
    if let Some(channel) = &discard_channel {
        channel.start().context("cannot start the discard channel")?;
    }
    for server in &servers {
        server.start().context("cannot start the management API")?;
    }
    supervision.ready();
    tracing::info!(
        addr = config.geometry.addr(),
        region_size = config.geometry.region_size(),
        block_size = config.geometry.block_size(),
        "ready"
    );
    while let Some(front_end) = front_ends.next(&shutdown, watchdog.as_deref())? {
        match connections.serve(front_end) {
            Ok(()) => tracing::info!("front-end disconnected"),
            Err(error) => tracing::warn!(error = format!("{error:#}"), "connection ended"),
        }
        if connections.is_exposed()
            && front_ends.may_bring_more()
            && let Some(state) = &state
        {
            tracing::info!("starting anew: a front-end had the page faults of this process");
            if let Some(error) = shutdown.unless_requested(|| renew::renew(&state.current())) {
                return Err(error);
            }
        }
    }
    tracing::info!("ending");
    supervision.stopping();
    drop(sweeper);
    connections.end();
    if let Some(channel) = &discard_channel {
        channel.shutdown();
    }
    servers.iter().for_each(Server::shutdown);
    tracing::info!("ended");
    Ok(())
}

/// Whether PAGEFAULT can be offered; says so if not.
fn can_postcopy() -> bool {
    let probed = postcopy::probe();
    if let Err(error) = &probed {
        tracing::warn!(%error, "--postcopy: PAGEFAULT is not offered, since userfaultfd(2) fails");
    }
    probed.is_ok()
}
