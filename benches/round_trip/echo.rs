//! The least a back-end on the same crates can do: takes chains and answers ACK.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;

use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use vhost_user_mem::backend::MAX_QUEUE_SIZE;
use vhost_user_mem::queue::{AtomicMemory, Memory};
use virtio_mem::device::Response;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddressSpace};
use vmm_sys_util::epoll::EventSet;

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

#[derive(Clone)]
struct Echo {
    memory: AtomicMemory,
}

type Vring = VringRwLock<AtomicMemory>;

/// Serves one front-end.
pub fn serve(socket: &Path) -> anyhow::Result<()> {
    let memory = AtomicMemory::new(Memory::new());
    let echo = Echo { memory: memory.clone() };
    let failed = |error| anyhow::anyhow!("echo back-end: {error}");
    let mut daemon = VhostUserDaemon::new("echo".to_owned(), echo, memory).map_err(failed)?;
    let mut listener = UnixListener::bind(socket)?.into();
    daemon.start(&mut listener).map_err(failed)?;
    // An error is how the end of the connection is told.
    let _ = daemon.wait();
    Ok(())
}

impl Echo {
    fn serve(&self, vring: &Vring) -> Result<(), virtio_queue::Error> {
        let memory = self.memory.memory();
        let answer = Response::Ack.to_bytes();
        loop {
            vring.disable_notification()?;
            let mut served = false;
            loop {
                let chain = vring.get_mut().get_queue_mut().pop_descriptor_chain(&*memory);
                let Some(mut chain) = chain else { break };
                let head = chain.head_index();
                let room = chain.find(|descriptor| descriptor.is_write_only());
                let written = room.is_some_and(|descriptor| {
                    memory.write_slice(&answer, descriptor.addr()).is_ok()
                });
                vring.add_used(head, if written { answer.len() as u32 } else { 0 })?;
                served = true;
            }
            if served && vring.needs_notification()? {
                let _ = vring.signal_used_queue();
            }
            if !vring.enable_notification()? {
                return Ok(());
            }
        }
    }
}

impl VhostUserBackend for Echo {
    type Bitmap = BitmapMmapRegion;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, _memory: AtomicMemory) -> io::Result<()> {
        Ok(())
    }

    fn handle_event(
        &self,
        _device_event: u16,
        _evset: EventSet,
        vrings: &[Vring],
        _thread_id: usize,
    ) -> io::Result<()> {
        self.serve(&vrings[0]).map_err(io::Error::other)
    }
}
