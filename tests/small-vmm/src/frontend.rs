//! The vhost-user front-end: the messages that a VMM sends, one method each.
//!
//! A [`Frontend`] is a handle that can be cloned; each request with its reply is one transaction,
//! whichever thread makes it. With `REPLY_ACK` negotiated and [`Frontend::set_need_reply`] on,
//! every request without a reply of its own is acknowledged; otherwise [`Frontend::sync`] tells
//! when the back-end has got that far.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::config::{CONFIG_SIZE, MemConfig};
use crate::connection::{Connection, Error, Message};
use crate::memory::{GuestRam, Region};
use crate::protocol::{
    self, FLAG_NEED_REPLY, MemoryRegion, Request, VRING_F_LOG, feature, protocol_feature, read32,
};
use crate::split_ring::SplitRing;

/// Virtio features that a modern guest on this VMM accepts.
pub const USUAL_FEATURES: u64 = feature::VERSION_1
    | feature::RING_INDIRECT_DESC
    | feature::RING_EVENT_IDX
    | feature::PROTOCOL_FEATURES
    | feature::VIRTIO_MEM_UNPLUGGED_INACCESSIBLE
    | feature::VIRTIO_MEM_PERSISTENT_SUSPEND
    | feature::VIRTIO_MEM_ACPI_PXM;

/// Protocol features that this VMM makes use of.
pub const USUAL_PROTOCOL_FEATURES: u64 = protocol_feature::MQ
    | protocol_feature::LOG_SHMFD
    | protocol_feature::REPLY_ACK
    | protocol_feature::BACKEND_REQ
    | protocol_feature::CONFIG
    | protocol_feature::RESET_DEVICE
    | protocol_feature::CONFIGURE_MEM_SLOTS
    | protocol_feature::DEVICE_STATE;

type Result<T> = std::result::Result<T, Error>;

/// What front-end and back-end agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// Virtio features that the back-end offers.
    pub offered: u64,
    /// Virtio features that were acknowledged.
    pub features: u64,
    /// Protocol features that the back-end offers.
    pub offered_protocol: u64,
    /// Protocol features that were acknowledged.
    pub protocol: u64,
}

#[derive(Debug)]
struct Inner {
    connection: Mutex<Connection>,
    features: AtomicU64,
    protocol_features: AtomicU64,
    need_reply: AtomicBool,
}

/// The front-end's side of one connection.
#[derive(Clone, Debug)]
pub struct Frontend {
    inner: Arc<Inner>,
}

impl Frontend {
    /// Connects to the socket of a back-end that may still be starting.
    pub fn connect(path: &Path) -> Result<Self> {
        Connection::connect(path, Duration::from_secs(5)).map(Self::new)
    }

    /// Connects anew after the back-end was killed; nothing is agreed on yet. All handles use the
    /// new connection.
    pub fn reconnect(&self, path: &Path) -> Result<()> {
        let fresh = Connection::connect(path, Duration::from_secs(5))?;
        let mut connection = self.connection();
        self.inner.features.store(0, Ordering::Relaxed);
        self.inner.protocol_features.store(0, Ordering::Relaxed);
        *connection = fresh;
        Ok(())
    }

    /// Takes over a connection.
    pub fn new(connection: Connection) -> Self {
        Self {
            inner: Arc::new(Inner {
                connection: Mutex::new(connection),
                features: AtomicU64::new(0),
                protocol_features: AtomicU64::new(0),
                need_reply: AtomicBool::new(true),
            }),
        }
    }

    /// The connection itself, for messages that no correct front-end sends. Others wait while the
    /// guard is held.
    pub fn connection(&self) -> MutexGuard<'_, Connection> {
        self.inner.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether requests ask for an acknowledgement (they do unless told otherwise); without
    /// `REPLY_ACK` they never do.
    pub fn set_need_reply(&self, need_reply: bool) {
        self.inner.need_reply.store(need_reply, Ordering::Relaxed);
    }

    /// The acknowledged virtio features.
    pub fn features(&self) -> u64 {
        self.inner.features.load(Ordering::Relaxed)
    }

    /// The acknowledged protocol features.
    pub fn protocol_features(&self) -> u64 {
        self.inner.protocol_features.load(Ordering::Relaxed)
    }

