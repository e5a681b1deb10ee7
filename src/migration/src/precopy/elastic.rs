//! Block state that changes while memory is sent: the engine's part between two sections.

use std::time::{Duration, Instant};

use super::handlers::Handlers;
use super::return_path::{ReturnPath, unexpected};
use crate::channel::Channel;
use crate::channel::patience::deadline;
use crate::error::MigrationError;
use crate::framing::{Framing, write};
use crate::progress::Progress;
use crate::stream::{PONG_BLOCK_STATE, ReturnMessage, SectionKind};

/// Between two looks at what is to be sent, while nothing else is.
const MOMENT: Duration = Duration::from_millis(1);

/// Whether block state may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Elastic {
    /// It stays frozen: the source cannot follow it, or does not want to.
    No,
    /// The destination was asked whether it can follow. A change waits for it for so long.
    Asked(Duration),
    /// It may.
    Yes,
}

impl Elastic {
    /// Asks, where the source could follow. `None` as patience: it stays frozen.
    pub(super) fn ask(handlers: &Handlers<'_>, patience: Option<Duration>) -> Self {
        match patience {
            Some(patience) if handlers.iter().any(|handler| handler.can_follow()) => {
                Self::Asked(patience)
            }
            _ => Self::No,
        }
    }

    /// Hears the destination, and sends what has changed.
    pub(super) fn serve(
        &mut self,
        handlers: &mut Handlers<'_>,
        out: &mut Channel,
        framing: &Framing,
        back: &ReturnPath,
    ) -> Result<(), MigrationError> {
        back.hear(&mut |message| self.take(handlers, message))?;
        if *self == Self::Yes { send(handlers, out, framing) } else { Ok(()) }
    }

    fn take(
        &mut self,
        handlers: &mut Handlers<'_>,
        message: ReturnMessage,
    ) -> Result<(), MigrationError> {
        match (message, *self) {
            (ReturnMessage::Pong(PONG_BLOCK_STATE), Self::Asked(patience)) => {
                *self = Self::Yes;
                handlers.iter_mut().try_for_each(|handler| handler.follow(patience))
            }
            (ReturnMessage::Pong(_), _) => Ok(()),
            (ReturnMessage::BlockState { number, refused }, Self::Yes) => {
                for handler in handlers {
                    if handler.answered(number, refused.clone())? {
                        return Ok(());
                    }
                }
                let what =
                    format!("an answer to change {number} of block state, which was not sent");
                Err(MigrationError::Unexpected(what))
            }
            (other, _) => Err(unexpected(Ok(other))),
        }
    }

    /// Waits for `pause`, during which only changes are sent.
    pub(super) fn pause(
        &mut self,
        mut pause: Duration,
        handlers: &mut Handlers<'_>,
        (out, framing): (&mut Channel, &Framing),
        back: Option<&ReturnPath>,
        progress: &Progress,
    ) -> Result<(), MigrationError> {
        let moment = if *self == Self::Yes { MOMENT } else { 20 * MOMENT };
        while !pause.is_zero() && !progress.is_cancelled() {
            let begin = Instant::now();
            if let (Some(back), Self::Yes) = (back, *self) {
                self.serve(handlers, out, framing, back)?;
            }
            std::thread::sleep(pause.min(moment));
            pause = pause.saturating_sub(begin.elapsed());
        }
        Ok(())
    }

    /// Before the guest is stopped: block state is frozen, and the destination has all of it.
    pub(super) fn freeze(
        &mut self,
        handlers: &mut Handlers<'_>,
        (out, framing): (&mut Channel, &Framing),
        back: Option<&ReturnPath>,
        progress: &Progress,
        patience: Duration,
    ) -> Result<(), MigrationError> {
        let (Some(back), Self::Yes) = (back, *self) else {
            // What the destination may still say comes too late.
            *self = Self::No;
            return Ok(());
        };
        handlers.iter_mut().try_for_each(|handler| handler.freeze())?;
        let deadline = deadline(patience);
        loop {
            self.serve(handlers, out, framing, back)?;
            // What it accepts now was refused here meanwhile, and is taken back.
            if !handlers.iter().any(|handler| handler.has_unanswered()) {
                return Ok(());
            }
            if progress.is_cancelled() {
                return Err(MigrationError::Cancelled);
            }
            if Instant::now() >= deadline {
                let timed_out = std::io::ErrorKind::TimedOut.into();
                return Err(MigrationError::io("hear of the last change of block state")(
                    timed_out,
                ));
            }
            std::thread::sleep(MOMENT);
        }
    }
}

/// Sends what has changed.
fn send(
    handlers: &mut Handlers<'_>,
    out: &mut Channel,
    framing: &Framing,
) -> Result<(), MigrationError> {
    for (index, handler) in handlers.iter_mut().enumerate() {
        let changes = handler.changes()?;
        if changes.is_empty() {
            continue;
        }
        if handler.needs_barrier() {
            framing.continued(out, index, SectionKind::Part, |out| handler.barrier(out))?;
        }
        write(out, &changes)?;
    }
    Ok(())
}
