//! The daemon's own state, by VHOST_USER_SET_DEVICE_STATE_FD: bytes that only a daemon
//! understands.

use vmstate::{Access, Count, Field, Reason, SliceAccess, VmState, VmStateDevice};

use crate::device_state;
use crate::frontend::Frontend;

/// More than any daemon needs: a bit for each of 2^26 blocks is 8 MiB.
const LIMIT: u64 = 64 << 20;
#[derive(Default)]
pub(super) struct State {
    len: u64,
    bytes: Vec<u8>,
}

pub(super) static VMSTATE: VmState<State> = VmState::new(
    "vhost-user-back-end",
    1,
    &[
        Field::u64("len", Access::Mutable(|s| s.len, |s, len| s.len = len)),
        Field::bytes(
            "state",
            Count::From { count: |s| s.len, limit: LIMIT },
            SliceAccess::Mutable(|s| &s.bytes, |s, bytes| s.bytes = bytes),
        ),
    ],
);

/// The daemon on the other end of a vhost-user connection. Its rings must be stopped.
pub(super) struct BackEnd {
    pub(super) frontend: Frontend,
    /// Whether it is to be saved; one that is to be loaded has nothing to tell.
    pub(super) saves: bool,
}

impl VmStateDevice for BackEnd {
    type State = State;

    fn snapshot(&mut self) -> Result<State, Reason> {
        if !self.saves {
            return Ok(State::default());
        }
        let saved = device_state::save(&self.frontend)?;
        let bytes = saved.ok_or("the daemon does not tell its state; its own log says why")?;
        Ok(State { len: bytes.len() as u64, bytes })
    }

    fn take_over(&mut self, state: State) -> Result<(), Reason> {
        match device_state::load(&self.frontend, &state.bytes)? {
            true => Ok(()),
            false => Err("the daemon refuses its state; its own log says why".into()),
        }
    }
}
