//! Saves a stopped guest to a file, and restores it from there.
//!
//!     cargo run --example snapshot

mod vm;

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use migration::Progress;
use migration::snapshot::{FileIo, Restore, StoppedGuest, restore, save, write_image};
use migration::stream::Configuration;
use virtio_mem::device::{BlockSpan, Request, Response};

use vm::{ADDR, BLOCK, Vm};

const REGION: u64 = 8 << 30;

/// Machine type and capabilities: a guest is restored where they are the same.
fn configuration() -> Configuration {
    Configuration::new("example")
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("guest.image");

    let mut saved = Vm::new(REGION)?;
    let plug = Request::Plug(BlockSpan { addr: ADDR, nb_blocks: 64 });
    assert_eq!(saved.controller.execute(plug), Response::Ack);
    saved.file.write_all_at(b"what the guest wrote", 5 * BLOCK)?;
    // Under its name the image is whole, or not there.
    write_image(&path, |file| {
        let stopped = StoppedGuest {
            configuration: configuration(),
            blocks: &saved.blocks,
            devices: &mut saved.devices,
            io: FileIo::default(),
            progress: Arc::new(Progress::new()),
        };
        save(stopped, file)
    })?;
    let image = File::open(&path)?;
    let seen = image.metadata()?;
    println!("an image of {} bytes takes {} on the disk", seen.len(), seen.blocks() * 512);

    let Vm { file, controller, blocks, mut devices } = Vm::new(REGION)?;
    let guest = Restore {
        configuration: configuration(),
        blocks: Arc::new(blocks),
        devices: &mut devices,
        io: FileIo::default(),
        progress: Arc::new(Progress::new()),
    };
    restore(guest, &image)?;
    let mut bytes = [0; 20];
    file.read_exact_at(&mut bytes, 5 * BLOCK)?;
    assert_eq!(&bytes, b"what the guest wrote");
    assert_eq!(controller.plugged_ranges(), saved.controller.plugged_ranges());
    println!("restored: resident {:?} bytes", controller.resident_size());
    Ok(())
}
