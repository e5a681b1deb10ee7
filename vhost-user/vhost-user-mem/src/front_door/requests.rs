//! What is done with each request of the front-end.

use std::os::fd::AsFd;

use rustix::net::{AddressFamily, SocketType, sockopt};
use tracing::{debug, warn};

use super::dirty_log::DirtyLog;
use super::error::RelayError;
use super::link::Stop;
use super::message::{FrontendRequest, Message, Reply, protocol, u32_at};
use super::quiesced::Quiesced;
use super::session::{LOG_ALL, PROTOCOL_FEATURES, Session};
use crate::descriptors;
use crate::shared_file::{FileKind, NOT_MEMORY};
use crate::sys::guest_memory;

/// Largest queue of the device.
pub(super) const QUEUE_SIZE_MAX: u16 = 128;
/// Bytes in front of the content of GET_CONFIG and SET_CONFIG.
const CONFIG_HEADER: usize = 12;
/// Size of the configuration space for the crate.
const CONFIG_SIZE: u64 = 4096;
/// Flags of a configuration request that the crate knows.
const CONFIG_FLAGS: u32 = 3;
/// In SET_VRING_KICK: there is no descriptor.
const NO_FD: u64 = 1 << 8;
/// The other direction of SET_DEVICE_STATE_FD is 0, to save.
const LOAD: u32 = 1;
/// The only phase of SET_DEVICE_STATE_FD.
const STOPPED: u32 = 0;
/// Bytes of the number that confirms memory in postcopy.
pub(super) const CONFIRMATION: usize = 8;
/// Answer to SET_DEVICE_STATE_FD: an error, and no descriptor.
const NO_TRANSFER: u64 = 0x101;

