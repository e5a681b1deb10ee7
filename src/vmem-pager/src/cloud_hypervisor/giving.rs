//! The sending end: gives a guest to a Cloud Hypervisor that waits in `receive-migration`.
//!
//! Until Complete has been sent, a failure of any kind ends with Abandon, which makes Cloud Hypervisor drop what it
//! has built: a connection that merely ends would leave it with a configuration or, after State, with a second
//! copy of the guest.

use std::fmt;
use std::fs::File;
use std::time::Duration;

use super::channel::{Lost, Peer, Wait};
use super::layout::Layout;
use super::protocol::{Answer, Command, Request, SLOT_LEN};
use crate::error::PagerError;
use crate::run::Run;

/// What the peer is called.
pub(super) const WHO: &str = "the Cloud Hypervisor that is to have the guest";

/// How long it may take to close the connection after its last answer; longer is no failure.
const CLOSES: Duration = Duration::from_millis(100);

/// How a request that hands a guest over ended otherwise than well.
#[derive(Debug)]
pub enum NotTaken {
    /// Cloud Hypervisor has answered Error and dropped the guest, or was told to.
    Dropped(PagerError),
    /// Complete was sent and not answered: the guest may run there.
    Unknown(PagerError),
}

/// A guest on its way to a Cloud Hypervisor; dropped before it is complete, it is abandoned.
pub struct Giving<'a> {
    peer: &'a Peer,
    run: &'a Run,
    /// Called when it was abandoned without an answer after State, so that a second copy of the guest may be left.
    left_behind: &'a dyn Fn(),
    /// Abandon can still be sent, and means something.
    open: bool,
    /// State was sent.
    stated: bool,
}

impl fmt::Debug for Giving<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { open, stated, .. } = self;
        f.debug_struct("Giving").field("open", open).field("stated", stated).finish_non_exhaustive()
    }
}

impl<'a> Giving<'a> {
    /// Says that a guest comes. `left_behind` is called when the guest is abandoned after State and there is no
    /// answer: a second copy of it may be left.
    ///
    /// # Errors
    ///
    /// When Cloud Hypervisor refuses, breaks off or is silent.
    pub fn start(
        peer: &'a Peer,
        run: &'a Run,
        left_behind: &'a dyn Fn(),
    ) -> Result<Self, PagerError> {
        let mut giving = Self { peer, run, left_behind, open: true, stated: false };
        giving.ask(Command::Start, &[])?;
        Ok(giving)
    }

