//! The source: sends what is left, and what is asked for first.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use ram_discard::ByteRange;
use vmstate::wire::WireReader;

use super::requests::{Asked, Requests, Told};
use super::{Channels, Reconnect, received};
use crate::bandwidth::TokenBucket;
use crate::channel::{Channel, Sink};
use crate::error::MigrationError;
use crate::framing::write;
use crate::handler::PostcopySave;
use crate::progress::{Counters, Progress, Status};
use crate::stream::{
    Command, ReturnMessage, SectionKind, put_command, put_continued, put_end_of_section, put_eof,
    put_footer,
};
use crate::sys::GatherWrite;

/// What is sent in the background between two looks at what is asked for, bytes: little enough
/// that an urgent page on the same channel waits for it only shortly.
const BATCH: u64 = 256 << 10;

/// How often it is seen, while nothing more is due, whether requests have taken the rest.
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// How long the other side may take to answer in the handshake of a recovery.
const HANDSHAKE: Duration = Duration::from_secs(30);

/// When the source switches from precopy to postcopy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SwitchWhen {
    /// When [`Progress::start_postcopy`] is called.
    Told,
    /// Before any page is sent.
    AtOnce,
    /// When dirty pages were collected so many times and precopy has not converged.
    Rounds(u64),
}

/// Postcopy on the source.
pub struct PostcopyOutgoing<'a> {
    /// When to switch.
    pub when: SwitchWhen,
    /// The channel for pages that a vCPU waits for.
    pub urgent: Option<Channel>,
    /// Where new channels come from when they break.
    pub reconnect: Box<dyn Reconnect + 'a>,
}

/// Answers what the destination asks for while it loads its devices: the guest is still here, and
/// stopped, so one thread sends everything.
pub(crate) struct AnswerRequests<'a> {
    /// The handler that has the memory.
    pub(crate) memory: &'a mut dyn PostcopySave,
    pub(crate) section_id: u32,
    pub(crate) main: &'a mut Channel,
    pub(crate) urgent: Option<&'a mut Channel>,
    pub(crate) asked: &'a mut Asked,
    pub(crate) progress: &'a Progress,
}

impl AnswerRequests<'_> {
    /// Sends the pages of a request at once.
    pub(crate) fn answer(&mut self, message: ReturnMessage) -> Result<(), MigrationError> {
        let ReturnMessage::RequestPages { block, start, len } = message else {
            return Err(MigrationError::unexpected(&message));
        };
        let (block, range) = self.asked.find(block.as_deref(), start, len)?;
        let mut gathered = GatherWrite::new();
        let out = match &mut self.urgent {
            Some(urgent) => {
                self.memory.requested(&block, range, &mut gathered)?;
                &mut **urgent
            }
            None => {
                put_start(&mut gathered, SectionKind::Part, self.section_id);
                self.memory.requested(&block, range, &mut gathered)?;
                put_end(&mut gathered, self.section_id);
                &mut *self.main
            }
        };
        Counters::add(&self.progress.counters.transferred, gathered.len_bytes());
        out.write_gathered(&mut gathered).map_err(MigrationError::io("send a page asked for"))
    }
}

/// What is left to send, after the guest has left.
pub(crate) struct OutgoingPages<'a> {
    /// The handler that has the memory.
    pub(crate) memory: &'a mut dyn PostcopySave,
    /// The id of its sections.
    pub(crate) section_id: u32,
    /// What was asked for before.
    pub(crate) asked: Asked,
    pub(crate) reconnect: Box<dyn Reconnect + 'a>,
    /// Bytes a second that are sent without having been asked for.
    pub(crate) max_bandwidth: Option<u64>,
    pub(crate) progress: Arc<Progress>,
}

/// The memory, for the thread that sends in the background and the one that answers requests.
type Memory<'a> = Mutex<&'a mut dyn PostcopySave>;

