//! One front-end at a time: the relay in front of the crate's back-end.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use parking_lot::Mutex;
use vhost_user_backend::VhostUserDaemon;
use virtio_mem::controller::FreezeHolder;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::backend::{END_EVENT, MemBackend};
use crate::front_door::{ConnectionEvents, Notifier, Relay};
use crate::queue::{AtomicMemory, Memory};
use crate::service::Service;

/// Serves front-ends, one after the other, with the same device.
pub struct Connections {
    service: Arc<Service>,
    notifier: Arc<Notifier>,
    current: Mutex<Current>,
    postcopy: bool,
    /// A front-end was given the page faults of this process.
    exposed: AtomicBool,
}

#[derive(Default)]
struct Current {
    stream: Option<UnixStream>,
    ended: bool,
}

impl Connections {
    /// Nobody is connected yet.
    pub fn new(service: Arc<Service>, notifier: Arc<Notifier>) -> Self {
        let (current, exposed) = (Mutex::default(), AtomicBool::new(false));
        Self { service, notifier, current, postcopy: false, exposed }
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
        let backend = MemBackend::new(
            Arc::clone(self.service.controller()),
            Arc::clone(self.service.metrics()),
            Arc::clone(self.service.gate()),
            memory.clone(),
        )
        .context("cannot make a back-end")?
        .offer_postcopy(self.postcopy);
        let mut daemon = VhostUserDaemon::new("vhost-user".to_owned(), backend.clone(), memory)
            .map_err(|error| anyhow::anyhow!("cannot set up the back-end: {error}"))?;
        let end = EventFd::new(EFD_CLOEXEC)?;
        for worker in daemon.get_epoll_handlers() {
            worker.register_listener(end.as_raw_fd(), EventSet::IN, u64::from(END_EVENT))?;
        }
        let events =
            Arc::new(Events { service: Arc::clone(&self.service), backend: backend.clone() });
        let result = connect(&mut daemon).and_then(|crate_side| {
            Relay::run(front, crate_side, events, Arc::clone(&self.notifier))
                .context("front-end connection")
        });
        if backend.postcopy().was_advised() {
            self.exposed.store(true, Ordering::Relaxed);
        }
        // Before anything that waits for the worker, or for the crate's thread, which may do so.
        backend.end();
        if let Err(error) = backend.abandon_postcopy() {
            // A thread waits for a page for good, and letting it go on could harm the guest. The
            // state file is good at every instruction.
            tracing::error!(%error, "cannot let go of memory that did not arrive; ending");
            crate::listener::remove_all();
            crate::log::flush();
            std::process::exit(1);
        }
        // Whoever waits for a transfer would wait in the crate's thread.
        backend.end_transfers();
        // The crate's own error is the relay's, told less precisely.
        daemon.request_shutdown();
        let _ = daemon.wait();
        end.write(1)?;
        // Joins the worker: after this nobody uses the front-end's memory.
        drop(daemon);
        backend.postcopy().close();
        result
    }
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

/// Connects to a back-end that can only listen. The name cannot be guessed, and what connects
/// first is served, so nobody else can come in between.
fn connect(daemon: &mut VhostUserDaemon<MemBackend>) -> anyhow::Result<UnixStream> {
    let connect = || -> io::Result<(UnixListener, UnixStream)> {
        let random = || RandomState::new().build_hasher().finish();
        let name = format!("vhost-user-mem-{:016x}{:016x}", random(), random());
        let address = SocketAddr::from_abstract_name(name)?;
        let listener = UnixListener::bind_addr(&address)?;
        let stream = UnixStream::connect_addr(&address)?;
        Ok((listener, stream))
    };
    let (listener, stream) = connect().context("cannot connect to the back-end")?;
    daemon
        .start(&mut listener.into())
        .map_err(|error| anyhow::anyhow!("cannot start the back-end: {error}"))?;
    Ok(stream)
}

/// What the relay sees of the connection, told to the device.
struct Events {
    service: Arc<Service>,
    backend: MemBackend,
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

    fn rings_reset(&self) {}

    fn postcopy_advise(&self) -> io::Result<OwnedFd> {
        self.backend.postcopy().advise()
    }

    fn postcopy_listen(&self) -> io::Result<()> {
        self.backend.postcopy_listen()
    }

    fn postcopy_end(&self) -> io::Result<()> {
        self.backend.postcopy().end()
    }

    fn mapped_at(&self, gpa: u64) -> Option<u64> {
        self.backend.postcopy().mapped_at(gpa)
    }
}
