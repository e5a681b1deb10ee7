//! The source's ear: a thread that reads what the destination sends back.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmstate::wire::WireReader;

use crate::channel::patience::deadline;
use crate::channel::{Channel, is_broken as is_channel_broken};
use crate::error::MigrationError;
use crate::progress::Progress;
use crate::stream::{FormatError, ReturnMessage};

/// Between two looks at the clock.
const MOMENT: Duration = Duration::from_millis(20);

/// How long the destination has to say why it closed a channel.
const REASON: Duration = Duration::from_millis(500);

/// The most messages that are kept until they are looked at. Before the guest runs there, a destination
/// answers two pings, and asks for the pages that loading its devices takes.
const KEPT_MAX: usize = 4096;

pub(super) type Heard = Result<ReturnMessage, MigrationError>;

/// What the destination sent back and was not looked at yet.
pub(super) struct ReturnPath {
    heard: Receiver<Heard>,
    /// How many that are.
    kept: Arc<AtomicUsize>,
    channel: Channel,
    keep_channel: bool,
    thread: Option<JoinHandle<WireReader<Channel>>>,
}

/// Tells when the thread ends, after its last message.
struct Ended(Arc<Progress>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.destination_ended();
    }
}

impl ReturnPath {
    /// Starts to listen. The handle is not to be cancelled: what the destination says last decides
    /// who has the guest.
    pub(super) fn listen(
        channel: &Channel,
        progress: &Arc<Progress>,
    ) -> Result<Self, MigrationError> {
        let (tell, heard) = channel_of();
        let reading = channel.uncancellable();
        let kept = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&kept);
        progress.destination_heard();
        let ended = Ended(Arc::clone(progress));
        let thread = std::thread::Builder::new().name("return-path".to_owned()).spawn(move || {
            let _ended = ended;
            let mut reader = WireReader::new(reading);
            let mut reason = None;
            loop {
                let message = match reader.is_at_end() {
                    Ok(true) => return reader,
                    Ok(false) => ReturnMessage::read(&mut reader).map_err(MigrationError::from),
                    Err(error) => Err(MigrationError::io("hear the destination")(error)),
                };
                let message = match (message, reason.take()) {
                    (Ok(ReturnMessage::Reason(text)), None) => {
                        reason = Some(printable(&text));
                        continue;
                    }
                    (Ok(ReturnMessage::Shut(code)), reason @ Some(_)) if code != 0 => {
                        Err(MigrationError::Refused { code, reason })
                    }
                    (message, _) => message,
                };
                let last = !matches!(message, Ok(ref message) if !is_last(message));
                if counted.fetch_add(1, Ordering::Relaxed) == KEPT_MAX {
                    let (what, limit) = ("messages", KEPT_MAX);
                    let _ = tell.send(Err(MigrationError::Flooded { what, limit }));
                    // A thread that writes to it would wait for a reader that there may not be.
                    reader.get_ref().shutdown();
                    return reader;
                }
                if tell.send(message).is_err() || last {
                    return reader;
                }
            }
        });
        let thread = thread.map_err(MigrationError::io("start a thread"))?;
        Ok(Self {
            heard,
            kept,
            channel: channel.clone_handle(),
            keep_channel: false,
            thread: Some(thread),
        })
    }

    /// What came and is not expected: an error of the destination, most likely.
    pub(super) fn check(&self) -> Result<(), MigrationError> {
        self.hear(&mut |message| match message {
            ReturnMessage::Pong(_) | ReturnMessage::BlockState { .. } => Ok(()),
            other => Err(unexpected(Ok(other))),
        })
    }

    /// Tells `each` what came.
    pub(super) fn hear(&self, each: &mut Asked<'_>) -> Result<(), MigrationError> {
        loop {
            match self.heard.try_recv() {
                Ok(heard) => {
                    self.kept.fetch_sub(1, Ordering::Relaxed);
                    match heard {
                        Ok(message @ ReturnMessage::Shut(_)) => {
                            return Err(unexpected(Ok(message)));
                        }
                        Ok(message) => each(message)?,
                        Err(error) => return Err(error),
                    }
                }
                Err(TryRecvError::Empty) => return Ok(()),
                Err(TryRecvError::Disconnected) => {
                    return Err(MigrationError::ChannelClosed("memory was being sent"));
                }
            }
        }
    }

    /// Why `error` came about, if the destination said so before it broke what failed then.
    pub(super) fn reason_of(&self, error: MigrationError) -> MigrationError {
        if is_broken(&error) {
            return self.reason_of_break(error);
        }
        match self.check() {
            Err(reason) if is_reason(&reason) => reason,
            _ => error,
        }
    }

    /// Why a channel broke: a destination that refuses what came says so before it closes any, and another thread
    /// reads that.
    fn reason_of_break(&self, error: MigrationError) -> MigrationError {
        let deadline = Instant::now() + REASON;
        while Instant::now() < deadline {
            match self.wait("memory was being sent") {
                Ok(None | Some(ReturnMessage::Pong(_))) => {}
                Ok(Some(message)) => match unexpected(Ok(message)) {
                    reason if is_reason(&reason) => return reason,
                    _ => break,
                },
                Err(reason) if is_reason(&reason) => return reason,
                Err(_) => break,
            }
        }
        error
    }

    /// Waits for the verdict: the answer to the ping after everything. What is asked for meanwhile
    /// goes to `asked`.
    pub(super) fn wait_for_pong(
        &self,
        value: u32,
        patience: Duration,
        progress: &Progress,
        asked: &mut Asked<'_>,
    ) -> Result<(), MigrationError> {
        let deadline = deadline(patience);
        loop {
            if progress.is_cancelled() {
                return Err(MigrationError::Cancelled);
            }
            if Instant::now() >= deadline {
                return Err(MigrationError::io("wait for the destination")(
                    io::ErrorKind::TimedOut.into(),
                ));
            }
            match self.wait("the destination was loading")? {
                Some(ReturnMessage::Pong(pong)) if pong == value => return Ok(()),
                Some(ReturnMessage::Pong(_)) | None => {}
                Some(other) => asked(other)?,
            }
        }
    }

    /// Waits for the destination to say that it takes the guest. It cannot be cancelled any more.
    ///
    /// When patience ends, the source ends its direction of the channel. A destination that sees
    /// that before it takes the guest leaves it; what one says that did not see it yet is still
    /// heard. So the wait goes on until either is certain, or the channel breaks: who closed it for
    /// both sides could not be told that the guest is taken.
    pub(super) fn wait_for_shut(&self, patience: Duration) -> Result<(), MigrationError> {
        self.wait_for_last(patience, &ReturnMessage::Shut(0), &mut refuse)
    }

    fn wait_for_last(
        &self,
        patience: Duration,
        last: &ReturnMessage,
        asked: &mut Asked<'_>,
    ) -> Result<(), MigrationError> {
        let deadline = deadline(patience);
        let mut gave_up = false;
        loop {
            if !gave_up && Instant::now() >= deadline {
                gave_up = true;
                tracing::warn!("the destination does not say whether it takes the guest");
                self.channel.shutdown_write();
            }
            match self.wait("it was about to take the guest")? {
                Some(message) if message == *last => return Ok(()),
                Some(ReturnMessage::Pong(_)) | None => {}
                Some(request @ ReturnMessage::RequestPages { .. }) if !gave_up => {
                    // It may have taken the guest all the same, which is heard behind it.
                    if let Err(error) = asked(request) {
                        gave_up = true;
                        tracing::warn!(%error, "cannot answer the destination");
                        self.channel.shutdown_write();
                    }
                }
                Some(ReturnMessage::RequestPages { .. }) => {}
                Some(other) => return Err(unexpected(Ok(other))),
            }
        }
    }

    /// Waits for the destination to say that it is about to run the guest in postcopy; as
    /// [`wait_for_shut`](Self::wait_for_shut).
    pub(super) fn wait_for_taken(
        &self,
        patience: Duration,
        asked: &mut Asked<'_>,
    ) -> Result<(), MigrationError> {
        self.wait_for_last(patience, &ReturnMessage::SwitchoverAck, asked)
    }

    /// Ends the thread, after the destination has said its last word for now. What it says from
    /// now on is for another reader.
    pub(super) fn end(mut self) -> Result<WireReader<Channel>, MigrationError> {
        self.keep_channel = true;
        let reader = self.thread.take().and_then(|thread| thread.join().ok());
        reader.ok_or(MigrationError::ChannelClosed("the guest was being handed over"))
    }

    /// Waits for a moment.
    fn wait(&self, closed_while: &'static str) -> Result<Option<ReturnMessage>, MigrationError> {
        match self.heard.recv_timeout(MOMENT) {
            Ok(heard) => {
                self.kept.fetch_sub(1, Ordering::Relaxed);
                heard.map(Some)
            }
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(MigrationError::ChannelClosed(closed_while)),
        }
    }
}

