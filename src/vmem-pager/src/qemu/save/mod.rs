//! The destination of a migration: what QEMU sends becomes an image.
//!
//! `session` has the connections, `incoming` the main stream, `records` and `multifd` the pages,
//! `description` and `package` the state of devices, `drive` QEMU's side. The protocol, and who has the guest
//! when something fails, are in `spec-notes/pager-qemu-save.md`.

mod description;
mod drive;
mod incoming;
mod kept;
mod main_channel;
mod metrics;
mod multifd;
mod package;
mod records;
mod session;
mod stream;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;

use migration::Status;
use migration::inspect::{Warning, inspect};
use serde_json::json;
use vmstate::wire::WireReader;

pub use metrics::SaveMetrics;
pub use stream::{receive_stream, recover_stream};

use crate::cli::args::SaveArgs;
use crate::cli::report::{Figures, Report};
use crate::error::PagerError;
use crate::image::writer::{NewFile, WholeImage};
use crate::run::{POLL, Run};
use crate::socket::Listener;
use drive::Drive;
use kept::Kept;
use main_channel::MainChannel;
use session::{Session, Timed};

/// Saves a guest: waits for QEMU, or has it come, and takes all that it sends into an image.
///
/// # Errors
///
/// Why the guest is not saved; see [`PagerError`]. There is nothing new under the image's name then, unless
/// the error says so.
pub fn run(
    args: &SaveArgs,
    run: &Arc<Run>,
    report: &Report,
    metrics: &SaveMetrics,
) -> Result<(), PagerError> {
    let common = &args.common;
    metrics.follow(&run.progress);
    // What cannot work is refused before QEMU is asked for anything.
    let kept = Kept::of(&common.image, args.recover)?;
    let file = NewFile::create(&common.image)?;
    let listener = Listener::bind(&common.socket)?;
    let drive = common.qmp.as_deref().map(|path| Drive::prepare(path, run, report, args.recover));
    let drive = drive.transpose()?;
    report.event("listening", &json!({ "socket": listener.address()?.to_string() }));
    let progress = Arc::clone(&run.progress);
    progress.set_status(Status::Setup);
    let _following = report.follow(move || Figures::of_save(&progress.snapshot()));
    let saved = save(file, kept, &listener, drive, run, report);
    match &saved {
        Ok(()) => run.progress.set_status(Status::Completed),
        Err(error) => run.progress.fail(error),
    }
    saved
}

fn save(
    file: NewFile,
    kept: Kept,
    listener: &Listener,
    mut drive: Option<Drive>,
    run: &Arc<Run>,
    report: &Report,
) -> Result<(), PagerError> {
    let session = Session::new(run, kept.bytes.is_some());
    let over = AtomicBool::new(false);
    let saved = thread::scope(|scope| {
        let (found, main) = mpsc::channel();
        let accepting = &session;
        scope.spawn(move || {
            while let Some((number, channel)) = next_connection(accepting, listener) {
                let found = found.clone();
                scope.spawn(move || {
                    if let Some(error) = accepting.serve(number, channel, &found) {
                        report.warn(&format!("{error}; closed"));
                    }
                });
            }
        });
        if let Some(drive) = &mut drive {
            let (session, over) = (&session, &over);
            scope.spawn(move || {
                match listener.address().and_then(|address| drive.start(&address)) {
                    Ok(()) => drive.watch(session, &|| over.load(Ordering::Relaxed)),
                    Err(error) => session.fail(error),
                }
            });
        }
        let saved = receive(&main, file, kept, &session, listener, run, report);
        over.store(true, Ordering::Relaxed);
        session.end();
        saved
    });
    match (saved, drive) {
        (Ok(()), Some(drive)) => drive.wait_completed(run),
        (Err(error), Some(drive)) => Err(drive.give_up(error)),
        (saved, None) => saved,
    }
}

/// The next connection, until the save ends.
fn next_connection(session: &Arc<Session>, listener: &Listener) -> Option<(usize, Timed)> {
    while !session.has_ended() {
        match session.accept(listener) {
            Ok(Some(connection)) => return Some(connection),
            Ok(None) => drop(session::is_readable(listener, POLL)),
            Err(error) => {
                session.fail(error);
                return None;
            }
        }
    }
    None
}

/// Takes the main stream, and tells the source how it ended.
fn receive(
    main: &mpsc::Receiver<WireReader<Timed>>,
    file: NewFile,
    kept: Kept,
    session: &Arc<Session>,
    listener: &Listener,
    run: &Arc<Run>,
    report: &Report,
) -> Result<(), PagerError> {
    let mut reader = loop {
        match main.recv_timeout(POLL) {
            Ok(reader) => break reader,
            Err(RecvTimeoutError::Timeout) if !session.has_failed() => {
                run.check("no VMM has connected")?;
            }
            Err(_) => {
                return Err(session.explain(PagerError::Peer("no VMM has connected".to_owned())));
            }
        }
    };
    report.event("connected", &json!({}));
    run.progress.set_status(Status::Active);
    let Kept { path, bytes } = kept;
    let mut channel = MainChannel::new(reader.get_ref().channel(), session, listener, path);
    let whole = match bytes {
        None => incoming::receive(&mut reader, &mut channel, file, &run.progress),
        Some(kept) => incoming::recover(&kept, &mut reader, &mut channel, file, &run.progress),
    };
    let saved = whole.and_then(|image| {
        // A multifd channel may have failed without the main one.
        session.check_failure()?;
        report_on(&image, report);
        image.commit()
    });
    match saved {
        Ok(()) => {
            channel.forget_kept();
            channel.tell_saved()?;
            let info = run.progress.snapshot();
            let details = json!({
                "pages": info.normal,
                "zero_pages": info.duplicate,
                "discarded_pages": info.dirty_while_discarded,
                "bytes_written": info.transferred,
            });
            report.outcome("saved", &details);
            Ok(())
        }
        Err(error) => {
            let error = session.explain(error);
            channel.tell_failed();
            Err(match channel.is_guest_taken() {
                true => PagerError::Peer(format!(
                    "{error}; the source had begun postcopy: it is paused, and has all of the guest's memory still. \
                     Run this again with --recover, which has it sent again (and QEMU told to `migrate` with \
                     resume=true, unless with --qmp); there is no other way to continue the guest"
                )),
                false => error,
            })
        }
    }
}

/// Says what is odd about an image.
fn report_on(image: &WholeImage, report: &Report) {
    for (block, offset) in image.strays() {
        let block = vmstate::printable(block);
        report.warn(&format!(
            "RAM block {block:?}: pages came for discarded memory, the first at {offset:#x}; they are left out"
        ));
    }
    let inspection = inspect(image.file());
    if let Some(error) = inspection.error.as_ref().filter(|_| inspection.description.is_some()) {
        report.warn(&format!("the state of devices is not as it describes itself: {error}"));
    }
    for warning in inspection.warnings {
        if !matches!(warning, Warning::NoSizes { .. }) {
            report.warn(&warning.to_string());
        }
    }
}
