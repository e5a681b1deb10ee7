//! Handing a guest over from one Cloud Hypervisor to another on the same host: the descriptors of its memory pass
//! through, and nothing is copied.
//!
//! At most one of the two may run the guest, since they have the same memory. So the receiver gets all of the guest and
//! stays paused; then the source is told that its guest was taken; and only once it has read that, and cannot run the
//! guest any more, the receiver is told to. Until the source has read it, any failure has the source continue, and the
//! receiver drops what it has got. From then on this process has the guest, until a receiver runs it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use migration::Status;
use program::peer;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal};
use serde_json::json;

use super::channel::{Peer, Reading};
use super::edit::{self, Edit};
use super::giving::{Giving, NotTaken};
use super::layout::Layout;
use super::taking::{Along, Taken, accept, refuse, take_or_wait};
use super::unix;
use crate::cli::args::HandoverArgs;
use crate::cli::report::Report;
use crate::error::PagerError;
use crate::run::{POLL, Run};
use crate::socket::{self, Listener};

/// Between two looks at whether the source has read what it was told; it is paused meanwhile.
const LOOK: Duration = Duration::from_micros(200);

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
    let connect = || {
        let to = Peer::new(socket::connect(&args.to, run, report, None)?)?;
        let process = Process::of(&to);
        Ok(Receiver { to, process })
    };
    let receiver = connect()?;
    report.event("listening", &json!({ "socket": listener.address()?.to_string() }));
    let from = Peer::new(listener.accept(run, None)?)?;
    let process = Process::of(&from);
    report.event("connected", &json!({}));
    run.progress.set_status(Status::Active);
    let source = Source { from: &from, process: process.as_ref() };
    let handed = hand_over(&source, receiver, &connect, &args.set, run, report);
    match &handed {
        Ok(()) => run.progress.set_status(Status::Completed),
        Err(error) => run.progress.fail(error),
    }
    handed
}

/// The Cloud Hypervisor that has the guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source<'a> {
    pub from: &'a Peer,
    /// Its process, where that is known.
    pub process: Option<&'a Process>,
}

/// The one that is to have it.
#[derive(Debug)]
pub(super) struct Receiver {
    pub to: Peer,
    /// Its process, where that is known.
    pub process: Option<Process>,
}

impl Receiver {
    /// Ends one that may have a copy of the guest which it has not said that it drops: resumed, it would run on the
    /// memory of the source.
    fn drop_copy(&self, report: &Report) {
        if !self.process.as_ref().is_some_and(Process::end) {
            report.warn(
                "the receiver has not said that it drops the guest, and cannot be ended from here: end it, since \
                 it has the memory of the source",
            );
        }
    }
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

/// `another` connects to the next receiver, should the first one not run a guest that the source has let go of.
pub(super) fn hand_over(
    source: &Source<'_>,
    receiver: Receiver,
    another: &dyn Fn() -> Result<Receiver, PagerError>,
    edits: &[Edit],
    run: &Run,
    report: &Report,
) -> Result<(), PagerError> {
    let drop_copy = || receiver.drop_copy(report);
    let (giving, paused) = (None, None);
    let mut passing =
        Passing { to: &receiver.to, run, edits, giving, left_behind: &drop_copy, paused };
    let taken = take_or_wait(source.from, run, &mut passing);
    let (giving, paused) = (passing.giving.take(), passing.paused);
    drop(passing);
    // All has come, and the receiver has said that it has it.
    let ready = taken.and_then(|taken| {
        run.check("the guest was being handed over")?;
        if receiver.to.is_closed() || receiver.to.has_sent() {
            let what = "the Cloud Hypervisor that is to have the guest has ended, or says what it was not asked";
            return Err(PagerError::Peer(what.to_owned()));
        }
        Ok(taken)
    });
    let taken = match ready {
        Ok(taken) => taken,
        Err(error) => {
            // The receiver drops what it has got before the source continues.
            drop(giving);
            refuse(source.from);
            return Err(error);
        }
    };
    let giving = giving.expect("a guest that is complete was configured");
    if let Err(error) = source.release(run, report) {
        drop(giving);
        return Err(error);
    }
    let given = match giving.complete_now(taken.paused) {
        Ok(()) => Ok(()),
        Err(NotTaken::Dropped(error)) => give_on(&taken, edits, error, another, run, report),
        Err(NotTaken::Unknown(error)) => Err(unknown(error)),
    };
    given?;
    let downtime = paused.map(|paused| paused.elapsed().as_millis() as u64);
    report.outcome("completed", &json!({ "paused": taken.paused, "downtime_ms": downtime }));
    Ok(())
}

impl Source<'_> {
    /// Tells the source that its guest was taken, and waits until it cannot run the guest any more: it has read that,
    /// or has ended. Neither a signal nor the end of the run leaves that open.
    ///
    /// # Errors
    ///
    /// When the source has not read it and keeps the guest.
    fn release(&self, run: &Run, report: &Report) -> Result<(), PagerError> {
        let kept = || {
            PagerError::Peer(
                "the Cloud Hypervisor that has the guest closed the connection before it was told that the guest \
                 was taken: it keeps the guest"
                    .to_owned(),
            )
        };
        if self.from.is_closed() {
            return Err(kept());
        }
        run.hold();
        accept(self.from, run).map_err(|_| kept())?;
        let (begun, mut told) = (Instant::now(), false);
        loop {
            match self.from.reading() {
                Reading::All => return Ok(()),
                Reading::Closed => return Err(kept()),
                Reading::Outstanding if begun.elapsed() < run.silence() => {}
                // It may read it at any time, or close without it: which of the two is decided here.
                Reading::Outstanding if self.process.is_some_and(Process::end) => {
                    report.warn(
                        "the source did not read that its guest was taken, and was ended: its receiver runs the guest",
                    );
                    return Ok(());
                }
                Reading::Outstanding if !told => {
                    report.warn(
                        "the source does not read that its guest was taken, and cannot be ended from here: end it, and \
                         the receiver runs the guest",
                    );
                    told = true;
                }
                Reading::Outstanding => {}
            }
            thread::sleep(begun.elapsed().clamp(LOOK, POLL));
        }
    }
}

