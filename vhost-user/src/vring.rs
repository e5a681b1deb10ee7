//! A ring of the crate's, with a kick and a call that hold nobody up for good.
//!
//! Both are eventfds that the front-end has as well, and with them their flags: what was made not to
//! block, it can make block again. So a kick is read in a way to which the flags do not matter. There is
//! none for writing: whoever waits in that is let go on at the end of the connection, by [`Calls`].

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ReadWriteFlags, preadv2, retry_on_intr};
use vhost_user_backend::{VringRwLock, VringStateGuard, VringStateMutGuard, VringT};

use crate::queue::AtomicMemory;

/// How often it is looked whether a call went on.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

type Ring = VringRwLock<AtomicMemory>;
/// The fault of a ring's addresses or indices.
type Outcome<T = ()> = Result<T, virtio_queue::Error>;

/// A ring of one connection.
#[derive(Clone)]
pub struct Vring {
    ring: Ring,
    /// The crate has another descriptor of it, to wait for kicks with.
    kick: Arc<RwLock<Option<File>>>,
    call: Arc<RwLock<Option<Arc<File>>>>,
}

impl Vring {
    /// Signals used buffers to the guest, unless the connection has ended.
    ///
    /// # Errors
    ///
    /// When the eventfd has no room for one more signal.
    pub fn signal(&self, calls: &Calls) -> io::Result<()> {
        // Locked meanwhile: once the front-end has set another, nothing comes to the old one.
        self.call.read().as_ref().map_or(Ok(()), |call| calls.signal(call))
    }
}

/// Knows what the worker of a connection signals now.
#[derive(Debug, Default)]
pub struct Calls {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    signalled: Option<Arc<File>>,
    ended: bool,
}

impl Calls {
    fn signal(&self, call: &Arc<File>) -> io::Result<()> {
        {
            let mut state = self.state.lock();
            if state.ended {
                return Ok(());
            }
            state.signalled = Some(Arc::clone(call));
        }
        let signalled = signal(call);
        self.state.lock().signalled = None;
        signalled
    }

    /// The connection has ended: nothing is signalled any more. Whoever waits to do so goes on: the
    /// front-end may have filled the eventfd, and nobody else would empty it.
    pub fn end(&self) {
        self.state.lock().ended = true;
        loop {
            let signalled = self.state.lock().signalled.clone();
            let Some(call) = signalled else { return };
            make_room(&call);
            std::thread::sleep(LOOK_AGAIN);
        }
    }
}

/// Empties an eventfd that is full. Another one is left alone, so that no signal is lost.
fn make_room(event: &File) {
    let mut polled = [PollFd::new(event, PollFlags::OUT)];
    let looked = poll(&mut polled, Some(&Timespec::default()));
    if looked.is_ok() && !polled[0].revents().contains(PollFlags::OUT) {
        // Who was faster has emptied it as well.
        let _ = take(event);
    }
}

#[expect(clippy::host_endian_bytes, reason = "eventfds count in the byte order of the host")]
fn signal(event: &File) -> io::Result<()> {
    retry_on_intr(|| rustix::io::write(event, &1u64.to_ne_bytes()))?;
    Ok(())
}

/// Takes what was signalled, and never waits for it.
fn take(event: &File) -> io::Result<()> {
    let mut count = [0; 8];
    let taken = retry_on_intr(|| {
        preadv2(event, &mut [IoSliceMut::new(&mut count)], u64::MAX, ReadWriteFlags::NOWAIT)
    });
    match taken {
        // Before Linux 5.8 there are the flags only.
        Err(Errno::OPNOTSUPP) => retry_on_intr(|| rustix::io::read(event, &mut count))?,
        taken => taken?,
    };
    Ok(())
}

impl<'a> VringStateGuard<'a, AtomicMemory> for Vring {
    type G = <Ring as VringStateGuard<'a, AtomicMemory>>::G;
}

impl<'a> VringStateMutGuard<'a, AtomicMemory> for Vring {
    type G = <Ring as VringStateMutGuard<'a, AtomicMemory>>::G;
}

