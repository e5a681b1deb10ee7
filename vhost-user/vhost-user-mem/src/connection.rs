//! One front-end at a time: the relay in front of the crate's back-end.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use parking_lot::Mutex;
use ram_discard::GpaRange;
use vhost_user_backend::VhostUserDaemon;
use virtio_mem::controller::FreezeHolder;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::backend::{END_EVENT, MemBackend, WATCHDOG_EVENT};
use crate::front_door::{ConnectionEvents, Notifier, Relay, RelayError};
use crate::overdue::{Overdue, Patience};
use crate::private_socket;
use crate::queue::{AtomicMemory, Memory};
use crate::service::Service;
use crate::watchdog::Watchdog;
use crate::worker::Watch;

/// How long the end of a connection may take. What a guest request does is not waited for by a
/// front-end, and takes as long as it takes to discard much memory.
const END: Patience = Patience { idle: Duration::from_secs(10), total: Duration::from_secs(300) };

/// Serves front-ends, one after the other, with the same device.
pub struct Connections {
    service: Arc<Service>,
    notifier: Arc<Notifier>,
    current: Mutex<Current>,
    postcopy: bool,
    /// A front-end was given the page faults of this process.
    exposed: AtomicBool,
    allows_files: bool,
    watchdog: Option<Arc<Watchdog>>,
}

#[derive(Default)]
struct Current {
    stream: Option<UnixStream>,
    ended: bool,
}

impl Connections {
    /// No front-end is connected yet.
    pub fn new(service: Arc<Service>, notifier: Arc<Notifier>) -> Self {
        let (current, exposed) = (Mutex::default(), AtomicBool::new(false));
        Self {
            service,
            notifier,
            current,
            postcopy: false,
            exposed,
            allows_files: false,
            watchdog: None,
        }
    }

    /// The watchdog that the workers of rings feed, if there is one.
    #[must_use]
    pub fn watched_by(self, watchdog: Option<Arc<Watchdog>>) -> Self {
        Self { watchdog, ..self }
    }

    /// Whether front-ends may send files of any file system, and not memory only.
    #[must_use]
    pub fn allow_files(self, allows_files: bool) -> Self {
        Self { allows_files, ..self }
    }

    /// Whether front-ends may use postcopy: they may not, unless told so here.
    #[must_use]
    pub fn offer_postcopy(self, postcopy: bool) -> Self {
        Self { postcopy, ..self }
    }

    /// Whether a front-end was given the page faults of this process, which it could still fill
    /// with anything: no other one may be served by it.
    pub fn is_exposed(&self) -> bool {
        self.exposed.load(Ordering::Relaxed)
    }

    /// Serves one front-end until it leaves. Block state outlives it; its memory does not.
    ///
    /// # Errors
    ///
    /// When the connection ended by a message that was wrong, or could not be served at all.
    pub fn serve(&self, front: UnixStream) -> anyhow::Result<()> {
        {
            let mut current = self.current.lock();
            if current.ended {
                return Ok(());
            }
            current.stream = Some(front.try_clone()?);
        }
        tracing::info!("front-end connected");
        self.service.set_connected(true);
        let result = self.relay(front);
        self.current.lock().stream = None;
        let controller = self.service.controller();
        controller.set_memory(Vec::new()).context("cannot let go of the memory")?;
        freeze(&self.service, false);
        self.service.set_connected(false);
        result
    }

    /// Ends the connection there is and those to come.
    pub fn end(&self) {
        let mut current = self.current.lock();
        current.ended = true;
        if let Some(stream) = current.stream.take() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        drop(current);
        self.notifier.shutdown();
    }

    fn relay(&self, front: UnixStream) -> anyhow::Result<()> {
        let memory = AtomicMemory::new(Memory::new());
        let (metrics, gate) = (self.service.metrics(), self.service.gate());
        let backend = MemBackend::new(
            Arc::clone(self.service.controller()),
            Arc::clone(metrics),
            Arc::clone(gate),
            memory.clone(),
        )
        .context("cannot make a back-end")?
        .watch_worker(Watch::new(front.try_clone()?, Arc::clone(metrics)))
        .watch_resize(Arc::clone(self.service.resize()))
        .allow_files(self.allows_files)
        .watched_by(self.watchdog.clone())
        .offer_postcopy(self.postcopy);
        let overdue = self.watch_end().context("cannot watch the connection's end")?;
        let mut threads = CrateThreads::new(&backend, memory, self.watchdog.as_deref())?;
        let events = Arc::new(Events {
            service: Arc::clone(&self.service),
            backend: backend.clone(),
            allows_files: self.allows_files,
            watchdog: self.watchdog.clone(),
        });
        let result = threads.connect().and_then(|crate_side| {
            Relay::run(front, crate_side, events, Arc::clone(&self.notifier))
                .context("front-end connection")
        });
        if backend.postcopy().was_advised() {
            self.exposed.store(true, Ordering::Relaxed);
        }
        overdue.begin();
        // Before anything that waits for the worker, or for the crate's thread, which may do so.
        backend.end();
        if let Err(error) = backend.abandon_postcopy() {
            // A thread waits for a page for good, and letting it go on could harm the guest. The
            // state file is good at every instruction.
            tracing::error!(%error, "cannot let go of memory that did not arrive; ending");
            program::listener::remove_all();
            crate::log::flush();
            std::process::exit(1);
        }
        // The crate's thread may wait for a transfer.
        backend.end_transfers();
        let reason = threads.end();
        self.excuse_worker(false);
        // After this, nothing uses the front-end's memory.
        drop(threads);
        backend.postcopy().close();
        match (result, reason) {
            _ if backend.worker_lost() => {
                anyhow::bail!("the worker of the ring has ended, which is a fault of this program")
            }
            (Err(error), Some(reason)) if is_of_the_crate(&error) => {
                Err(anyhow::anyhow!("{error:#}: {reason}"))
            }
            (result, _) => result,
        }
    }

