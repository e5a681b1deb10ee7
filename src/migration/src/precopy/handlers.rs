//! The iterative handlers of a source: which of them go when.

use crate::channel::Sink;
use crate::error::MigrationError;
use crate::framing::Framing;
use crate::handler::SaveHandler;
use crate::stream::SectionKind;

/// The handlers of a source, in the order of their sections.
pub(super) type Handlers<'a> = Vec<Box<dyn SaveHandler + 'a>>;

/// Refuses two handlers that a destination could not tell apart.
pub(super) fn check(handlers: &Handlers<'_>) -> Result<(), MigrationError> {
    for (index, handler) in handlers.iter().enumerate() {
        let key = (handler.idstr(), handler.instance_id());
        if handlers[..index].iter().any(|other| (other.idstr(), other.instance_id()) == key) {
            let (section, instance) = key;
            let what = format!(
                "two handlers of section {section:?} are of instance {instance}: give each its own"
            );
            return Err(MigrationError::NotPossible(what));
        }
    }
    Ok(())
}

/// Has all handlers that have something left send about `budget` bytes together. Each has an equal
/// share of what those before it have left. How many bytes less are left, as the handlers count
/// them: a page of zeros is a page.
pub(super) fn iterate(
    handlers: &mut Handlers<'_>,
    out: &mut dyn Sink,
    framing: &Framing,
    budget: u64,
) -> Result<u64, MigrationError> {
    let mut handled = 0;
    let mut waiting = handlers.iter().filter(|handler| handler.pending_estimate() != 0).count();
    let mut left = budget;
    for (index, handler) in handlers.iter_mut().enumerate() {
        let pending = handler.pending_estimate();
        if pending == 0 {
            continue;
        }
        let share = (left / waiting.max(1) as u64).max(1);
        let before = out.written();
        framing.continued(out, index, SectionKind::Part, |out| handler.iterate(out, share))?;
        let sent = out.written() - before;
        // A handler may learn of more to send while it sends.
        handled += pending.saturating_sub(handler.pending_estimate()).max(sent.min(pending));
        left = left.saturating_sub(sent);
        waiting = waiting.saturating_sub(1);
    }
    Ok(handled)
}

/// Bytes that must be sent before the guest may leave for postcopy: those of handlers that cannot
/// send after it.
pub(super) fn pending_before_postcopy(handlers: &mut Handlers<'_>) -> u64 {
    let bound = handlers.iter_mut().filter_map(|handler| {
        let pending = handler.pending_estimate();
        handler.postcopy().is_none().then_some(pending)
    });
    bound.sum()
}

/// Ends the handlers that cannot send after the guest has left; the number of the one that can.
///
/// # Errors
///
/// When none can, or several, or one cannot be ended.
pub(super) fn end_before_postcopy(
    handlers: &mut Handlers<'_>,
    out: &mut dyn Sink,
    framing: &Framing,
) -> Result<usize, MigrationError> {
    let mut memory = None;
    for (index, handler) in handlers.iter_mut().enumerate() {
        if let Some(pages) = handler.postcopy() {
            if pages.has_channels() {
                framing.continued(out, index, SectionKind::Part, |out| pages.end_channels(out))?;
            }
            if memory.replace(index).is_some() {
                let what = "postcopy of several handlers was asked for; only RAM's is possible";
                return Err(MigrationError::NotPossible(what.to_owned()));
            }
        } else {
            framing.continued(out, index, SectionKind::End, |out| handler.complete(out))?;
        }
    }
    memory.ok_or_else(|| {
        MigrationError::NotPossible("postcopy was asked for, and no handler has memory".to_owned())
    })
}