    /// Hands over the memory of all mappings, in the order of the layout.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub fn memory(&mut self, layout: &Layout, files: &[File]) -> Result<(), PagerError> {
        for (mapping, file) in layout.mappings.iter().zip(files) {
            let request = Request::new(Command::MemoryFd, SLOT_LEN as u64);
            let what = "its memory being read";
            self.send(request, &[], what)?;
            let wait = Wait::within(self.run.silence(), what);
            match self.peer.send_slot(mapping.slot, file, self.run, wait) {
                Ok(()) | Err(Lost::Closed) => {}
                Err(lost) => {
                    // Abandon would be taken for the slot.
                    self.open = false;
                    return Err(lost.explain(WHO, what));
                }
            }
            self.answer(Command::MemoryFd)?;
        }
        Ok(())
    }

    /// Sends Config.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub fn config(&mut self, config: &[u8]) -> Result<(), PagerError> {
        self.ask(Command::Config, config)
    }

    /// Sends State.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub fn state(&mut self, state: &[u8]) -> Result<(), PagerError> {
        self.stated = true;
        self.ask(Command::State, state)
    }

    /// Completes: from now on Cloud Hypervisor has the guest.
    ///
    /// # Errors
    ///
    /// When it has not, or may not have, the guest.
    pub fn complete(self, paused: bool) -> Result<(), NotTaken> {
        // A run that has ended sends nothing any more.
        self.run.check("the guest was being handed over").map_err(NotTaken::Dropped)?;
        self.complete_now(paused)
    }

    /// As [`complete`](Self::complete), also when the run has ended.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn complete_now(mut self, paused: bool) -> Result<(), NotTaken> {
        let command = if paused { Command::CompletePaused } else { Command::Complete };
        self.send(Request::new(command, 0), &[], "the guest being taken")
            .map_err(NotTaken::Dropped)?;
        self.open = false;
        // The end of the run is no reason to leave open who has the guest.
        let patient = Run::new(None);
        let what = format!("its answer to {command:?}");
        let wait = Wait::within(self.run.silence(), &what);
        match self.peer.read_answer(&patient, wait) {
            Ok(Answer::Ok) => self.check_last(&patient),
            Ok(Answer::Error) => Err(NotTaken::Dropped(refused(command))),
            Err(lost) => Err(NotTaken::Unknown(lost.explain(WHO, &what))),
        }
    }

    /// Cloud Hypervisor closes after its last answer. Where another one follows, what was taken for the last was an
    /// answer to something before it.
    fn check_last(&self, run: &Run) -> Result<(), NotTaken> {
        match self.peer.read_answer(run, Wait::within(CLOSES, "the end of the connection")) {
            Ok(_) | Err(Lost::Invalid(_)) => Err(NotTaken::Unknown(PagerError::Protocol(format!(
                "{WHO} sent more answers than it was asked for"
            )))),
            Err(_) => Ok(()),
        }
    }

    fn ask(&mut self, command: Command, payload: &[u8]) -> Result<(), PagerError> {
        let what = format!("its answer to {command:?}");
        self.send(Request::new(command, payload.len() as u64), payload, &what)?;
        self.answer(command)
    }

    /// Sends a request. Cloud Hypervisor answers Error and closes: what it says is read also when it has gone.
    fn send(&mut self, request: Request, payload: &[u8], what: &str) -> Result<(), PagerError> {
        if self.peer.has_sent() {
            // It would be taken for the answer to this request.
            return Err(PagerError::Protocol(format!("{WHO} sent an answer before it was asked")));
        }
        let (mut at, wait) = (0, Wait::within(self.run.silence(), what));
        match self.peer.send(request, payload, &mut at, self.run, wait) {
            Ok(()) | Err(Lost::Closed) => Ok(()),
            Err(lost) => {
                // Abandon would be taken for the rest of a frame that has gone in part.
                let wait = Wait::within(super::LAST_WORD, what);
                let patient = Run::new(None);
                self.open =
                    at == 0 || self.peer.send(request, payload, &mut at, &patient, wait).is_ok();
                Err(lost.explain(WHO, what))
            }
        }
    }

    fn answer(&mut self, command: Command) -> Result<(), PagerError> {
        let what = format!("its answer to {command:?}");
        match self.peer.read_answer(self.run, Wait::within(self.run.silence(), &what)) {
            Ok(Answer::Ok) => Ok(()),
            Ok(Answer::Error) => {
                // It has closed.
                self.open = false;
                Err(refused(command))
            }
            Err(lost) => Err(lost.explain(WHO, &what)),
        }
    }
}

impl Giving<'_> {
    /// Has Cloud Hypervisor drop what it has got; whether it has said that it does, or that it had before.
    fn abandon(&self) -> bool {
        // The run may have ended, and this has to be said all the same.
        let run = Run::new(None);
        let wait = Wait::within(super::LAST_WORD, "Abandon");
        if self.peer.send(Request::new(Command::Abandon, 0), &[], &mut 0, &run, wait).is_err() {
            return false;
        }
        // An answer to what was asked before may come first, or two. After the last one it closes.
        for answers in 0..4 {
            match self.peer.read_answer(&run, wait) {
                Ok(_) | Err(Lost::Invalid(_)) => {}
                Err(Lost::Closed) => return answers != 0,
                Err(_) => return false,
            }
        }
        false
    }
}

impl Drop for Giving<'_> {
    fn drop(&mut self) {
        if self.open && !self.abandon() && self.stated {
            (self.left_behind)();
        }
    }
}

fn refused(command: Command) -> PagerError {
    PagerError::Peer(format!("{WHO} answered {command:?} with Error; its log says why"))
}
