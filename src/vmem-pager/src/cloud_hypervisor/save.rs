//! Saving a guest of Cloud Hypervisor's: the receiver of `send-migration` with `local=on`.

use std::sync::Arc;

use migration::Status;
use migration::inspect::inspect;
use serde_json::json;

use super::channel::Peer;
use super::image::{Guest, GuestWriter};
use super::taking::{Nothing, Taken, accept, refuse, take};
use super::{copy, unix};
use crate::cli::args::SaveArgs;
use crate::cli::report::{Figures, Report};
use crate::error::PagerError;
use crate::image::writer::NewFile;
use crate::qemu::save::SaveMetrics;
use crate::run::Run;
use crate::socket::Listener;

/// Saves a guest: waits for a Cloud Hypervisor, and takes what it hands over into an image.
///
/// # Errors
///
/// Why the guest is not saved. There is nothing new under the image's name then, unless the error says so;
/// and the guest runs on where it was, unless the error says so.
pub fn run(
    args: &SaveArgs,
    run: &Arc<Run>,
    report: &Report,
    metrics: &SaveMetrics,
) -> Result<(), PagerError> {
    let common = &args.common;
    if common.qmp.is_some() {
        let what = "--qmp is a control socket of QEMU's; leave it out with --vmm cloud-hypervisor";
        return Err(PagerError::Usage(what.to_owned()));
    }
    if args.recover {
        let what = "--recover: a guest that Cloud Hypervisor sends is saved whole or not at all; leave the option out";
        return Err(PagerError::Usage(what.to_owned()));
    }
    unix(&common.socket)?;
    metrics.follow(&run.progress);
    // What cannot work is refused before Cloud Hypervisor is asked for anything.
    let file = NewFile::create(&common.image)?;
    let listener = Listener::bind(&common.socket)?;
    report.event("listening", &json!({ "socket": listener.address()?.to_string() }));
    run.progress.set_status(Status::Setup);
    let progress = Arc::clone(&run.progress);
    let following = report.follow(move || Figures::of_save(&progress.snapshot()));
    let peer = Peer::new(listener.accept(run, None)?)?;
    report.event("connected", &json!({}));
    run.progress.set_status(Status::Active);
    let saved = save(&peer, file, args.ack_early, run, report);
    drop(following);
    match &saved {
        Ok(()) => run.progress.set_status(Status::Completed),
        Err(error) => run.progress.fail(error),
    }
    saved
}

/// Takes a guest, writes its image, and tells its sender.
pub(super) fn save(
    peer: &Peer,
    file: NewFile,
    ack_early: bool,
    run: &Arc<Run>,
    report: &Report,
) -> Result<(), PagerError> {
    let taken = take(peer, run, &mut Nothing)?;
    report.event("paused", &details(&taken));
    if ack_early {
        return save_later(peer, &taken, file, run, report);
    }
    let written = write(&taken, file, run, &|| {
        run.check("memory was being saved")?;
        match peer.is_closed() {
            true => Err(gone()),
            false => Ok(()),
        }
    });
    if let Err(error) = written {
        refuse(peer);
        return Err(error);
    }
    accept(peer, run).map_err(|error| {
        PagerError::Peer(format!(
            "{error}; the image is whole, but the guest may run on where it was: what it does from now on is \
             not in the image"
        ))
    })?;
    saved(run, report);
    Ok(())
}

/// Answers first, and writes then: from the answer on, memory is held by this process alone.
fn save_later(
    peer: &Peer,
    taken: &Taken,
    file: NewFile,
    run: &Arc<Run>,
    report: &Report,
) -> Result<(), PagerError> {
    report.warn(
        "--ack-early: Cloud Hypervisor is told that its guest is saved, and it is not: until the image is \
         whole, this process alone has the guest. If it ends before, or the disk is full, the guest is lost",
    );
    // From here on a signal would lose the guest, as would the end of the time; before, they do not.
    run.hold();
    if let Err(error) = run.check("memory was to be saved") {
        refuse(peer);
        return Err(error);
    }
    accept(peer, run).map_err(|error| {
        PagerError::Peer(format!(
            "{error}; there is no image, and the guest runs on where it was, unless it was told all the same"
        ))
    })?;
    report.event("acknowledged", &json!({}));
    write(taken, file, run, &|| Ok(())).map_err(|error| {
        PagerError::Peer(format!(
            "{error}; the guest is lost, since it was acknowledged early (--ack-early)"
        ))
    })?;
    saved(run, report);
    Ok(())
}

fn gone() -> PagerError {
    PagerError::Peer(
        "the Cloud Hypervisor that has the guest closed the connection while memory was being saved: it \
         keeps the guest"
            .to_owned(),
    )
}

fn write(
    taken: &Taken,
    file: NewFile,
    run: &Arc<Run>,
    keep_on: &(dyn Fn() -> Result<(), PagerError> + Sync),
) -> Result<(), PagerError> {
    let guest = Guest {
        config: &taken.config,
        state: &taken.state,
        layout: &taken.layout,
        devices: &taken.devices,
        paused: taken.paused,
    };
    let writer = GuestWriter::begin(file, &guest, Arc::clone(&run.progress))?;
    copy::save(taken, writer.pages(), keep_on)?;
    let image = writer.finish()?;
    // The guest ends with the answer: what cannot be read back is not an image.
    if let Some(error) = inspect(image.file()).error {
        return Err(PagerError::Peer(format!("what was written is not a whole image: {error}")));
    }
    keep_on()?;
    image.commit()
}

fn details(taken: &Taken) -> serde_json::Value {
    let plugged = |device: &super::state::Device| device.state.plugged_size;
    json!({
        "mappings": taken.layout.mappings.len(),
        "memory_bytes": taken.layout.size(),
        "plugged_bytes": taken.devices.iter().flatten().map(plugged).sum::<u64>(),
        "was_paused": taken.paused,
    })
}

fn saved(run: &Run, report: &Report) {
    let info = run.progress.snapshot();
    let details = json!({
        "pages": info.normal,
        "zero_pages": info.duplicate,
        "bytes_written": info.transferred,
    });
    report.outcome("saved", &details);
}