/// What takes a message that is not an answer.
pub(super) type Asked<'a> = dyn FnMut(ReturnMessage) -> Result<(), MigrationError> + 'a;

/// Where nothing may be asked for.
pub(super) fn refuse(message: ReturnMessage) -> Result<(), MigrationError> {
    Err(unexpected(Ok(message)))
}

fn channel_of() -> (std::sync::mpsc::Sender<Heard>, Receiver<Heard>) {
    channel()
}

/// Whether the other side may have closed it on purpose.
fn is_broken(error: &MigrationError) -> bool {
    match error {
        MigrationError::Channel { .. } => true,
        MigrationError::Io { source, .. } => is_channel_broken(source),
        _ => false,
    }
}

/// What the destination says, as it can stand in a line of a log.
fn printable(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { '\u{fffd}' } else { letter }).collect()
}

/// Whether it says why a channel failed.
fn is_reason(error: &MigrationError) -> bool {
    matches!(
        error,
        MigrationError::Flooded { .. }
            | MigrationError::Refused { .. }
            | MigrationError::Format(FormatError::Tls)
    )
}

/// Nothing follows a SHUT. What follows the acknowledgement of a switchover is for postcopy.
fn is_last(message: &ReturnMessage) -> bool {
    matches!(message, ReturnMessage::Shut(_) | ReturnMessage::SwitchoverAck)
}

