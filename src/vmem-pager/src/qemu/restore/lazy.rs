//! A guest that runs at once, while its memory follows.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use migration::postcopy::read_received;
use migration::stream::{Command, ReturnMessage, TARGET_PAGE_SIZE, put_command};
use migration::{Bandwidth, Channel, Sink};
use parking_lot::Mutex;
use rustix::net::sockopt;
use serde_json::json;
use vmstate::wire::WireReader;

use super::Transfer;
use super::batch;
use super::lost::{Lost, Stage};
use super::page_writer::PageWriter;
use super::preamble::{self, PING_BEFORE, PING_FIRST, PING_LISTENING};
use super::serve::{Ear, Listening, wait_for_pong};
use super::supply::Next;
use super::urgent::{LOOK_EVERY, Urgent};
use crate::error::PagerError;
use crate::image::{GuestImage, PageReader};
use crate::run::POLL;
use crate::socket::{self, Address};

/// What the kernel holds of a channel, bytes, and pages sent at a time, where pages that are waited for queue behind
/// them.
const SEND_BUFFER: usize = 8 << 10;
const BATCH_SHARED: u64 = 4;
/// The same of the main channel where they do not: only what is read ahead queues behind it.
const SEND_BUFFER_APART: usize = 128 << 10;
const BATCH: u64 = 64;
/// For so long a guest that has begun waits for one page after the other, and for the threads that bring them. After that
/// it gains more by what arrives unasked, and the kernel holds so much of it that QEMU never waits for the next write: a
/// writer is woken when three quarters of it are read.
const BEGINNING: Duration = Duration::from_millis(100);
const SEND_BUFFER_LATER: usize = 1 << 20;

/// How the guest is kept from faulting while the stream ends, where there is no channel that is served
/// beyond its end.
pub(super) trait Guest: Sync {
    /// Stops it; whether it ran.
    ///
    /// # Errors
    ///
    /// When QEMU refuses.
    fn stop(&self) -> Result<bool, PagerError>;

    /// Has it continue; once the restore is complete, if it `is_complete`.
    ///
    /// # Errors
    ///
    /// When QEMU refuses.
    fn cont(&self, is_complete: bool) -> Result<(), PagerError>;
}

/// A restore in postcopy.
pub(super) struct Lazy<'a> {
    pub transfer: Transfer<'a>,
    pub guest: Option<&'a dyn Guest>,
    /// Whether QEMU has postcopy-preempt, where that is known.
    pub preempt: Option<bool>,
}

/// The channels of a restore.
struct Channels {
    main: Channel,
    back: WireReader<Channel>,
    urgent: Option<Channel>,
    /// What was read already.
    heard: Vec<ReturnMessage>,
}

/// How long a QEMU that does not wait for a second connection may take to say so, where the answer to a
/// first question took `round_trip`.
fn patience_for(round_trip: Duration) -> Duration {
    (50 * round_trip).clamp(Duration::from_millis(20), Duration::from_millis(200))
}

