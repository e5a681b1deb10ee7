//! The relay with the crate that it stands in front of.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, RwLock};
use std::thread::{JoinHandle, spawn};

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::super::RelayError;
use super::super::message::{FrontendRequest as R, Header};
use super::harness::{Bench, FEATURES, OFFERED, log_body, memfd, region, state};

type Memory = GuestMemoryAtomic<GuestMemoryMmap<BitmapMmapRegion>>;

/// A device that does nothing.
#[derive(Clone, Default)]
struct Idle {
    memory: Arc<RwLock<Option<Memory>>>,
}

impl VhostUserBackend for Idle {
    type Bitmap = BitmapMmapRegion;
    type Vring = VringRwLock<Memory>;

    fn num_queues(&self) -> usize {
        1
    }
    fn max_queue_size(&self) -> usize {
        128
    }
    fn features(&self) -> u64 {
        FEATURES
    }
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::from_bits_truncate(OFFERED)
    }
    fn set_event_idx(&self, _enabled: bool) {}
    fn get_config(&self, _offset: u32, size: u32) -> Vec<u8> {
        vec![7; size as usize]
    }
    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        *self.memory.write().unwrap() = Some(memory);
        Ok(())
    }
    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::empty()).ok()
    }
    fn handle_event(
        &self,
        _event: u16,
        _set: EventSet,
        _vrings: &[Self::Vring],
        _thread: usize,
    ) -> io::Result<()> {
        Ok(())
    }
}

fn bench() -> (Bench, JoinHandle<()>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("crate");
    let listener = UnixListener::bind(&path).unwrap();
    let crate_side = UnixStream::connect(&path).unwrap();
    let crate_thread = spawn(move || {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let mut daemon = VhostUserDaemon::new("crate".into(), Idle::default(), memory).unwrap();
        daemon.start(&mut listener.into()).unwrap();
        let _ = daemon.wait();
    });
    let bench = Bench::over(crate_side, Default::default());
    bench.negotiate(OFFERED);
    (bench, crate_thread)
}

fn add(bench: &Bench, gpa: u64) -> u64 {
    bench.ask(R::ADD_MEM_REG, &region(gpa, 0x10000), &[memfd(0x10000).as_fd()])
}

fn set_log(bench: &Bench, size: u64) {
    let header = Header::request(R::SET_LOG_BASE as u32, 16);
    assert!(bench.front.send(header, &log_body(size), &[memfd(size).as_fd()]));
    assert_eq!(bench.reply(R::SET_LOG_BASE), log_body(size));
}

fn set_features(bench: &Bench, features: u64) -> u64 {
    bench.ask(R::SET_FEATURES, &features.to_le_bytes(), &[])
}

#[test]
fn a_whole_connection() {
    let (mut bench, crate_thread) = bench();
    assert_eq!(bench.ask(R::SET_OWNER, &[], &[]), 0);
    assert_eq!(bench.get(R::GET_QUEUE_NUM, &[]), 1u64.to_le_bytes());
    assert_eq!(add(&bench, 0), 0);
    let config = [&[0; 4][..], &56u32.to_le_bytes(), &[0; 60]].concat();
    assert_eq!(bench.get(R::GET_CONFIG, &config)[12..], [7; 56]);
    for round in 0..3 {
        assert_eq!(bench.ask(R::SET_VRING_NUM, &state(0, 128), &[]), 0, "round {round}");
        let addresses = [0u64, 0x7000_0000, 0x7000_2000, 0x7000_1000, 0];
        let addresses: Vec<u8> = addresses.iter().flat_map(|n| n.to_le_bytes()).collect();
        assert_eq!(bench.ask(R::SET_VRING_ADDR, &addresses, &[]), 0);
        assert_eq!(bench.ask(R::SET_VRING_BASE, &state(0, 0), &[]), 0);
        bench.start_ring();
        // None of these ends the connection.
        assert_eq!(bench.ask(R::SET_OWNER, &[], &[]), 0);
        assert_eq!(bench.ask(R::RESET_OWNER, &[], &[]), 0);
        assert_eq!(bench.ask(R::RESET_DEVICE, &[], &[]), 0);
        assert_eq!(bench.ask(R::SET_VRING_ENABLE, &state(0, 0), &[]), 0);
        assert_eq!(set_features(&bench, 1 << 30), 0);
        assert_eq!(bench.get(R::GET_VRING_BASE, &state(0, 0)), state(0, 0));
    }
    bench.handle.shutdown();
    bench.outcome().unwrap();
    crate_thread.join().unwrap();
}

#[test]
fn logs_follow_memory() {
    let (mut bench, crate_thread) = bench();
    assert_eq!(add(&bench, 0), 0);
    set_log(&bench, 4096);
    assert_eq!(set_features(&bench, 1 << 30 | 1 << 26), 0);
    assert_eq!(add(&bench, 0x10000), 0);
    assert_eq!(set_features(&bench, 1 << 30), 0);
    // One page of log covers 128 MiB. Memory past it does not matter before logging starts.
    assert_eq!(add(&bench, 1 << 30), 0);
    assert_eq!(set_features(&bench, 1 << 30 | 1 << 26), 1);
    assert!(matches!(bench.outcome(), Err(RelayError::Log(R::SET_FEATURES))));
    crate_thread.join().unwrap();
}

#[test]
fn what_it_refuses_has_a_name() {
    let (mut bench, crate_thread) = bench();
    // Nothing is mapped for writing that cannot be written.
    let memory = memfd(0x10000);
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
    let read_only = File::open(path).unwrap();
    assert_eq!(bench.ask(R::ADD_MEM_REG, &region(0, 0x10000), &[read_only.as_fd()]), 1);
    assert!(matches!(bench.outcome(), Err(RelayError::Refused(R::ADD_MEM_REG))));
    crate_thread.join().unwrap();
}