impl OutgoingPages<'_> {
    /// Sends everything, over as many channels as it takes. When this returns `Ok`, the destination
    /// has all of it.
    /// What the destination says on the first channel is read from `back`.
    pub(crate) fn run(
        self,
        channels: Channels,
        back: WireReader<Channel>,
    ) -> Result<(), MigrationError> {
        let Self { memory, section_id, mut asked, mut reconnect, max_bandwidth, progress } = self;
        let memory = Mutex::new(memory);
        // One for all channels: what is owed is not forgiven by a recovery.
        let bucket = Mutex::new(TokenBucket::new(Instant::now(), max_bandwidth.unwrap_or(0)));
        let encrypted = channels.main.is_encrypted();
        let mut channels = channels;
        let mut back = Some(back);
        progress.steering.postcopy_over(Some(channels.clone_handles()));
        loop {
            let (memory, bucket, progress) = (&memory, &bucket, &progress);
            let stream = Stream { memory, section_id, bucket, progress };
            let sent = match channels.check_encryption(encrypted) {
                Ok(()) => stream.send_all(channels, back.take(), &mut asked),
                Err(error) => Err(error),
            };
            progress.steering.postcopy_over(None);
            let paused = progress.steering.take_paused();
            let error = match sent {
                Ok(()) => return Ok(()),
                Err(_) if paused => MigrationError::Paused,
                Err(error) => error,
            };
            progress.set_status(Status::PostcopyPaused);
            tracing::warn!(%error, "the channel is broken; the rest of memory waits");
            match reconnect.reconnect(&error) {
                Some(new) => channels = new,
                None => return Err(error),
            }
            // A destination that says nothing is left as soon as it is asked for.
            progress.steering.postcopy_over(Some(channels.clone_handles()));
            progress.set_status(Status::PostcopyRecover);
        }
    }
}

struct Stream<'a, 'm> {
    memory: &'a Memory<'m>,
    section_id: u32,
    /// What may be sent in the background; none without a limit.
    bucket: &'a Mutex<Option<TokenBucket>>,
    progress: &'a Progress,
}

impl Stream<'_, '_> {
    fn send_all(
        &self,
        channels: Channels,
        back: Option<WireReader<Channel>>,
        asked: &mut Asked,
    ) -> Result<(), MigrationError> {
        let Channels { mut main, urgent } = channels;
        let back = match back {
            Some(back) => back,
            None => {
                let mut back = WireReader::new(main.uncancellable());
                asked.restart();
                self.resume(&mut main, &mut back)?;
                Counters::add(&self.progress.counters.postcopy_recoveries, 1);
                back
            }
        };
        self.progress.set_status(Status::PostcopyActive);
        let requests = Requests::default();
        let urgent = urgent.map(Mutex::new);
        std::thread::scope(|scope| {
            let broken = main.clone_handle();
            let (requests, urgent) = (&requests, urgent.as_ref());
            let answering = scope.spawn(move || {
                let result = self.answer(back, asked, requests, urgent);
                requests.close();
                // What writes to it must not wait for a reader that is gone, or needs nothing more.
                broken.shutdown();
                result
            });
            let result = self.background(&mut main, urgent, requests);
            if result.is_err() {
                main.shutdown();
            }
            let answered = answering.join().unwrap_or_else(|panic| {
                std::panic::resume_unwind(panic);
            });
            match (result, answered) {
                // It has everything, whatever became of the end of the stream.
                (_, Ok(())) => Ok(()),
                // What broke first is more telling than what broke because of it.
                (Err(error), Err(MigrationError::ChannelClosed(_))) | (_, Err(error)) => Err(error),
            }
        })
    }

    /// Asks for what has been received of each block, and sends only the rest.
    fn resume(
        &self,
        main: &mut Channel,
        back: &mut WireReader<Channel>,
    ) -> Result<(), MigrationError> {
        back.get_mut().set_read_patience(Some(HANDSHAKE));
        let blocks = self.memory.lock().blocks();
        for (block, nr_pages) in blocks {
            let mut bytes = Vec::new();
            put_command(&mut bytes, &Command::RecvBitmap { block: block.clone() });
            write(main, &bytes)?;
            match ReturnMessage::read(back)? {
                ReturnMessage::RecvBitmap { block: told } if told == block => {
                    let outstanding = received::read(back, &block, nr_pages)?;
                    self.memory.lock().not_received(&block, outstanding)?;
                }
                other => return Err(MigrationError::unexpected(&other)),
            }
        }
        let mut bytes = Vec::new();
        put_command(&mut bytes, &Command::PostcopyResume);
        write(main, &bytes)?;
        match ReturnMessage::read(back)? {
            ReturnMessage::ResumeAck => {}
            other => return Err(MigrationError::unexpected(&other)),
        }
        back.get_mut().set_read_patience(None);
        Ok(())
    }