impl Lazy<'_> {
    fn image(&self) -> &GuestImage {
        self.transfer.supply.image()
    }

    fn lost<'s>(&'s self, stage: Stage<'s>) -> Lost<'s> {
        Lost { run: self.transfer.run, stage }
    }

    /// Has a fresh QEMU run the guest, and sends it its memory.
    ///
    /// # Errors
    ///
    /// When QEMU fails, breaks off, or breaks the protocol.
    pub fn start(&self) -> Result<(), PagerError> {
        let lost = self.lost(Stage::Loading);
        let (mut main, mut back) = self.connect()?;
        let mut bytes = Vec::new();
        preamble::put_start(&mut bytes, self.image());
        let what = "it was being told what follows";
        main.write(&bytes).map_err(|error| lost.io(what, error))?;
        let asked = Instant::now();
        wait_for_pong(&mut back, PING_FIRST, &lost, self.transfer.run.silence())?;
        let round_trip = asked.elapsed();
        let mut urgent = None;
        if self.preempt == Some(true) {
            urgent = self.connect_urgent()?;
        }
        bytes.clear();
        preamble::put_advise(&mut bytes);
        preamble::put_setup(&mut bytes, self.image());
        preamble::put_discard(&mut bytes, self.image());
        main.write(&bytes).map_err(|error| lost.io(what, error))?;
        bytes.clear();
        preamble::put_package(&mut bytes, self.image());
        let mut listening = Listening::first();
        if self.preempt.is_some() {
            // Requests may come before all of it is read.
            return self.send_all(Channels { main, back, urgent, heard: Vec::new() }, &bytes);
        }
        let lost = self.lost(Stage::Postcopy(self.transfer.figures));
        main.write(&bytes).map_err(|error| lost.io(what, error))?;
        if !listening.wait(&mut back, patience_for(round_trip), &lost)? {
            urgent = self.connect_urgent()?;
        }
        self.send_all(Channels { main, back, urgent, heard: listening.heard }, &[])
    }

    /// Goes on in a QEMU that is in postcopy-paused.
    ///
    /// # Errors
    ///
    /// When QEMU fails, breaks off, or breaks the protocol.
    pub fn recover(&self) -> Result<(), PagerError> {
        let lost = self.lost(Stage::Postcopy(self.transfer.figures));
        let (mut main, mut back) = self.connect()?;
        self.transfer.figures.running();
        back.get_mut().set_read_patience(Some(self.transfer.run.silence()));
        let what = "it was being asked for what it has";
        let (mut received, mut round_trip) = (0, Duration::ZERO);
        for (index, block) in self.image().blocks().iter().enumerate() {
            let mut bytes = Vec::new();
            put_command(&mut bytes, &Command::RecvBitmap { block: block.id().to_owned() });
            let asked = Instant::now();
            main.write(&bytes).map_err(|error| lost.io(what, error))?;
            match ReturnMessage::read(&mut back).map_err(|error| lost.format(what, error))? {
                ReturnMessage::RecvBitmap { block: told } if told == block.id() => {
                    let outstanding = read_received(&mut back, block.id(), block.nr_pages())
                        .map_err(|error| lost.engine(what, error))?;
                    round_trip = round_trip.max(asked.elapsed());
                    let before = self.transfer.supply.left();
                    self.transfer.supply.not_received(index, &outstanding);
                    received += before - self.transfer.supply.left();
                }
                other => {
                    return Err(PagerError::Protocol(format!(
                        "QEMU sent {other:?} where its bitmap of RAM block {:?} was expected",
                        block.id()
                    )));
                }
            }
        }
        self.transfer.figures.skip(received * TARGET_PAGE_SIZE);
        let details = json!({ "received_bytes": received * TARGET_PAGE_SIZE });
        self.transfer.report.event("recovering", &details);
        let mut bytes = Vec::new();
        put_command(&mut bytes, &Command::Ping(PING_BEFORE));
        put_command(&mut bytes, &Command::PostcopyResume);
        put_command(&mut bytes, &Command::Ping(PING_LISTENING));
        main.write(&bytes).map_err(|error| lost.io(what, error))?;
        let mut listening = Listening::default();
        let mut urgent = None;
        if !listening.wait(&mut back, patience_for(round_trip), &lost)? {
            urgent = self.connect_urgent()?;
            if !listening.wait(&mut back, self.transfer.run.silence(), &lost)? {
                return Err(lost.io("it was being resumed", io::ErrorKind::TimedOut.into()));
            }
        }
        self.send_all(Channels { main, back, urgent, heard: listening.heard }, &[])
    }

    fn connect(&self) -> Result<(Channel, WireReader<Channel>), PagerError> {
        let Transfer { address, run, report, .. } = self.transfer;
        let fd = socket::connect(address, run, report, None)?;
        self.transfer.figures.begin(self.image().present_bytes());
        let main = self.channel(fd)?;
        let back = WireReader::new(main.clone_handle());
        Ok((main, back))
    }

    /// The channel of pages that are waited for, if QEMU listens for one (postcopy-preempt).
    fn connect_urgent(&self) -> Result<Option<Channel>, PagerError> {
        match socket::try_connect(self.transfer.address, self.transfer.run) {
            Ok(fd) => self.channel(fd).map(Some),
            Err(error) => match error.kind() {
                io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => Ok(None),
                _ => Err(socket::failed("cannot connect to", self.transfer.address)(error)),
            },
        }
    }

    fn channel(&self, fd: std::os::fd::OwnedFd) -> Result<Channel, PagerError> {
        let failed = || socket::failed("cannot set up", self.transfer.address);
        // Without a small buffer it works, too.
        let _ = sockopt::set_socket_send_buffer_size(&fd, SEND_BUFFER);
        let progress = std::sync::Arc::clone(&self.transfer.run.progress);
        let mut channel = Channel::new(fd, progress).map_err(failed())?;
        channel.set_write_patience(self.transfer.run.silence());
        Ok(channel)
    }

    /// Sends `first` and all pages, and answers requests, until QEMU has everything.
    fn send_all(&self, channels: Channels, first: &[u8]) -> Result<(), PagerError> {
        let Channels { main, back, urgent, heard } = channels;
        self.transfer.report.event("connected", &json!({ "second_connection": urgent.is_some() }));
        let ended = Mutex::new(None);
        let stopped = AtomicBool::new(false);
        let writer = |channel| PageWriter::new(self.image(), channel);
        let urgent = &Urgent::new(urgent.map(writer), self.preempt == Some(true));
        let mut main = writer(main);
        let broken = main.channel().clone_handle();
        let done = thread::scope(|scope| {
            let ear = Ear {
                run: self.transfer.run,
                supply: self.transfer.supply,
                figures: self.transfer.figures,
                ended: &ended,
                urgent,
            };
            let hearing = thread::Builder::new().name("return-path".to_owned());
            let hearing = hearing.spawn_scoped(scope, move || {
                let heard = ear.hear(back, heard);
                self.transfer.supply.close();
                // A write must not wait for a reader that is gone.
                broken.shutdown();
                heard
            });
            let hearing = hearing.map_err(PagerError::system("start a thread"))?;
            main.put(first);
            preamble_pages(&mut main, self.image());
            let sent = self.background(&mut main, urgent, &ended, &stopped);
            if sent.is_err() {
                main.channel().shutdown();
            }
            let heard = hearing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            match (sent, heard) {
                // It has everything, whatever became of the end of the stream.
                (_, Ok(())) => Ok(()),
                // What broke first tells more than what broke because of it.
                (
                    Err(
                        error @ (PagerError::File { .. }
                        | PagerError::Qmp { .. }
                        | PagerError::TimedOut { .. }),
                    ),
                    Err(_),
                ) => Err(error),
                (_, Err(error)) => Err(error),
            }
        });
        let continued = match self.guest.filter(|_| stopped.into_inner()) {
            Some(guest) => guest.cont(done.is_ok()),
            None => Ok(()),
        };
        done.and(continued)?;
        self.transfer.figures.complete();
        Ok(())
    }

    /// Sends all that is left, ends the stream, and sees to it that QEMU can end it.
    ///
    /// A fault that is outstanding when the stream ends may hang QEMU for good: the thread that ends it waits for
    /// a lock that the faulting thread holds. With the second channel faults are served beyond the end.
    /// Without, there must be none, so that either the guest is stopped or holes are sent, too.
    fn background(
        &self,
        main: &mut PageWriter<'_>,
        urgent: &Urgent<'_>,
        ended: &Mutex<Option<Instant>>,
        stopped: &AtomicBool,
    ) -> Result<(), PagerError> {
        if matches!(self.transfer.address, Address::Unix(_)) {
            urgent
                .probe(self.transfer.supply, &self.lost(Stage::Postcopy(self.transfer.figures)))?;
        }
        self.send_pages(main, urgent, &|| urgent.is_awaited())?;
        if urgent.is_read() {
            return self.end(main, ended);
        }
        let Some(guest) = self.guest else {
            self.transfer.supply.send_holes();
            self.send_pages(main, urgent, &|| false)?;
            return self.end(main, ended);
        };
        let answer = Mutex::new(None);
        let sent = thread::scope(|scope| {
            let stop = || {
                let ran = guest.stop();
                stopped.store(matches!(ran, Ok(true)), Ordering::Release);
                *answer.lock() = Some(ran);
                self.transfer.supply.nudge();
            };
            thread::Builder::new()
                .name("qmp-stop".to_owned())
                .spawn_scoped(scope, stop)
                .map_err(PagerError::system("start a thread"))?;
            // The guest may need pages to come to a stop.
            self.send_pages(main, urgent, &|| answer.lock().is_none())
        });
        answer.into_inner().transpose()?;
        sent?;
        self.end(main, ended)
    }

    /// Sends until nothing is left and nothing is waited for.
    fn send_pages(
        &self,
        main: &mut PageWriter<'_>,
        urgent: &Urgent<'_>,
        waits: &dyn Fn() -> bool,
    ) -> Result<(), PagerError> {
        let lost = self.lost(Stage::Postcopy(self.transfer.figures));
        let mut reader = PageReader::new(self.image());
        let mut bandwidth = Bandwidth::new(self.transfer.bandwidth, main.written());
        main.send(&lost, "its devices were being sent")?;
        let mut held = SEND_BUFFER;
        loop {
            let holds = match (urgent.is_read(), self.transfer.figures.running_for()) {
                (false, _) => SEND_BUFFER,
                (true, Some(time)) if time >= BEGINNING => SEND_BUFFER_LATER,
                (true, _) => SEND_BUFFER_APART,
            };
            if held != holds {
                held = holds;
                // With another it works, too.
                let socket = main.channel().descriptor();
                let _ = socket.map(|socket| sockopt::set_socket_send_buffer_size(socket, holds));
            }
            if self.transfer.supply.is_closed() {
                return Err(lost.closed("memory was being sent"));
            }
            urgent.look(self.transfer.supply, &lost)?;
            let pause = bandwidth.spent(main.written());
            let budget = (bandwidth.budget(main.written()) / TARGET_PAGE_SIZE).max(1);
            let waiting = waits();
            let batch = if urgent.is_read() { BATCH } else { BATCH_SHARED };
            let most = batch.min(budget);
            match self.transfer.supply.next(most, pause.is_zero()) {
                Next::Send(work) => {
                    let from = (self.transfer.supply, &mut reader);
                    batch::send(work, most, from, main, self.transfer.figures, &lost)?;
                }
                Next::Later => {
                    let longest = if urgent.is_awaited() { LOOK_EVERY } else { POLL };
                    self.transfer.supply.wait(pause.min(longest));
                }
                Next::Nothing if waiting => {
                    self.transfer.supply.wait(LOOK_EVERY);
                }
                Next::Nothing => return Ok(()),
            }
        }
    }

    fn end(
        &self,
        main: &mut PageWriter<'_>,
        ended: &Mutex<Option<Instant>>,
    ) -> Result<(), PagerError> {
        let mut bytes = Vec::new();
        preamble::put_pages_end(&mut bytes, self.image());
        preamble::put_end(&mut bytes);
        main.put(&bytes);
        *ended.lock() = Some(Instant::now());
        main.send(&self.lost(Stage::Postcopy(self.transfer.figures)), "the stream was being ended")
            .map(drop)
    }
}

fn preamble_pages(main: &mut PageWriter<'_>, image: &GuestImage) {
    let mut bytes = Vec::new();
    preamble::put_pages_start(&mut bytes, image);
    main.put(&bytes);
}
