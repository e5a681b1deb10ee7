//! The sending end: gives a guest to a Cloud Hypervisor that waits in `receive-migration`.
//!
//! Until Complete has been sent, a failure of any kind ends with Abandon, which makes Cloud Hypervisor drop what it
//! has built: a connection that merely ends would leave it with a configuration or, after State, with a second
//! copy of the guest.

use std::fs::File;

use super::channel::{Lost, Peer, Wait};
use super::layout::Layout;
use super::protocol::{Answer, Command, Request, SLOT_LEN};
use crate::error::PagerError;
use crate::run::Run;

/// What the peer is called.
pub(super) const WHO: &str = "the Cloud Hypervisor that is to have the guest";

/// How a request that hands a guest over ended otherwise than well.
#[derive(Debug)]
pub enum NotTaken {
    /// Cloud Hypervisor has answered Error and dropped the guest, or was told to.
    Dropped(PagerError),
    /// Complete was sent and not answered: the guest may run there.
    Unknown(PagerError),
}

/// A guest on its way to a Cloud Hypervisor; dropped before it is complete, it is abandoned.
#[derive(Debug)]
pub struct Giving<'a> {
    peer: &'a Peer,
    run: &'a Run,
    /// Abandon can still be sent, and means something.
    open: bool,
}

impl<'a> Giving<'a> {
    /// Says that a guest comes.
    ///
    /// # Errors
    ///
    /// When Cloud Hypervisor refuses, breaks off or is silent.
    pub fn start(peer: &'a Peer, run: &'a Run) -> Result<Self, PagerError> {
        let mut giving = Self { peer, run, open: true };
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
            let wait = Wait::within(self.run.silence(), what);
            let sent = self.peer.send(request, &[], self.run, wait);
            let sent = sent.and_then(|()| self.peer.send_slot(mapping.slot, file, self.run, wait));
            self.check_sent(sent, what)?;
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
        self.ask(Command::State, state)
    }

    /// Completes: from now on Cloud Hypervisor has the guest.
    ///
    /// # Errors
    ///
    /// When it has not, or may not have, the guest.
    pub fn complete(mut self, paused: bool) -> Result<(), NotTaken> {
        let command = if paused { Command::CompletePaused } else { Command::Complete };
        // A run that has ended sends nothing any more.
        self.run.check("the guest was being handed over").map_err(NotTaken::Dropped)?;
        let wait = Wait::within(self.run.silence(), "the guest being taken");
        let sent = self.peer.send(Request::new(command, 0), &[], self.run, wait);
        self.check_sent(sent, "the guest being taken").map_err(NotTaken::Dropped)?;
        self.open = false;
        // The end of the run is no reason to leave open who has the guest.
        let patient = Run::new(None);
        let what = format!("its answer to {command:?}");
        let wait = Wait::within(self.run.silence(), &what);
        match self.peer.read_answer(&patient, wait) {
            Ok(Ok(Answer::Ok)) => Ok(()),
            Ok(Ok(Answer::Error)) => Err(NotTaken::Dropped(refused(command))),
            Ok(Err(what)) => {
                Err(NotTaken::Unknown(PagerError::Protocol(format!("{WHO} sent {what}"))))
            }
            Err(lost) => Err(NotTaken::Unknown(lost.explain(WHO, &what))),
        }
    }

    fn ask(&mut self, command: Command, payload: &[u8]) -> Result<(), PagerError> {
        let what = format!("its answer to {command:?}");
        let wait = Wait::within(self.run.silence(), &what);
        let request = Request::new(command, payload.len() as u64);
        let sent = self.peer.send(request, payload, self.run, wait);
        self.check_sent(sent, &what)?;
        self.answer(command)
    }

    /// Cloud Hypervisor answers Error and closes: what it says is read also when it has gone.
    fn check_sent(&mut self, sent: Result<(), Lost>, what: &str) -> Result<(), PagerError> {
        match sent {
            Err(Lost::Closed) => Ok(()),
            Err(lost) => {
                // Part of a frame may be on its way: Abandon would be taken for the rest of it.
                self.open = false;
                Err(lost.explain(WHO, what))
            }
            Ok(()) => Ok(()),
        }
    }

    fn answer(&mut self, command: Command) -> Result<(), PagerError> {
        let what = format!("its answer to {command:?}");
        match self.peer.read_answer(self.run, Wait::within(self.run.silence(), &what)) {
            Ok(Ok(Answer::Ok)) => Ok(()),
            Ok(Ok(Answer::Error)) => {
                // It has closed.
                self.open = false;
                Err(refused(command))
            }
            Ok(Err(what)) => Err(PagerError::Protocol(format!("{WHO} sent {what}"))),
            Err(lost) => Err(lost.explain(WHO, &what)),
        }
    }
}

impl Drop for Giving<'_> {
    fn drop(&mut self) {
        if !self.open {
            return;
        }
        // The run may have ended, and this has to be said all the same.
        let run = Run::new(None);
        let wait = Wait::within(super::LAST_WORD, "Abandon");
        if self.peer.send(Request::new(Command::Abandon, 0), &[], &run, wait).is_err() {
            return;
        }
        // An answer to what was asked before may come first.
        for _ in 0..2 {
            if self.peer.read_answer(&run, wait).is_err() {
                return;
            }
        }
    }
}

fn refused(command: Command) -> PagerError {
    PagerError::Peer(format!("{WHO} answered {command:?} with Error; its log says why"))
}