    fn excuse_worker(&self, excused: bool) {
        if let Some(watchdog) = &self.watchdog {
            watchdog.excuse(excused);
        }
    }

    /// Ends the process when the end of a connection takes too long: a thread waits in the kernel
    /// for something that does not come, and no other front-end could be served. The state file is
    /// good at every instruction.
    fn watch_end(&self) -> io::Result<Overdue> {
        let gate = Arc::clone(self.service.gate());
        let give_up = || {
            tracing::error!("the connection does not end: a thread is stuck; ending the process");
            program::listener::remove_all();
            crate::log::flush();
            std::process::exit(1);
        };
        Overdue::new(END, move || gate.is_busy(), give_up)
    }
}

/// The crate's end of a connection, with the threads that serve it.
struct CrateThreads {
    daemon: VhostUserDaemon<MemBackend>,
    end: EventFd,
}

impl CrateThreads {
    fn new(
        backend: &MemBackend,
        memory: AtomicMemory,
        watchdog: Option<&Watchdog>,
    ) -> anyhow::Result<Self> {
        // Before there is a worker, which nothing else ends.
        let end = EventFd::new(EFD_CLOEXEC)?;
        let daemon = VhostUserDaemon::new("vhost-user".to_owned(), backend.clone(), memory)
            .map_err(|error| anyhow::anyhow!("cannot set up the back-end: {error}"))?;
        for worker in daemon.get_epoll_handlers() {
            let register = |fd: RawFd, event: u16| {
                worker.register_listener(fd, EventSet::IN, u64::from(event))
            };
            let timer = watchdog.map(|watchdog| watchdog.as_fd().as_raw_fd());
            let registered = register(end.as_raw_fd(), END_EVENT)
                .and_then(|()| timer.map_or(Ok(()), |timer| register(timer, WATCHDOG_EVENT)));
            if let Err(error) = registered {
                // Dropped, it would wait for a worker that cannot be ended. It needs no
                // descriptor, so that this is a kernel out of memory.
                std::mem::forget(daemon);
                return Err(error).context("cannot watch for the connection's end");
            }
        }
        Ok(Self { daemon, end })
    }

    /// Connects to a back-end that can only listen.
    fn connect(&mut self) -> anyhow::Result<UnixStream> {
        let (listener, stream) =
            private_socket::pair().context("cannot connect to the back-end")?;
        self.daemon
            .start(&mut listener.into())
            .map_err(|error| anyhow::anyhow!("cannot start the back-end: {error}"))?;
        Ok(stream)
    }

    /// The connection was shut down: waits for the thread that serves it, and tells why it has
    /// ended.
    fn end(&mut self) -> Option<vhost_user_backend::Error> {
        self.daemon.wait().err()
    }
}

impl Drop for CrateThreads {
    fn drop(&mut self) {
        // There is room for one, and the crate then joins the worker.
        let _ = self.end.write(1);
    }
}

/// Whether the crate has closed the connection, and knows why.
fn is_of_the_crate(error: &anyhow::Error) -> bool {
    let relay = error.downcast_ref::<RelayError>();
    matches!(relay, Some(RelayError::Refused(_) | RelayError::Closed(_) | RelayError::Log(_)))
}

fn freeze(service: &Service, active: bool) {
    let controller = service.controller();
    let done = if active {
        controller.freeze(FreezeHolder::Log)
    } else {
        controller.thaw(FreezeHolder::Log)
    };
    if let Err(error) = done {
        tracing::error!(%error, active, "cannot save that migration changed");
    }
}

/// What the relay sees of the connection, told to the device.
struct Events {
    service: Arc<Service>,
    backend: MemBackend,
    allows_files: bool,
    watchdog: Option<Arc<Watchdog>>,
}

impl Drop for Events {
    fn drop(&mut self) {
        self.service.controller().set_guest_runs(false);
    }
}

impl Events {
    /// Says whether the worker may wait for memory that arrives.
    fn excuse_worker(&self) {
        if let Some(watchdog) = &self.watchdog {
            watchdog.excuse(self.backend.postcopy().is_listening());
        }
    }
}

impl ConnectionEvents for Events {
    fn log_all(&self, active: bool) {
        freeze(&self.service, active);
    }

    fn quiesce(&self, gone: &dyn Fn() -> bool) -> bool {
        self.service.gate().close_unless(gone)
    }

    fn release(&self) {
        self.service.gate().open();
    }

    fn running(&self) {
        self.service.controller().running();
    }

    fn driver(&self, features: u64, runs: bool) {
        self.service.controller().set_guest_runs(runs);
        self.service.resize().driver(features, runs);
    }

    fn allows_files(&self) -> bool {
        self.allows_files
    }

    fn is_usable(&self, gpa: u64, len: u64) -> bool {
        let range = GpaRange::new(gpa, len);
        range.is_none_or(|range| self.service.controller().is_usable(range))
    }

    fn rings_reset(&self) {}

    fn postcopy_advise(&self) -> io::Result<OwnedFd> {
        self.backend.postcopy().advise()
    }

    fn postcopy_listen(&self) -> io::Result<()> {
        let listening = self.backend.postcopy_listen();
        self.excuse_worker();
        listening
    }

    fn postcopy_end(&self) -> io::Result<()> {
        let ended = self.backend.postcopy().end();
        self.excuse_worker();
        ended
    }

    fn mapped_at(&self, gpa: u64) -> Option<u64> {
        self.backend.postcopy().mapped_at(gpa)
    }
}