    /// Sends page by page, and what was asked for between, until nothing is left; then ends the
    /// stream and waits for the destination to say that it has everything.
    fn background(
        &self,
        main: &mut Channel,
        urgent: Option<&Mutex<Channel>>,
        requests: &Requests,
    ) -> Result<(), MigrationError> {
        let mut gathered = GatherWrite::new();
        let mut bucket = self.bucket.lock();
        let mut changes = 0;
        loop {
            let steering = &self.progress.steering;
            if steering.changes() != changes {
                changes = steering.changes();
                if let Some(rate) = steering.max_postcopy_bandwidth() {
                    let now = Instant::now();
                    *bucket = match bucket.take() {
                        Some(bucket) => bucket.at_rate(now, rate),
                        None => TokenBucket::new(now, rate),
                    };
                }
            }
            let due = bucket.as_mut().map_or(BATCH, |bucket| bucket.budget(Instant::now()));
            let pause = bucket.as_ref().map_or(Duration::ZERO, TokenBucket::pause);
            let told = requests.wait(pause.min(PAUSE_MAX));
            if told.closed {
                return Err(MigrationError::ChannelClosed("memory was being sent"));
            }
            let mut any = false;
            put_start(&mut gathered, SectionKind::Part, self.section_id);
            let left = {
                let mut memory = self.memory.lock();
                for (block, range) in told.pages {
                    any |= memory.requested(&block, range, &mut gathered)?;
                }
                if due != 0 {
                    let before = gathered.len_bytes();
                    any |= memory.next(due.min(BATCH), &mut gathered)?;
                    // What was asked for is not limited, and does not use up what is.
                    if let Some(bucket) = &mut *bucket {
                        bucket.charge(gathered.len_bytes() - before);
                    }
                }
                memory.left()
            };
            put_end(&mut gathered, self.section_id);
            if !any {
                gathered.clear();
                if due != 0 || left == 0 {
                    break;
                }
                continue;
            }
            Counters::add(&self.progress.counters.transferred, gathered.len_bytes());
            main.write_gathered(&mut gathered).map_err(MigrationError::io("send pages"))?;
        }
        if let Some(urgent) = urgent {
            // The destination waits for this before it counts what has arrived.
            let mut end = Vec::new();
            put_end_of_section(&mut end);
            let ended = urgent.lock().write(&end);
            ended.map_err(MigrationError::io("end the channel of pages asked for"))?;
        }
        put_start(&mut gathered, SectionKind::End, self.section_id);
        put_end(&mut gathered, self.section_id);
        let mut eof = Vec::new();
        put_eof(&mut eof);
        gathered.push_bytes(&eof);
        main.write_gathered(&mut gathered).map_err(MigrationError::io("end the stream"))?;
        match requests.wait_for_end() {
            Told { done: true, .. } => Ok(()),
            _ => Err(MigrationError::ChannelClosed("it had everything but did not say so")),
        }
    }

    /// Reads what the destination asks for; answers at once where there is a channel for it.
    fn answer(
        &self,
        mut back: WireReader<Channel>,
        asked: &mut Asked,
        requests: &Requests,
        urgent: Option<&Mutex<Channel>>,
    ) -> Result<(), MigrationError> {
        let mut gathered = GatherWrite::new();
        loop {
            let ended = back.is_at_end().map_err(MigrationError::io("hear the destination"))?;
            if ended {
                return Err(MigrationError::ChannelClosed("memory was being sent"));
            }
            match ReturnMessage::read(&mut back)? {
                ReturnMessage::RequestPages { block, start, len } => {
                    let (block, range) = asked.find(block.as_deref(), start, len)?;
                    match urgent {
                        None => requests.push(block, range)?,
                        Some(urgent) => {
                            // Held from before the pages are taken until they are written, so that
                            // the end of this channel cannot come between.
                            let mut urgent = urgent.lock();
                            self.memory.lock().requested(&block, range, &mut gathered)?;
                            let sent = gathered.len_bytes();
                            Counters::add(&self.progress.counters.transferred, sent);
                            let written = urgent.write_gathered(&mut gathered);
                            written.map_err(MigrationError::io("send a page asked for"))?;
                        }
                    }
                }
                ReturnMessage::Discarded { block, start, len } => {
                    let Some(range) = ByteRange::new(start, len) else {
                        let what = format!("{len:#x} discarded bytes at {start:#x} of {block:?}");
                        return Err(MigrationError::Unexpected(what));
                    };
                    self.memory.lock().discarded(&block, range)?;
                }
                ReturnMessage::Shut(0) => {
                    requests.done();
                    return Ok(());
                }
                ReturnMessage::Pong(_) | ReturnMessage::SwitchoverAck => {}
                other => return Err(MigrationError::unexpected(&other)),
            }
        }
    }
}

fn put_start(gathered: &mut GatherWrite, kind: SectionKind, section_id: u32) {
    let mut bytes = Vec::new();
    put_continued(&mut bytes, kind, section_id);
    gathered.push_bytes(&bytes);
}

fn put_end(gathered: &mut GatherWrite, section_id: u32) {
    let mut bytes = Vec::new();
    put_end_of_section(&mut bytes);
    put_footer(&mut bytes, section_id);
    gathered.push_bytes(&bytes);
}
