//! What the front-end says, as vhost-user-backend hands it on.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ram_discard::memory::RamBlockError;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost_user_backend::VhostUserBackend;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::{END_EVENT, MAX_QUEUE_SIZE, MemBackend, NUM_QUEUES, Shared, WATCHDOG_EVENT};
use crate::device_state::blob;
use crate::queue::AtomicMemory;
use crate::ram_blocks::Kept;
use crate::sys::guest_memory;
use crate::vring::Vring;

/// VIRTIO_MEM_F_ACPI_PXM: node_id is valid (5.15.3).
const VIRTIO_MEM_F_ACPI_PXM: u32 = 0;
/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: the driver does not touch unplugged memory.
const VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: u32 = 1;
/// VIRTIO_MEM_F_PERSISTENT_SUSPEND: plugged memory survives suspend and resume.
const VIRTIO_MEM_F_PERSISTENT_SUSPEND: u32 = 2;

/// What the front-end may read; past the device's fields there are zeros. As much as a message can
/// ask for: a guest may read any part of the window that its VMM has, and a VMM that waits for the
/// content hangs at an answer without any.
const CONFIG_SPACE: usize = 4096;

impl VhostUserBackend for MemBackend {
    type Bitmap = BitmapMmapRegion;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        NUM_QUEUES
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        let pxm = u64::from(self.shared.controller.geometry().node_id().is_some());
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | pxm << VIRTIO_MEM_F_ACPI_PXM
            | 1 << VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE
            | 1 << VIRTIO_MEM_F_PERSISTENT_SUSPEND
            | VhostUserVirtioFeatures::LOG_ALL.bits()
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        let pagefault = if self.shared.offers_postcopy.load(Ordering::Relaxed) {
            VhostUserProtocolFeatures::PAGEFAULT
        } else {
            VhostUserProtocolFeatures::empty()
        };
        pagefault
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::DEVICE_STATE
    }

    /// A device reset changes no block and no byte (5.15.5.2).
    fn reset_device(&self) {}

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut space = [0; CONFIG_SPACE];
        let config = self.shared.controller.config().to_bytes();
        space[..config.len()].copy_from_slice(&config);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(usize::try_from(size).unwrap_or(usize::MAX));
        // Nothing at all is what the crate answers with an error.
        space.get(start..end).map(<[u8]>::to_vec).unwrap_or_default()
    }

    /// Every field is read-only for the driver; an error would close the connection.
    fn set_config(&self, offset: u32, buf: &[u8]) -> io::Result<()> {
        if !self.shared.config_write_logged.swap(true, Ordering::Relaxed) {
            let len = buf.len();
            tracing::warn!(offset, len, "ignoring writes to the read-only configuration space");
        }
        Ok(())
    }

    fn update_memory(&self, memory: AtomicMemory) -> io::Result<()> {
        let Shared { controller, blocks, postcopy, .. } = &*self.shared;
        let memory = memory.memory().into_inner();
        guest_memory::keep_out_of_core_dumps();
        let set = |new: Vec<Kept>| {
            controller.set_memory(new.iter().map(Kept::block).collect())?;
            blocks.keep(new);
            Ok(())
        };
        let result = blocks
            .of(&memory, controller.geometry().region())
            .and_then(|new| set(new).map_err(|error: RamBlockError| io::Error::other(error)))
            // The relay lets no request use it before.
            .and_then(|()| postcopy.map(memory));
        if let Some(resize) = self.shared.resize.get() {
            resize.memory();
        }
        result.inspect_err(|error| tracing::error!(%error, "refusing the front-end's memory"))
    }

    /// The ring was stopped: waits until no request is inside, so that nothing is written to
    /// guest memory any more when GET_VRING_BASE is answered.
    fn stop_vring(&self, _queue_index: u32) -> io::Result<()> {
        self.shared.gate.drain();
        Ok(())
    }

    /// The relay has seen to it that all rings are stopped.
    fn set_device_state_fd(
        &self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        file: File,
    ) -> io::Result<Option<File>> {
        let shared = Arc::clone(&self.shared);
        let transfers = &self.shared.transfers;
        let started = match direction {
            VhostTransferStateDirection::SAVE => transfers.start("saving", file, move |channel| {
                Ok(channel.write_all(&blob::encode(&shared.controller)?)?)
            }),
            VhostTransferStateDirection::LOAD => {
                let served = shared.served.load(Ordering::Relaxed);
                transfers.start("loading", file, move |channel| shared.load(channel, served))
            }
        };
        started
            .inspect_err(|error| tracing::error!(%error, "refusing to transfer device state"))?;
        Ok(None)
    }

    fn check_device_state(&self) -> io::Result<()> {
        if self.shared.transfers.check() {
            Ok(())
        } else {
            Err(io::Error::other("the device state was not transferred"))
        }
    }

    /// Never an error for what a guest or front-end does, since an error ends the worker.
    fn handle_event(
        &self,
        device_event: u16,
        _evset: EventSet,
        vrings: &[Vring],
        _thread_id: usize,
    ) -> io::Result<()> {
        if let Some(worker) = self.shared.worker.get() {
            worker.attend();
        }
        match vrings.get(usize::from(device_event)) {
            Some(vring) => self.serve(vring),
            // An error is how a worker is ended without the crate's exit event, whose
            // descriptor it would leak with every connection.
            None if device_event == END_EVENT => {
                if let Some(worker) = self.shared.worker.get() {
                    worker.plan();
                }
                return Err(io::Error::other("connection ended"));
            }
            None if device_event == WATCHDOG_EVENT => {
                if let Some(watchdog) = self.shared.watchdog.get() {
                    watchdog.tick();
                }
            }
            None => tracing::warn!(device_event, "unknown event"),
        }
        Ok(())
    }
}