impl Session<'_> {
    /// Handles a request whose shape was checked.
    pub(super) fn handle(
        &mut self,
        request: FrontendRequest,
        message: Message,
    ) -> Result<(), Stop> {
        use FrontendRequest as R;
        match request {
            R::SET_OWNER => self.set_owner(message),
            R::RESET_OWNER => self.reset_owner(message),
            R::RESET_DEVICE => self.reset_device(message),
            R::SET_FEATURES => self.set_features(message),
            R::SET_PROTOCOL_FEATURES => self.set_protocol_features(message),
            R::SET_BACKEND_REQ_FD => self.set_backend_req_fd(message),
            R::SET_MEM_TABLE | R::ADD_MEM_REG | R::REM_MEM_REG => {
                self.change_memory(request, message)
            }
            R::SET_LOG_BASE => self.set_log_base(message),
            R::SET_LOG_FD => {
                // Only an event for a log that is full, which this one never is.
                debug!("the log event of the front-end is not used");
                self.acknowledge(message.header, 0)
            }
            R::SET_VRING_NUM => self.set_vring_num(message),
            R::SET_VRING_KICK => self.set_vring_kick(message),
            R::SET_VRING_CALL => self.set_vring_call(message),
            R::SET_VRING_ENABLE => self.set_vring_enable(message),
            R::GET_VRING_BASE => {
                // From the moment of the answer, the front-end may not be spoken to.
                self.rings.stop(message.u32_at(0));
                if self.rings.suspended() {
                    self.notifier.suspend();
                }
                self.tell_driver();
                self.pass(request, message)
            }
            R::GET_CONFIG | R::SET_CONFIG => self.config(request, message),
            R::SET_DEVICE_STATE_FD | R::CHECK_DEVICE_STATE => self.device_state(request, message),
            R::SET_VRING_ADDR => self.set_vring_addr(message),
            R::GET_MAX_MEM_SLOTS => self.get_max_mem_slots(message),
            R::POSTCOPY_ADVISE | R::POSTCOPY_LISTEN | R::POSTCOPY_END => {
                self.postcopy(request, message)
            }
            _ => self.pass(request, message),
        }
    }

    /// Passes a request on, and its answer back if the front-end waits for one.
    fn pass(&mut self, request: FrontendRequest, message: Message) -> Result<(), Stop> {
        let header = message.header;
        let reply = self.forward(request, message)?;
        if request.shape().reply == Reply::Always {
            self.answer_with(header, &reply)
        } else {
            self.acknowledge(header, 0)
        }
    }

    fn set_owner(&mut self, message: Message) -> Result<(), Stop> {
        // The crate ends the connection at the second one, which is harmless.
        if self.owned {
            return self.acknowledge(message.header, 0);
        }
        self.pass(FrontendRequest::SET_OWNER, message)?;
        self.owned = true;
        Ok(())
    }

    /// The crate forgets all features at RESET_OWNER, so that later messages would end the
    /// connection. The specification allows to disable the rings instead, or to ignore it.
    /// Without VHOST_USER_F_PROTOCOL_FEATURES rings cannot be disabled, and nothing would ever
    /// enable them again: then it is ignored.
    fn reset_owner(&mut self, message: Message) -> Result<(), Stop> {
        if self.features & PROTOCOL_FEATURES != 0 {
            self.notifier.suspend();
            let quiesced = Quiesced::new(self.events, self.link)?;
            for index in self.rings.enabled() {
                self.inject_enable(index, false)?;
            }
            self.rings.reset();
            self.events.rings_reset();
            self.tell_driver();
            drop(quiesced);
            self.set_log_all(false);
        }
        self.acknowledge(message.header, 0)
    }

    fn reset_device(&mut self, message: Message) -> Result<(), Stop> {
        let header = message.header;
        self.notifier.suspend();
        let quiesced = Quiesced::new(self.events, self.link)?;
        self.forward(FrontendRequest::RESET_DEVICE, message)?;
        self.rings.reset();
        self.features = 0;
        self.events.rings_reset();
        self.tell_driver();
        drop(quiesced);
        self.set_log_all(false);
        self.acknowledge(header, 0)
    }

    fn set_features(&mut self, message: Message) -> Result<(), Stop> {
        let request = FrontendRequest::SET_FEATURES;
        let (header, features) = (message.header, message.u64_at(0));
        let log_all = features & LOG_ALL != 0;
        if log_all && self.log.as_ref().is_some_and(|log| log.stale) {
            let quiesced = Quiesced::new(self.events, self.link)?;
            self.replay_log(request)?;
            drop(quiesced);
        }
        self.forward(request, message)?;
        self.features = features;
        if features & PROTOCOL_FEATURES == 0 {
            self.rings.enable_all();
        } else {
            self.enables_rings = true;
        }
        self.set_log_all(log_all);
        self.follow_rings();
        self.acknowledge(header, 0)
    }

    fn set_protocol_features(&mut self, mut message: Message) -> Result<(), Stop> {
        let request = FrontendRequest::SET_PROTOCOL_FEATURES;
        let (header, features) = (message.header, message.u64_at(0));
        let unknown = features & !self.protocol_offered;
        if unknown != 0 {
            let reason = format!("features that were not offered ({unknown:#x})");
            return Err(RelayError::Value { request, reason }.into());
        }
        let with_ack = features | 1 << protocol::REPLY_ACK;
        message.body = with_ack.to_le_bytes().to_vec();
        self.forward(request, message)?;
        self.protocol_acked = features;
        self.acknowledge(header, 0)
    }

    /// The channel is not for the crate: it could not send what is needed, and would wait for
    /// answers without a limit.
    fn set_backend_req_fd(&mut self, mut message: Message) -> Result<(), Stop> {
        let request = FrontendRequest::SET_BACKEND_REQ_FD;
        let Some(fd) = message.fds.pop() else {
            return Err(RelayError::Fds { request, count: 0 }.into());
        };
        let family = sockopt::socket_domain(&fd);
        let kind = sockopt::socket_type(&fd);
        if family != Ok(AddressFamily::UNIX) || kind != Ok(SocketType::STREAM) {
            let reason = "a descriptor that is not a Unix stream socket".into();
            return Err(RelayError::Value { request, reason }.into());
        }
        if self.negotiated(protocol::CONFIG) {
            self.notifier.attach(fd, self.negotiated(protocol::REPLY_ACK));
        } else {
            debug!("the front-end does not take configuration changes");
            self.mute_channel = Some(fd);
        }
        self.acknowledge(message.header, 0)
    }

    /// No request may be executed while its memory goes away or comes in without its log.
    fn change_memory(
        &mut self,
        request: FrontendRequest,
        mut message: Message,
    ) -> Result<(), Stop> {
        if message.body.len() == CONFIRMATION {
            return self.confirm_memory(request, &message);
        }
        let header = message.header;
        let regions = regions(request, &message);
        if request == FrontendRequest::REM_MEM_REG {
            // Allowed to come, not to be used.
            message.fds.clear();
        } else if message.fds.len() != regions {
            return Err(RelayError::Fds { request, count: message.fds.len() }.into());
        }
        self.check_files(request, &message)?;
        let mut body = message.body.clone();
        let table = self.table.after(request, &mut message)?;
        let quiesced = Quiesced::new(self.events, self.link)?;
        self.forward(request, message)?;
        self.table = table;
        if request == FrontendRequest::REM_MEM_REG {
            drop(quiesced);
            return self.acknowledge(header, 0);
        }
        if let Some(log) = &mut self.log {
            log.stale = true;
        }
        self.refresh_log(request)?;
        if !self.listening {
            drop(quiesced);
            return self.acknowledge(header, 0);
        }
        // Not used before the front-end can bring what is missing.
        self.unconfirmed = Some(quiesced);
        self.tell_addresses(request, &mut body)?;
        self.answer(header, &body, &[])
    }

    /// Gives the log to memory that does not have it. A log that is not in use may be older than
    /// the memory and too small for it: then it waits for SET_FEATURES.
    fn refresh_log(&mut self, request: FrontendRequest) -> Result<(), Stop> {
        if self.log_all && self.log.as_ref().is_some_and(|log| log.stale) {
            self.replay_log(request)?;
        }
        Ok(())
    }

    /// Refuses files whose file system could keep the daemon waiting: from here on it is asked.
    fn check_files(&self, request: FrontendRequest, message: &Message) -> Result<(), RelayError> {
        let is_memory = |file| FileKind::of(file) == FileKind::Memory;
        if self.events.allows_files() || message.fds.iter().all(is_memory) {
            return Ok(());
        }
        Err(RelayError::Value { request, reason: NOT_MEMORY.to_owned() })
    }

    /// There may be fewer descriptors than the crate has slots.
    fn get_max_mem_slots(&self, message: Message) -> Result<(), Stop> {
        let header = message.header;
        let reply = self.forward(FrontendRequest::GET_MAX_MEM_SLOTS, message)?;
        let slots = reply.u64_at(0).min(descriptors::memory_slots());
        self.answer(header, &slots.to_le_bytes(), &[])
    }

    /// The crate says of no address why it refuses it; and takes rings in memory that the guest may
    /// not use, which it could never serve.
    fn set_vring_addr(&mut self, message: Message) -> Result<(), Stop> {
        let request = FrontendRequest::SET_VRING_ADDR;
        let refuse = |reason| Err(RelayError::Value { request, reason }.into());
        if self.unconfirmed.is_some() {
            // The crate reads the used index, and the front-end would not bring its page.
            return refuse("memory that it has not confirmed".into());
        }
        let size = u64::from(self.rings.size(message.u32_at(0)));
        for (what, at, len) in [
            ("descriptor table", 8, 16 * size),
            ("used ring", 16, 6 + 8 * size),
            ("available ring", 24, 6 + 2 * size),
        ] {
            let user_addr = message.u64_at(at);
            let Some(gpa) = self.table.gpa_of(user_addr) else {
                return refuse(format!(
                    "a {what} at user address {user_addr:#x}, which is in no memory region"
                ));
            };
            if !self.events.is_usable(gpa, len) {
                return refuse(format!(
                    "a {what} at guest-physical {gpa:#x}, in memory of the device that is not \
                     plugged: is --addr right?"
                ));
            }
        }
        self.pass(request, message)
    }

    fn set_log_base(&mut self, message: Message) -> Result<(), Stop> {
        let header = message.header;
        self.check_files(FrontendRequest::SET_LOG_BASE, &message)?;
        let log = DirtyLog::new(message)?;
        let request = FrontendRequest::SET_LOG_BASE;
        let reply = self.inject(request, &log.body, &[log.fd.as_fd()])?;
        guest_memory::keep_out_of_core_dumps();
        self.log = Some(log);
        self.answer_with(header, &reply)
    }

    fn set_vring_num(&mut self, message: Message) -> Result<(), Stop> {
        let num = message.u32_at(4);
        if num == 0 || num > u32::from(QUEUE_SIZE_MAX) || !num.is_power_of_two() {
            let reason = format!("{num} entries, not a power of two up to {QUEUE_SIZE_MAX}");
            return Err(
                RelayError::Value { request: FrontendRequest::SET_VRING_NUM, reason }.into()
            );
        }
        let index = message.u32_at(0);
        self.pass(FrontendRequest::SET_VRING_NUM, message)?;
        self.rings.resize(index, u16::try_from(num).unwrap_or(QUEUE_SIZE_MAX));
        Ok(())
    }

    fn set_vring_kick(&mut self, message: Message) -> Result<(), Stop> {
        let (header, value) = (message.header, message.u64_at(0));
        self.forward_disabled(FrontendRequest::SET_VRING_KICK, message)?;
        if value & NO_FD == 0 {
            self.rings.start(u32::from(value as u8));
            self.follow_rings();
        }
        self.acknowledge(header, 0)
    }

    fn set_vring_call(&mut self, message: Message) -> Result<(), Stop> {
        let header = message.header;
        self.forward_disabled(FrontendRequest::SET_VRING_CALL, message)?;
        self.acknowledge(header, 0)
    }

    /// Passes on what replaces a descriptor of a ring. The crate would go on watching the kick of a
    /// ring that runs, and not watch the new one; only when a ring is disabled and enabled, it
    /// changes what it watches. And a new call is signalled once, which the ring's worker does
    /// when it is enabled.
    fn forward_disabled(&mut self, request: FrontendRequest, message: Message) -> Result<(), Stop> {
        let index = u32::from(message.u64_at(0) as u8);
        if !self.rings.runs(index) {
            return self.forward(request, message).map(drop);
        }
        let with_protocol = self.features & PROTOCOL_FEATURES != 0;
        if !with_protocol {
            // Without it, the crate enables and disables nothing.
            self.inject_features(self.features | PROTOCOL_FEATURES)?;
        }
        self.inject_enable(index, false)?;
        self.forward(request, message)?;
        self.inject_enable(index, true)?;
        if !with_protocol {
            self.inject_features(self.features)?;
        }
        Ok(())
    }

    fn inject_features(&self, features: u64) -> Result<(), Stop> {
        let request = FrontendRequest::SET_FEATURES;
        self.inject(request, &features.to_le_bytes(), &[]).map(drop)
    }

    fn inject_enable(&self, index: u32, on: bool) -> Result<(), Stop> {
        let mut body = index.to_le_bytes().to_vec();
        body.extend_from_slice(&u32::from(on).to_le_bytes());
        self.inject(FrontendRequest::SET_VRING_ENABLE, &body, &[]).map(drop)
    }

    fn set_vring_enable(&mut self, message: Message) -> Result<(), Stop> {
        let request = FrontendRequest::SET_VRING_ENABLE;
        let (header, index, num) = (message.header, message.u32_at(0), message.u32_at(4));
        if num > 1 {
            let reason = format!("state {num} instead of 0 or 1");
            return Err(RelayError::Value { request, reason }.into());
        }
        if self.features & PROTOCOL_FEATURES == 0 {
            // After a reset the crate wants SET_FEATURES first, but all rings are disabled
            // already.
            if num == 0 && self.enables_rings && self.features == 0 {
                return self.acknowledge(header, 0);
            }
            let reason = "VHOST_USER_F_PROTOCOL_FEATURES not acknowledged".into();
            return Err(RelayError::Value { request, reason }.into());
        }
        self.forward(request, message)?;
        self.rings.enable(index, num == 1);
        self.follow_rings();
        self.acknowledge(header, 0)
    }

    /// The crate ends the connection at a window that it does not have; the specification knows
    /// an answer without content for that.
    fn config(&mut self, request: FrontendRequest, message: Message) -> Result<(), Stop> {
        let (offset, size) = (message.u32_at(0), message.u32_at(4));
        if message.body.len() - CONFIG_HEADER != size as usize {
            return Err(RelayError::Size { request, size: message.body.len() }.into());
        }
        let outside = u64::from(offset) + u64::from(size) > CONFIG_SIZE;
        if size != 0 && !outside && message.u32_at(8) & !CONFIG_FLAGS == 0 {
            return self.pass(request, message);
        }
        warn!(%request, offset, size, "the front-end asked for no part of the configuration");
        if request == FrontendRequest::SET_CONFIG {
            return self.acknowledge(message.header, 1);
        }
        let mut body = message.body[..CONFIG_HEADER].to_vec();
        body[4..8].fill(0);
        self.answer(message.header, &body, &[])
    }

    /// The crate asks neither for the feature nor for stopped rings, and ends the connection at
    /// directions and phases that it does not know; all of it has an answer that spares it.
    fn device_state(&mut self, request: FrontendRequest, message: Message) -> Result<(), Stop> {
        let negotiated = self.negotiated(protocol::DEVICE_STATE);
        if request == FrontendRequest::CHECK_DEVICE_STATE && !negotiated {
            return self.answer(message.header, &1u64.to_le_bytes(), &[]);
        }
        if request == FrontendRequest::SET_DEVICE_STATE_FD
            && !(negotiated && self.rings.suspended())
        {
            warn!(negotiated, "device state can only be transferred while all rings are stopped");
            return self.answer(message.header, &NO_TRANSFER.to_le_bytes(), &[]);
        }
        if request == FrontendRequest::SET_DEVICE_STATE_FD {
            let (direction, phase) = (message.u32_at(0), message.u32_at(4));
            if direction > LOAD || phase != STOPPED {
                warn!(direction, phase, "unknown direction or phase of device state");
                return self.answer(message.header, &NO_TRANSFER.to_le_bytes(), &[]);
            }
            let files = message.fds.iter().any(|fd| FileKind::of(fd) == FileKind::Other);
            if files && !self.events.allows_files() {
                warn!("device state cannot be transferred by {NOT_MEMORY}");
                return self.answer(message.header, &NO_TRANSFER.to_le_bytes(), &[]);
            }
        }
        self.pass(request, message)
    }
}

/// How many regions the message describes.
fn regions(request: FrontendRequest, message: &Message) -> usize {
    if request == FrontendRequest::SET_MEM_TABLE { u32_at(&message.body, 0) as usize } else { 1 }
}
