//! The ear: reads what QEMU asks for, and answers at once where there is a channel for it.

use std::time::{Duration, Instant};

use migration::Channel;
use migration::postcopy::Asked;
use migration::stream::{ReturnMessage, TARGET_PAGE_SIZE};
use parking_lot::Mutex;
use rustix::io::Errno;
use vmstate::wire::{WireRead, WireReader};

use super::figures::Figures;
use super::lost::{Lost, Stage};
use super::preamble::{PING_BEFORE, PING_LISTENING, PING_LOADED};
use super::supply::{Answer, Page, Source, Supply};
use super::urgent::Urgent;
use crate::error::PagerError;
use crate::image::{GuestImage, PageReader};
use crate::run::{POLL, Run};

/// How often it is looked whether the second connection is closed, and the run over: not for each request.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Requests that are kept until they are answered: those that were outstanding when QEMU paused.
const HEARD_MAX: usize = 64 << 10;

/// Hears QEMU, from the package on until it says that it has everything.
pub(super) struct Ear<'a> {
    pub run: &'a Run,
    pub supply: &'a Supply<'a>,
    pub figures: &'a Figures,
    /// When the stream was ended.
    pub ended: &'a Mutex<Option<Instant>>,
    /// The channel of pages that are waited for.
    pub urgent: &'a Urgent<'a>,
}

