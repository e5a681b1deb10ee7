#![allow(clippy::single_range_in_vec_init, reason = "lists of runs, some with a single one")]

mod cost;
mod lost;
mod refused;
mod reported;
mod windows;

use super::*;
use crate::stream::TARGET_PAGE_SIZE;
use proptest::prelude::*;
use rustix::fs::MemfdFlags;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

const PAGE: u64 = TARGET_PAGE_SIZE;

/// A block of `len` bytes that lies at `offset` of a file.
struct Block {
    file: File,
    mapping: Arc<HostMapping>,
    block: Arc<RamBlock>,
}

impl Block {
    fn of(file: File, offset: u64, len: u64) -> io::Result<Self> {
        file.set_len(offset + len)?;
        let mapping = Arc::new(HostMapping::map(&file, offset, len)?);
        let block = RamBlock::new("ram".into(), 1 << 30, len, file.try_clone()?, offset);
        Ok(Self { file, mapping, block: Arc::new(block.unwrap()) })
    }

    fn shmem(len: u64) -> Self {
        Self::of(memfd(MemfdFlags::empty()).unwrap(), 16 * PAGE, len).unwrap()
    }

    fn tracker(&self) -> WriteProtect {
        WriteProtect::new(Arc::clone(&self.mapping), Some(Arc::clone(&self.block))).unwrap()
    }

    fn resident(&self) -> u64 {
        self.file.metadata().unwrap().blocks() * 512
    }
}

fn memfd(flags: MemfdFlags) -> io::Result<File> {
    let flags = flags | MemfdFlags::CLOEXEC;
    Ok(File::from(rustix::fs::memfd_create("write-protect-test", flags)?))
}

/// A file on a tmpfs of its own, mounted nowhere, that takes huge pages where it can.
fn huge_tmpfs() -> io::Result<File> {
    use rustix::fs::{Mode, OFlags};
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
        fsopen,
    };
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "huge", "always")?;
    fsconfig_create(&context)?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(&mount, "ram", flags, Mode::RWXU)?))
}

/// Where a kernel or a machine lacks what a test needs, it says so and does nothing.
fn or_skip<T>(what: &str, result: io::Result<T>) -> Option<T> {
    result.inspect_err(|error| eprintln!("skipped, {what}: {error}")).ok()
}

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::from_bounds(start, end).unwrap()
}

fn synced(tracker: &mut WriteProtect) -> PageBitmap {
    let mut dirty = PageBitmap::new(tracker.mapping.len() / PAGE);
    tracker.sync(&mut dirty).unwrap();
    dirty
}

fn dirty_pages(tracker: &mut WriteProtect) -> Vec<Range<u64>> {
    let dirty = synced(tracker);
    dirty.runs(0..dirty.nr_pages()).collect()
}

/// Whether this kernel has what the tracker needs; older ones are told so by `start`.
fn supported() -> bool {
    or_skip("asynchronous write-protection", AsyncWriteProtect::open()).is_some()
}
