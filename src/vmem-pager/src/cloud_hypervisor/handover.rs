//! Handing a guest over from one Cloud Hypervisor to another on the same host: the descriptors of its memory pass
//! through, and nothing is copied.
//!
//! At most one of the two may run the guest, since they have the same memory. Until the receiver is asked to
//! complete, any failure has the source continue. A receiver that was asked and has not answered may run it: its
//! process is ended before the source is told that it keeps the guest.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use migration::Status;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal};
use serde_json::json;

use super::channel::Peer;
use super::edit::{self, Edit};
use super::giving::{Giving, NotTaken};
use super::layout::Layout;
use super::taking::{Along, accept, refuse, take_or_wait};
use super::unix;
use crate::cli::args::HandoverArgs;
use crate::cli::report::Report;
use crate::error::PagerError;
use crate::run::{POLL, Run};
use crate::socket::{self, Listener};

/// Hands a guest over: waits for the receiver to listen, then for the source to connect.
///
/// # Errors
///
/// Why the guest was not handed over; unless the error says otherwise, the source has it.
pub fn run(args: &HandoverArgs, run: &Arc<Run>, report: &Report) -> Result<(), PagerError> {
    unix(&args.socket)?;
    unix(&args.to)?;
    let listener = Listener::bind(&args.socket)?;
    run.progress.set_status(Status::Setup);
    let to = Peer::new(socket::connect(&args.to, run, None)?)?;
    let receiver = Process::of(&to);
    report.event("listening", &json!({ "socket": listener.address()?.to_string() }));
    let from = Peer::new(listener.accept(run, None)?)?;
    report.event("connected", &json!({}));
    run.progress.set_status(Status::Active);
    let handed = hand_over(&from, &to, receiver.as_ref(), &args.set, run, report);
    match &handed {
        Ok(()) => run.progress.set_status(Status::Completed),
        Err(error) => run.progress.fail(error),
    }
    handed
}

/// Passes on what comes.
struct Passing<'a> {
    to: &'a Peer,
    run: &'a Run,
    edits: &'a [Edit],
    giving: Option<Giving<'a>>,
    /// Sees to a receiver that may keep a copy of the guest.
    left_behind: &'a dyn Fn(),
    /// When the guest was paused.
    paused: Option<Instant>,
}

impl Along for Passing<'_> {
    fn configured(
        &mut self,
        config: &[u8],
        layout: &Layout,
        files: &[File],
    ) -> Result<(), PagerError> {
        let config = edit::apply(config, self.edits).map_err(PagerError::Usage)?;
        let giving = self.giving.insert(Giving::start(self.to, self.run, self.left_behind)?);
        giving.memory(layout, files)?;
        giving.config(&config)
    }

    fn stated(&mut self, state: &[u8]) -> Result<(), PagerError> {
        self.paused = Some(Instant::now());
        let giving = self.giving.as_mut().expect("State follows Config");
        giving.state(state)
    }
}

pub(super) fn hand_over(
    from: &Peer,
    to: &Peer,
    receiver: Option<&Process>,
    edits: &[Edit],
    run: &Run,
    report: &Report,
) -> Result<(), PagerError> {
    // A copy that is resumed would run on the memory of the source.
    let left_behind = || {
        if !receiver.is_some_and(Process::end) {
            report.warn(
                "the receiver has not said that it drops the guest, and cannot be ended from here: end it, since \
                 it has the memory of the source",
            );
        }
    };
    let (giving, paused) = (None, None);
    let mut passing = Passing { to, run, edits, giving, left_behind: &left_behind, paused };
    let taken = match take_or_wait(from, run, &mut passing) {
        Ok(taken) => taken,
        Err(error) => {
            // The receiver drops what it has got before the source continues.
            drop(passing);
            refuse(from);
            return Err(error);
        }
    };
    let (giving, paused) = (passing.giving.take(), passing.paused);
    let giving = giving.expect("a guest that is complete was configured");
    if from.is_closed() {
        return Err(PagerError::Peer(
            "the Cloud Hypervisor that has the guest closed the connection: it keeps the guest"
                .to_owned(),
        ));
    }
    match giving.complete(taken.paused) {
        Ok(()) => {}
        Err(NotTaken::Dropped(error)) => {
            refuse(from);
            return Err(error);
        }
        Err(NotTaken::Unknown(error)) => return Err(decide(error, from, receiver, run, report)),
    }
    accept(from, run).map_err(|error| {
        PagerError::Peer(format!(
            "{error}; the guest runs at its receiver, and the source may run it, too, on the same memory: end the \
             source at once"
        ))
    })?;
    let downtime = paused.map(|paused| paused.elapsed().as_millis() as u64);
    report.outcome("completed", &json!({ "paused": taken.paused, "downtime_ms": downtime }));
    Ok(())
}

/// Sees to it that the receiver does not run the guest, and gives it back to the source.
fn decide(
    error: PagerError,
    from: &Peer,
    receiver: Option<&Process>,
    run: &Run,
    report: &Report,
) -> PagerError {
    if receiver.is_some_and(Process::end) {
        refuse(from);
        return PagerError::Peer(format!(
            "{error}; its process was ended, and the guest runs on at its source"
        ));
    }
    report.warn(&format!(
        "{error}; the receiver may run the guest and cannot be ended from here: the source stays paused, since \
         both have the same memory. End the receiver, and this continues the source; or end the source, \
         if the receiver runs the guest"
    ));
    loop {
        if from.is_closed() {
            return PagerError::Peer(format!("{error}; the source has ended"));
        }
        if receiver.is_some_and(Process::has_ended) {
            refuse(from);
            return PagerError::Peer(format!("{error}; the guest runs on at its source"));
        }
        if run.check("").is_err() {
            return PagerError::Peer(format!(
                "{error}; interrupted, and the source runs on when this ends: end the receiver at once"
            ));
        }
        thread::sleep(POLL);
    }
}

/// The process of a receiver.
#[derive(Debug)]
pub(super) struct Process {
    fd: OwnedFd,
}

impl Process {
    /// The one that listens at the other end of a connection; `None` when it cannot be had, or is this one.
    fn of(peer: &Peer) -> Option<Self> {
        let pid = rustix::net::sockopt::socket_peercred(peer).ok()?.pid;
        Self::new(pid).filter(|_| pid != getpid())
    }

    pub(super) fn new(pid: Pid) -> Option<Self> {
        pidfd_open(pid, PidfdFlags::empty()).ok().map(|fd| Self { fd })
    }

    /// Whether it has ended.
    fn has_ended(&self) -> bool {
        self.wait(Timespec { tv_sec: 0, tv_nsec: 0 })
    }

    /// Ends it; whether it has ended.
    pub(super) fn end(&self) -> bool {
        // One that has ended already is no error.
        let _ = pidfd_send_signal(&self.fd, Signal::KILL);
        self.wait(Timespec {
            tv_sec: i64::try_from(super::LAST_WORD.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: 0,
        })
    }

    fn wait(&self, bound: Timespec) -> bool {
        poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&bound))
            .is_ok_and(|ready| ready != 0)
    }
}