pub(super) fn unexpected(heard: Heard) -> MigrationError {
    match heard {
        Ok(message) => MigrationError::unexpected(&message),
        Err(error) => error,
    }
}

impl Drop for ReturnPath {
    fn drop(&mut self) {
        if !self.keep_channel {
            // Nothing is sent any more, and the thread must not wait for more to come.
            self.channel.shutdown();
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::Sink;
    use std::os::unix::net::UnixStream;

    /// What a source makes of these messages.
    fn heard(messages: &[ReturnMessage]) -> String {
        let (near, far) = UnixStream::pair().unwrap();
        let channel = |stream| Channel::new(stream, Arc::new(Progress::new())).unwrap();
        let back = ReturnPath::listen(&channel(near), &Arc::new(Progress::new())).unwrap();
        let mut bytes = Vec::new();
        messages.iter().for_each(|message| message.put(&mut bytes));
        channel(far).write(&bytes).unwrap();
        loop {
            if let Err(error) = back
                .wait("memory was being sent")
                .and_then(|message| message.map_or(Ok(()), |message| Err(unexpected(Ok(message)))))
            {
                return error.to_string();
            }
        }
    }

    #[test]
    fn a_reason_is_told_with_the_refusal_that_follows_it_and_cannot_change_a_log() {
        let reason = |text: &str| ReturnMessage::Reason(text.to_owned());
        let refused = heard(&[reason("\u{1b}[31mno\nroom"), ReturnMessage::Shut(22)]);
        let expected =
            "the destination refused the migration (error 22): \u{fffd}[31mno\u{fffd}room";
        assert_eq!(refused, expected);
        let refused = heard(&[ReturnMessage::Shut(22)]);
        assert!(refused.ends_with("(error 22); its own report says why"), "{refused}");
        // One that nothing follows, or another reason.
        assert!(heard(&[reason("why")]).contains("closed the channel"));
        assert!(heard(&[reason("a"), reason("b")]).contains("unexpected message"));
        let taken = heard(&[reason("a"), ReturnMessage::Shut(0)]);
        assert!(taken.contains("unexpected message"), "{taken}");
    }
}
