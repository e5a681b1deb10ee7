//! A ring of the crate's, with a kick and a call that hold no thread up for good.
//!
//! Both are eventfds that the front-end has as well, and with them their flags: what was made not to
//! block, it can make block again. So a kick is read in a way to which the flags do not matter. There is
//! none for writing: a worker that waits in that is released at the end of the connection, by
//! [`Calls`].
//!
//! A ring that starts may have been left in the middle of a request by a back-end that was killed:
//! see [`Vring::resume`].

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ReadWriteFlags, preadv2, retry_on_intr};
use vhost_user_backend::{VringRwLock, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::QueueT;

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
    start: Arc<Start>,
}

/// What is outstanding since the ring was set up anew.
#[derive(Debug, Default)]
struct Start {
    /// The front-end has set where to continue.
    base: AtomicBool,
    /// The ring was enabled, or its call replaced.
    call: AtomicBool,
}

impl Vring {
    /// Whether the ring was set up anew since it was last served: then [`resume`](Self::resume)
    /// comes first.
    pub fn is_new(&self) -> bool {
        self.start.base.load(Ordering::Acquire) || self.start.call.load(Ordering::Acquire)
    }

    /// Continues where the back-end before has stopped; `ring` is this one, and runs. True when the
    /// guest is to be signalled once, whatever has become of the last interrupt: it may have been
    /// lost with a back-end that was killed, and a superfluous one is allowed.
    ///
    /// Requests are answered in order, one at a time, so that what lies between the used index and
    /// the base was available, but never answered. Front-ends that cannot know that set the base
    /// to the available index; those that can, to the used index, which changes nothing here.
    #[must_use]
    pub fn resume(&self, ring: &mut VringState<AtomicMemory>) -> bool {
        if self.start.base.swap(false, Ordering::AcqRel) {
            let queue = ring.get_queue_mut();
            let (base, used) = (queue.next_avail(), queue.next_used());
            let unanswered = base.wrapping_sub(used);
            if unanswered != 0 && unanswered <= queue.size() {
                tracing::info!(base, used, "continuing at the used index: requests were left");
                queue.set_next_avail(used);
            }
        }
        self.start.call.swap(false, Ordering::AcqRel)
    }

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

    /// The connection has ended: nothing is signalled any more. A thread that waits to do so continues: the
    /// front-end may have filled the eventfd, and nothing else would empty it.
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
        Ok(Self { ring, kick: Arc::default(), call: Arc::default(), start: Arc::default() })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, AtomicMemory>>::G {
        self.ring.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, AtomicMemory>>::G {
        self.ring.get_mut()
    }

    fn set_kick(&self, file: Option<File>) {
        // Locked until both are set: without one here, the crate's is read, which may block, and must
        // not be the old one.
        let mut kick = self.kick.write();
        // Without a descriptor left, the crate's own has to do.
        *kick = file.as_ref().and_then(|file| file.try_clone().ok());
        self.ring.set_kick(file);
    }

    /// False without an error where the kick is not there any more: the front-end may take it itself
    /// when it stops the ring, or may have replaced the descriptor since it was found readable. An
    /// error ends the worker, and with it the connection.
    fn read_kick(&self) -> io::Result<bool> {
        let taken = match &*self.kick.read() {
            Some(kick) => take(kick).map(|()| self.ring.get_ref().is_enabled()),
            // Waits where the front-end has made it block, and has taken the kick itself.
            None => self.ring.read_kick(),
        };
        match taken {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            taken => taken,
        }
    }

    fn set_call(&self, file: Option<File>) {
        let mut call = self.call.write();
        self.start.call.store(file.is_some(), Ordering::Release);
        *call = file.map(Arc::new);
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
        if enabled {
            // No interrupt is sent while it is not enabled, and none of those is made up for.
            self.start.call.store(true, Ordering::Release);
        }
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
        self.start.base.store(true, Ordering::Release);
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
    fn a_wait_at_a_full_call_ends_with_the_connection() {
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
    fn a_kick_that_is_not_there_is_neither_waited_for_nor_an_error() {
        let (vring, kick) = (vring(), event());
        assert!(!vring.read_kick().unwrap());
        vring.set_enabled(true);
        vring.set_kick(Some(kick.try_clone().unwrap()));
        assert!(vring.get_ref().get_kick().is_some());
        assert!(!vring.read_kick().unwrap());
        add(&kick, 2);
        assert!(vring.read_kick().unwrap());
        assert!(!vring.read_kick().unwrap());
        vring.set_kick(None);
        assert!(vring.get_ref().get_kick().is_none());
        assert!(vring.read_kick().unwrap());
    }

    #[test]
    fn a_ring_with_a_new_base_continues_at_the_used_index_if_that_is_near() {
        for (used, base, continues) in [
            (7u16, 7u16, 7u16),
            (7, 9, 7),
            (7, 135, 7),
            (7, 136, 136),
            (7, 6, 6),
            (u16::MAX, 3, u16::MAX),
            (0, 0x8000, 0x8000),
        ] {
            let vring = vring();
            vring.set_queue_size(128);
            vring.set_queue_next_used(used);
            vring.set_queue_next_avail(base);
            assert!(vring.is_new());
            assert!(!vring.resume(&mut vring.get_mut()));
            assert_eq!(vring.queue_next_avail(), continues, "{used} {base}");
            // Only once: what is taken off the ring later stays so.
            vring.get_mut().get_queue_mut().set_next_avail(used.wrapping_add(1));
            assert!(!vring.is_new() && !vring.resume(&mut vring.get_mut()));
            assert_eq!(vring.queue_next_avail(), used.wrapping_add(1));
        }
    }

    #[test]
    fn each_start_and_each_new_call_is_signalled_once() {
        let vring = vring();
        vring.set_call(Some(event()));
        assert!(vring.is_new() && vring.resume(&mut vring.get_mut()));
        assert!(!vring.is_new() && !vring.resume(&mut vring.get_mut()));
        vring.set_enabled(true);
        assert!(vring.resume(&mut vring.get_mut()));
        vring.set_enabled(false);
        assert!(!vring.is_new());
        vring.set_call(Some(event()));
        vring.set_call(None);
        assert!(!vring.is_new());
    }

    /// The worker reads the kick while the front-end takes away one that blocks, again and again.
    #[test]
    fn a_kick_that_is_taken_away_is_never_waited_for() {
        let (vring, ended) = (vring(), AtomicBool::new(false));
        let kick = event();
        std::thread::scope(|scope| {
            let reads = scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    vring.read_kick().unwrap();
                }
            });
            let sets = scope.spawn(|| {
                for _ in 0..20_000 {
                    vring.set_kick(Some(kick.try_clone().unwrap()));
                    vring.set_kick(None);
                }
            });
            let deadline = std::time::Instant::now() + Duration::from_secs(20);
            while !sets.is_finished() && std::time::Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            let in_time = sets.is_finished();
            ended.store(true, Ordering::Relaxed);
            // Lets a reader that waits go, so that the test ends.
            while !reads.is_finished() || !sets.is_finished() {
                add(&kick, 1);
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(in_time, "the worker waits for a kick that was taken away");
        });
    }
}