/// Gives a guest that no Cloud Hypervisor has any more to one that takes it.
fn give_on(
    taken: &Taken,
    edits: &[Edit],
    mut error: PagerError,
    another: &dyn Fn() -> Result<Receiver, PagerError>,
    run: &Run,
    report: &Report,
) -> Result<(), PagerError> {
    loop {
        report.warn(&format!(
            "{error}; the source has ended, and this process alone has the guest, which is lost when it is killed: \
             start another receiver at the same socket, and the guest is given to that one"
        ));
        let lost = |error| PagerError::Peer(format!("{error}; the guest is lost"));
        let receiver = another().map_err(lost)?;
        let drop_copy = || receiver.drop_copy(report);
        let mut passing = Passing {
            to: &receiver.to,
            run,
            edits,
            giving: None,
            left_behind: &drop_copy,
            paused: None,
        };
        let passed = passing
            .configured(&taken.config, &taken.layout, &taken.files)
            .and_then(|()| passing.stated(&taken.state));
        let giving = passing.giving.take();
        let outcome = match (passed, giving) {
            (Ok(()), Some(giving)) => giving.complete_now(taken.paused),
            (Err(error), _) => Err(NotTaken::Dropped(error)),
            (Ok(()), None) => unreachable!("what was configured is being given"),
        };
        error = match outcome {
            Ok(()) => return Ok(()),
            Err(NotTaken::Unknown(error)) => return Err(unknown(error)),
            Err(NotTaken::Dropped(error)) => error,
        };
        thread::sleep(POLL);
    }
}

fn unknown(error: PagerError) -> PagerError {
    PagerError::Peer(format!(
        "{error}; the receiver was told to run the guest and may do so: look there. The source has ended"
    ))
}

/// The process of a Cloud Hypervisor.
#[derive(Debug)]
pub(super) struct Process {
    fd: OwnedFd,
}

impl Process {
    /// The one at the other end of a connection; `None` when it cannot be had, or is this one.
    fn of(peer: &Peer) -> Option<Self> {
        let pid = rustix::net::sockopt::socket_peercred(peer).ok()?.pid;
        if pid == getpid() {
            return None;
        }
        // On kernels before 6.5 by its number.
        peer::pidfd(peer).ok().map(|fd| Self { fd }).or_else(|| Self::new(pid))
    }

    pub(super) fn new(pid: Pid) -> Option<Self> {
        pidfd_open(pid, PidfdFlags::empty()).ok().map(|fd| Self { fd })
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