impl Ear<'_> {
    /// Hears and answers until QEMU has everything; first what was `heard` already.
    ///
    /// # Errors
    ///
    /// When QEMU fails, breaks off, or breaks the protocol.
    pub fn hear(
        self,
        mut back: WireReader<Channel>,
        heard: Vec<ReturnMessage>,
    ) -> Result<(), PagerError> {
        let lost = Lost { run: self.run, stage: Stage::Postcopy(self.figures) };
        let mut asked = asked_of(self.supply.image());
        let mut reader = PageReader::new(self.supply.image());
        back.get_mut().set_read_patience(Some(self.run.silence()));
        let what = "memory was being sent";
        let mut heard = heard.into_iter();
        let mut looked = None;
        loop {
            let message = match heard.next() {
                Some(message) => message,
                None => {
                    self.wait(&mut back, &mut looked, &lost)?;
                    if back.is_at_end().map_err(|error| lost.io(what, error))? {
                        return Err(lost.closed(what));
                    }
                    ReturnMessage::read(&mut back).map_err(|error| lost.format(what, error))?
                }
            };
            match message {
                ReturnMessage::RequestPages { block, start, len } => {
                    let since = Instant::now();
                    let (block, range) = asked
                        .locate(block.as_deref(), start, len)
                        .map_err(|error| lost.engine(what, error))?;
                    if range.len() != TARGET_PAGE_SIZE || !start.is_multiple_of(TARGET_PAGE_SIZE) {
                        return Err(PagerError::Protocol(format!(
                            "QEMU asks for {len:#x} bytes at {start:#x}, where pages have {TARGET_PAGE_SIZE} bytes; \
                             {}",
                            lost.guest()
                        )));
                    }
                    self.answer(block, start / TARGET_PAGE_SIZE, since, &mut reader, &lost)?;
                }
                ReturnMessage::Pong(PING_LOADED) => self.figures.running(),
                ReturnMessage::Pong(_) | ReturnMessage::SwitchoverAck => {}
                ReturnMessage::Shut(0) => {
                    if self.ended.lock().is_none() {
                        return Err(PagerError::Protocol(
                            "QEMU says that it has all memory before it was sent: what is missing will be \
                             zeros; reset the guest"
                                .to_owned(),
                        ));
                    }
                    return Ok(());
                }
                ReturnMessage::Shut(code) => {
                    return Err(PagerError::Peer(format!(
                        "QEMU could not take the guest's memory (error {code}); its own report says why \
                         (query-migrate, its log); to memory with huge pages restore with --eager"
                    )));
                }
                other => {
                    return Err(PagerError::Protocol(format!(
                        "QEMU sent {other:?}, which nothing asked for; {}",
                        lost.guest()
                    )));
                }
            }
        }
    }

    /// Waits for the next message, within the bounds; when these were `looked` at last.
    fn wait(
        &self,
        back: &mut WireReader<Channel>,
        looked: &mut Option<Instant>,
        lost: &Lost<'_>,
    ) -> Result<(), PagerError> {
        while back.buffered().is_empty() {
            if looked.is_none_or(|at| at.elapsed() >= LOOK_EVERY) {
                self.look(lost)?;
                *looked = Some(Instant::now());
            }
            if back.get_ref().is_readable(POLL) {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Whether the restore goes on.
    fn look(&self, lost: &Lost<'_>) -> Result<(), PagerError> {
        self.run.check("memory was being sent")?;
        let ended = *self.ended.lock();
        // At the end QEMU closes it before it says that it has everything.
        let Some(ended) = ended else { return self.urgent.check(self.supply, lost) };
        let after = ended.elapsed();
        if after >= self.run.silence() {
            let what =
                "QEMU has been sent all memory, but does not say that it has it; stop and restart it if it hangs \
                 (query-migrate)"
                    .to_owned();
            return Err(PagerError::TimedOut { what, after });
        }
        Ok(())
    }

    fn answer(
        &self,
        block: usize,
        page: u64,
        since: Instant,
        reader: &mut PageReader<'_>,
        lost: &Lost<'_>,
    ) -> Result<(), PagerError> {
        if !self.urgent.is_read() {
            let answer = self.supply.ask(block, page, since)?;
            self.figures.request(answer);
            if matches!(answer, Answer::OnItsWay { .. }) {
                self.urgent.wanted(block, page);
            }
            return Ok(());
        }
        let answer = self.supply.take(block, page);
        self.figures.request(answer);
        if matches!(answer, Answer::OnItsWay { .. }) {
            return Ok(());
        }
        let page = Page { block, page, content: answer == Answer::Content };
        let sent = self.urgent.answer(page, reader, lost);
        if page.content {
            // What follows it is read ahead now: the vCPU waits for no other thread before it has its page.
            self.supply.nudge();
        }
        match sent {
            Ok(sent) => {
                self.figures.sent(Source::Request, 1, sent);
                self.figures.served(since.elapsed());
                Ok(())
            }
            // QEMU closes it before it says that it has everything.
            Err(PagerError::Peer(_)) if self.ended.lock().is_some() => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// What QEMU says when it is to listen for faults, for the first time or again.
#[derive(Debug, Default)]
pub(super) struct Listening {
    /// When it has read all that comes before.
    before: Option<Instant>,
    /// Whether it says so.
    listens: bool,
    /// Whether it was resumed, and has acknowledged that.
    acknowledged: bool,
    /// What it said besides.
    pub heard: Vec<ReturnMessage>,
}

impl Listening {
    /// For the first time.
    pub fn first() -> Self {
        Self { acknowledged: true, ..Self::default() }
    }

    /// Waits until QEMU listens; false when it does not within `patience` from when it is about to.
    pub fn wait(
        &mut self,
        back: &mut WireReader<Channel>,
        patience: Duration,
        lost: &Lost<'_>,
    ) -> Result<bool, PagerError> {
        let what = "it was being told of postcopy";
        let begun = Instant::now();
        while !(self.listens && self.acknowledged) {
            if back.buffered().is_empty() {
                let left = match self.before {
                    Some(before) => patience.saturating_sub(before.elapsed()),
                    None => lost.run.silence().saturating_sub(begun.elapsed()),
                };
                match (left.is_zero(), self.before) {
                    (true, Some(_)) => return Ok(false),
                    (true, None) => return Err(lost.io(what, Errno::TIMEDOUT.into())),
                    (false, _) => {}
                }
                lost.run.check(what)?;
                if !back.get_ref().is_readable(left.min(POLL)) {
                    continue;
                }
            }
            match ReturnMessage::read(back).map_err(|error| lost.format(what, error))? {
                ReturnMessage::ResumeAck if !self.acknowledged => self.acknowledged = true,
                ReturnMessage::Pong(PING_BEFORE) => self.before = Some(Instant::now()),
                ReturnMessage::Pong(PING_LISTENING) => self.listens = true,
                // Whatever it is, it is judged where pages are served.
                other if self.heard.len() < HEARD_MAX => self.heard.push(other),
                _ => {
                    return Err(PagerError::Protocol(format!(
                        "QEMU sent more than {HEARD_MAX} messages before it listens for faults; {}",
                        lost.guest()
                    )));
                }
            }
        }
        Ok(true)
    }
}

/// What can be asked for.
pub(super) fn asked_of(image: &GuestImage) -> Asked {
    Asked::new(image.blocks().iter().map(|block| (block.id().to_owned(), block.used_length())))
}

/// Reads messages until the PONG of a value.
pub(super) fn wait_for_pong(
    back: &mut WireReader<Channel>,
    value: u32,
    lost: &Lost<'_>,
    patience: Duration,
) -> Result<(), PagerError> {
    let what = "it was being told what follows";
    back.get_mut().set_read_patience(Some(patience));
    let begun = Instant::now();
    loop {
        match ReturnMessage::read(back).map_err(|error| lost.format(what, error))? {
            ReturnMessage::Pong(found) if found == value => return Ok(()),
            ReturnMessage::Pong(_) if begun.elapsed() < patience => {}
            ReturnMessage::Shut(code) => {
                return Err(PagerError::Peer(format!(
                    "QEMU refuses the guest (error {code}); {}",
                    lost.guest()
                )));
            }
            other => {
                return Err(PagerError::Protocol(format!(
                    "QEMU sent {other:?} where the answer to PING {value} was expected; {}",
                    lost.guest()
                )));
            }
        }
    }
}