impl VringT<AtomicMemory> for Vring {
    fn new(memory: AtomicMemory, max_queue_size: u16) -> Outcome<Self> {
        let ring = Ring::new(memory, max_queue_size)?;
        Ok(Self { ring, kick: Arc::default(), call: Arc::default() })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, AtomicMemory>>::G {
        self.ring.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, AtomicMemory>>::G {
        self.ring.get_mut()
    }

    fn set_kick(&self, file: Option<File>) {
        let copied = file.as_ref().map(File::try_clone).transpose();
        let (kick, file) = match copied {
            Ok(kick) => (kick, file),
            Err(error) => {
                tracing::error!(%error, "cannot keep the kick: the ring is not started");
                (None, None)
            }
        };
        *self.kick.write() = kick;
        self.ring.set_kick(file);
    }

    /// An error, which ends the worker, where the front-end took the kick itself, or has replaced
    /// the one that was signalled: without it the worker would find the same again for ever.
    fn read_kick(&self) -> io::Result<bool> {
        if let Some(kick) = &*self.kick.read() {
            take(kick).inspect_err(|error| {
                tracing::warn!(%error, "a kick is not there: the ring is no longer served");
            })?;
        }
        Ok(self.ring.get_ref().is_enabled())
    }

    fn set_call(&self, file: Option<File>) {
        *self.call.write() = file.map(Arc::new);
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.call.read().as_deref().map_or(Ok(()), signal)
    }

    fn set_err(&self, file: Option<File>) {
        self.ring.set_err(file);
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Outcome {
        self.ring.add_used(desc_index, len)
    }

    fn enable_notification(&self) -> Outcome<bool> {
        self.ring.enable_notification()
    }

    fn disable_notification(&self) -> Outcome {
        self.ring.disable_notification()
    }

    fn needs_notification(&self) -> Outcome<bool> {
        self.ring.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.ring.set_enabled(enabled);
    }

    fn set_queue_info(&self, desc_table: u64, avail_ring: u64, used_ring: u64) -> Outcome {
        self.ring.set_queue_info(desc_table, avail_ring, used_ring)
    }

    fn queue_next_avail(&self) -> u16 {
        self.ring.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.ring.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        self.ring.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Outcome<u16> {
        self.ring.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        self.ring.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.ring.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.ring.set_queue_ready(ready);
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;
    use crate::queue::Memory;

    /// One that blocks.
    fn event() -> File {
        File::from(eventfd(0, EventfdFlags::CLOEXEC).unwrap())
    }

    #[expect(clippy::host_endian_bytes, reason = "eventfds count in the byte order of the host")]
    fn add(event: &File, count: u64) {
        rustix::io::write(event, &count.to_ne_bytes()).unwrap();
    }

    #[expect(clippy::host_endian_bytes, reason = "eventfds count in the byte order of the host")]
    fn count(event: &File) -> u64 {
        let mut count = [0; 8];
        rustix::io::read(event, &mut count).unwrap();
        u64::from_ne_bytes(count)
    }

    fn vring() -> Vring {
        Vring::new(AtomicMemory::new(Memory::new()), 128).unwrap()
    }

    #[test]
    fn whoever_waits_at_a_full_call_goes_on_at_the_end() {
        let (vring, calls, call) = (vring(), Calls::default(), event());
        vring.set_call(Some(call.try_clone().unwrap()));
        add(&call, u64::MAX - 2);
        vring.signal(&calls).unwrap();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| vring.signal(&calls).unwrap());
            while calls.state.lock().signalled.is_none() {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waits.is_finished());
            calls.end();
        });
        assert_eq!(count(&call), 1);
        add(&call, u64::MAX - 1);
        vring.signal(&calls).unwrap();
        assert_eq!(count(&call), u64::MAX - 1);
    }

    #[test]
    fn only_a_full_call_is_emptied() {
        let call = event();
        add(&call, u64::MAX - 2);
        make_room(&call);
        assert_eq!(count(&call), u64::MAX - 2);
        add(&call, u64::MAX - 1);
        make_room(&call);
        add(&call, 3);
        assert_eq!(count(&call), 3);
    }

    #[test]
    fn a_kick_that_is_not_there_is_not_waited_for() {
        let (vring, kick) = (vring(), event());
        assert!(!vring.read_kick().unwrap());
        vring.set_kick(Some(kick.try_clone().unwrap()));
        assert!(vring.get_ref().get_kick().is_some());
        assert_eq!(vring.read_kick().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        add(&kick, 2);
        vring.set_enabled(true);
        assert!(vring.read_kick().unwrap());
        assert!(vring.read_kick().is_err());
        vring.set_kick(None);
        assert!(vring.get_ref().get_kick().is_none());
        assert!(vring.read_kick().unwrap());
    }
}