    /// Sends a request that has no reply of its own, and waits for the acknowledgement when there
    /// is one.
    pub fn request(
        &self,
        request: impl Into<u32>,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<()> {
        let request = request.into();
        let reply_ack = self.protocol_features() & protocol_feature::REPLY_ACK != 0;
        let acknowledged = reply_ack && self.inner.need_reply.load(Ordering::Relaxed);
        let connection = self.connection();
        connection.send(request, if acknowledged { FLAG_NEED_REPLY } else { 0 }, payload, fds)?;
        if acknowledged {
            let value = connection.recv_reply(request)?.value();
            if value != 0 {
                return Err(Error::Refused { request, value });
            }
        }
        Ok(())
    }

    /// Sends a request that has a reply of its own, and returns the reply.
    pub fn query(
        &self,
        request: impl Into<u32>,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Message> {
        let request = request.into();
        let connection = self.connection();
        connection.send(request, 0, payload, fds)?;
        connection.recv_reply(request)
    }

    /// Returns when the back-end has handled everything sent before.
    pub fn sync(&self) -> Result<()> {
        self.get_features().map(drop)
    }

    /// Becomes the owner and agrees on features, acknowledging what is both wanted and offered.
    pub fn negotiate(&self, wanted: u64, wanted_protocol: u64) -> Result<Negotiated> {
        self.request(Request::SetOwner, &[], &[])?;
        self.negotiate_again(wanted, wanted_protocol)
    }

    /// As [`Frontend::negotiate`], on a connection that is owned already.
    pub fn negotiate_again(&self, wanted: u64, wanted_protocol: u64) -> Result<Negotiated> {
        let offered = self.get_features()?;
        let mut agreed =
            Negotiated { offered, features: offered & wanted, ..Negotiated::default() };
        if agreed.features & feature::PROTOCOL_FEATURES != 0 {
            agreed.offered_protocol = self.get_protocol_features()?;
            agreed.protocol = agreed.offered_protocol & wanted_protocol;
            self.set_protocol_features(agreed.protocol)?;
        }
        self.set_features(agreed.features)?;
        Ok(agreed)
    }

    /// `GET_FEATURES`.
    pub fn get_features(&self) -> Result<u64> {
        Ok(self.query(Request::GetFeatures, &[], &[])?.value())
    }

    /// `SET_FEATURES`.
    pub fn set_features(&self, features: u64) -> Result<()> {
        self.request(Request::SetFeatures, &features.to_le_bytes(), &[])?;
        self.inner.features.store(features, Ordering::Relaxed);
        Ok(())
    }

    /// `GET_PROTOCOL_FEATURES`.
    pub fn get_protocol_features(&self) -> Result<u64> {
        Ok(self.query(Request::GetProtocolFeatures, &[], &[])?.value())
    }

    /// `SET_PROTOCOL_FEATURES`; acknowledgements start with the message after it.
    pub fn set_protocol_features(&self, features: u64) -> Result<()> {
        self.inner.protocol_features.store(0, Ordering::Relaxed);
        self.request(Request::SetProtocolFeatures, &features.to_le_bytes(), &[])?;
        self.inner.protocol_features.store(features, Ordering::Relaxed);
        Ok(())
    }

    /// `GET_QUEUE_NUM`.
    pub fn get_queue_num(&self) -> Result<u64> {
        Ok(self.query(Request::GetQueueNum, &[], &[])?.value())
    }

    /// `GET_MAX_MEM_SLOTS`.
    pub fn get_max_mem_slots(&self) -> Result<u64> {
        Ok(self.query(Request::GetMaxMemSlots, &[], &[])?.value())
    }

    /// `SET_MEM_TABLE` with every region of the guest.
    pub fn set_mem_table(&self, ram: &GuestRam) -> Result<()> {
        self.set_mem_table_of(ram, ram.regions())
    }

    /// `SET_MEM_TABLE` with some of the guest's regions.
    pub fn set_mem_table_of(&self, ram: &GuestRam, regions: &[Region]) -> Result<()> {
        let entries: Vec<_> = regions.iter().map(|region| entry(ram, region)).collect();
        let fds: Vec<_> = regions.iter().map(Region::fd).collect();
        self.request(Request::SetMemTable, &protocol::mem_table(&entries), &fds)
    }

    /// `ADD_MEM_REG`.
    pub fn add_mem_region(&self, ram: &GuestRam, region: &Region) -> Result<()> {
        self.request(
            Request::AddMemReg,
            &protocol::single_mem_region(entry(ram, region)),
            &[region.fd()],
        )
    }

    /// `REM_MEM_REG`, without the optional file descriptor.
    pub fn rem_mem_region(&self, ram: &GuestRam, region: &Region) -> Result<()> {
        self.request(Request::RemMemReg, &protocol::single_mem_region(entry(ram, region)), &[])
    }

    /// `POSTCOPY_ADVISE`: the back-end's userfaultfd, if it has one.
    pub fn postcopy_advise(&self) -> Result<Option<OwnedFd>> {
        Ok(self.query(Request::PostcopyAdvise, &[], &[])?.fds.pop())
    }

    /// `POSTCOPY_LISTEN`: memory that is sent from now on is answered with its addresses.
    pub fn postcopy_listen(&self) -> Result<()> {
        self.request(Request::PostcopyListen, &[], &[])
    }

    /// `POSTCOPY_END`: all memory has arrived.
    pub fn postcopy_end(&self) -> Result<u64> {
        Ok(self.query(Request::PostcopyEnd, &[], &[])?.value())
    }

    /// `SET_MEM_TABLE` in postcopy, with every region of the guest: where the back-end has mapped
    /// each, in the order of the table. Nothing is used before it is
    /// [confirmed](Self::confirm_memory).
    pub fn set_mem_table_postcopy(&self, ram: &GuestRam) -> Result<Vec<MemoryRegion>> {
        let entries: Vec<_> = ram.regions().iter().map(|region| entry(ram, region)).collect();
        let fds: Vec<_> = ram.regions().iter().map(Region::fd).collect();
        let reply = self.query(Request::SetMemTable, &protocol::mem_table(&entries), &fds)?;
        Ok(reply.payload[8..].chunks_exact(32).map(MemoryRegion::from_bytes).collect())
    }

    /// `ADD_MEM_REG` in postcopy: where the back-end has mapped the region.
    pub fn add_mem_region_postcopy(&self, ram: &GuestRam, region: &Region) -> Result<MemoryRegion> {
        let payload = protocol::single_mem_region(entry(ram, region));
        let reply = self.query(Request::AddMemReg, &payload, &[region.fd()])?;
        Ok(MemoryRegion::from_bytes(&reply.payload[8..]))
    }

    /// Confirms the memory of the last messages of that kind; there is no answer.
    pub fn confirm_memory(&self, request: Request) -> Result<()> {
        self.connection().send(request, 0, &0u64.to_le_bytes(), &[])
    }

    /// Everything that a ring needs before it is enabled; the kick is sent last, since it starts
    /// the ring.
    pub fn setup_ring(&self, index: u32, ring: &SplitRing) -> Result<()> {
        self.setup_ring_from(index, ring, ring.next_avail())
    }

    /// As [`Frontend::setup_ring`], for a ring that has requests from `base` on already.
    pub fn setup_ring_from(&self, index: u32, ring: &SplitRing, base: u16) -> Result<()> {
        self.set_vring_num(index, u32::from(ring.size()))?;
        self.set_vring_base(index, u32::from(base))?;
        let log = (self.features() & feature::LOG_ALL != 0).then(|| ring.used_addr());
        self.set_vring_addr(index, ring, log)?;
        self.set_vring_fd(Request::SetVringErr, index, Some(ring.err_fd()))?;
        self.set_vring_fd(Request::SetVringCall, index, Some(ring.call_fd()))?;
        self.set_vring_fd(Request::SetVringKick, index, Some(ring.kick_fd()))
    }

    /// Sets a ring up and enables it.
    pub fn start_ring(&self, index: u32, ring: &SplitRing) -> Result<()> {
        self.setup_ring(index, ring)?;
        if self.features() & feature::PROTOCOL_FEATURES != 0 {
            self.enable(index, true)?;
        }
        Ok(())
    }

    /// `SET_VRING_NUM`.
    pub fn set_vring_num(&self, index: u32, num: u32) -> Result<()> {
        self.request(Request::SetVringNum, &protocol::vring_state(index, num), &[])
    }

    /// `SET_VRING_BASE`.
    pub fn set_vring_base(&self, index: u32, base: u32) -> Result<()> {
        self.request(Request::SetVringBase, &protocol::vring_state(index, base), &[])
    }

    /// `SET_VRING_ADDR`, with the guest address under which the used ring is logged.
    pub fn set_vring_addr(&self, index: u32, ring: &SplitRing, log: Option<u64>) -> Result<()> {
        let ram = ring.ram();
        let user = |gpa| ram.user_addr(gpa).unwrap_or(gpa);
        let flags = if log.is_some() { VRING_F_LOG } else { 0 };
        let (descriptors, used, avail) =
            (user(ring.desc_addr()), user(ring.used_addr()), user(ring.avail_addr()));
        let payload =
            protocol::vring_addr(index, flags, descriptors, used, avail, log.unwrap_or(0));
        self.request(Request::SetVringAddr, &payload, &[])
    }

    /// `SET_VRING_KICK`, `SET_VRING_CALL` or `SET_VRING_ERR`.
    pub fn set_vring_fd(
        &self,
        request: Request,
        index: u32,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        let value = u64::from(index) | if fd.is_some() { 0 } else { protocol::VRING_NO_FD };
        self.request(request, &value.to_le_bytes(), fd.as_slice())
    }

    /// `SET_VRING_ENABLE`.
    pub fn enable(&self, index: u32, enable: bool) -> Result<()> {
        self.request(Request::SetVringEnable, &protocol::vring_state(index, u32::from(enable)), &[])
    }

    /// `GET_VRING_BASE`: stops the ring and tells where it stopped.
    pub fn get_vring_base(&self, index: u32) -> Result<u16> {
        let reply = self.query(Request::GetVringBase, &protocol::vring_state(index, 0), &[])?;
        Ok(read32(&reply.payload, 4) as u16)
    }

    /// `GET_CONFIG`: the bytes of the reply without its header of 12 bytes, so nothing at all for
    /// the reply that means an error.
    pub fn get_config(&self, offset: u32, size: u32) -> Result<Vec<u8>> {
        let payload = protocol::config(offset, 0, &vec![0; size as usize]);
        let mut reply = self.query(Request::GetConfig, &payload, &[])?.payload;
        Ok(reply.split_off(reply.len().min(12)))
    }

    /// The whole configuration, taken apart.
    pub fn config(&self) -> Result<MemConfig> {
        Ok(MemConfig::from_bytes(&self.get_config(0, CONFIG_SIZE)?))
    }

    /// `SET_CONFIG`.
    pub fn set_config(&self, offset: u32, flags: u32, bytes: &[u8]) -> Result<()> {
        self.request(Request::SetConfig, &protocol::config(offset, flags, bytes), &[])
    }

    /// `SET_LOG_BASE`; has a reply whenever `LOG_SHMFD` was agreed on.
    pub fn set_log_base(&self, log: &File, size: u64, offset: u64) -> Result<()> {
        let payload = protocol::log_base(size, offset);
        if self.protocol_features() & protocol_feature::LOG_SHMFD != 0 {
            self.query(Request::SetLogBase, &payload, &[log.as_fd()]).map(drop)
        } else {
            self.request(Request::SetLogBase, &payload, &[log.as_fd()])
        }
    }

    /// `RESET_DEVICE`.
    pub fn reset_device(&self) -> Result<()> {
        self.request(Request::ResetDevice, &[], &[])
    }

    /// `RESET_OWNER`.
    pub fn reset_owner(&self) -> Result<()> {
        self.request(Request::ResetOwner, &[], &[])
    }

    /// `SET_BACKEND_REQ_FD`.
    pub fn set_backend_req_fd(&self, fd: BorrowedFd<'_>) -> Result<()> {
        self.request(Request::SetBackendReqFd, &[], &[fd])
    }

    /// `SET_DEVICE_STATE_FD` in phase 0: `load` says which direction. Returns the fd of the
    /// back-end when it prefers its own.
    pub fn set_device_state_fd(
        &self,
        load: bool,
        fd: BorrowedFd<'_>,
    ) -> Result<(u64, Option<OwnedFd>)> {
        let mut reply = self.query(
            Request::SetDeviceStateFd,
            &protocol::words32(&[u32::from(load), 0]),
            &[fd],
        )?;
        Ok((reply.value(), reply.fds.pop()))
    }

    /// `CHECK_DEVICE_STATE`: zero when the transfer went well.
    pub fn check_device_state(&self) -> Result<u64> {
        Ok(self.query(Request::CheckDeviceState, &[], &[])?.value())
    }

    /// Closes the connection, also for every clone.
    pub fn disconnect(&self) {
        self.connection().shutdown();
    }
}

fn entry(ram: &GuestRam, region: &Region) -> MemoryRegion {
    MemoryRegion {
        guest_addr: region.gpa,
        size: region.size,
        // Regions of one layout that are not mapped here (a table with made-up entries) get their
        // guest address.
        user_addr: ram.user_addr(region.gpa).unwrap_or(region.gpa),
        mmap_offset: region.offset,
    }
}
