//! Snapshots on file systems that are small, that fail, and that differ in what they take.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};

use super::*;

const MIB: u64 = 1 << 20;

/// A file system that is mounted nowhere.
struct Mounted(OwnedFd);

impl Mounted {
    fn new(kind: &str, option: (&str, &str)) -> std::io::Result<Self> {
        let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&context, option.0, option.1)?;
        fsconfig_create(&context)?;
        let flags = (FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty());
        Ok(Self(fsmount(&context, flags.0, flags.1)?))
    }

    fn path(&self, name: &str) -> PathBuf {
        // As children find it, too.
        format!("/proc/{}/fd/{}/{name}", std::process::id(), self.0.as_raw_fd()).into()
    }

    fn names(&self) -> Vec<OsString> {
        let entries = std::fs::read_dir(self.path("")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name());
        names.filter(|name| name != "lost+found").collect()
    }
}

/// A guest with so many bytes in a row.
fn guest_of(bytes: u64) -> Side {
    let side = Side::of_region(64 * MIB);
    fill(&side.region, 0..bytes / PAGE, 7);
    side
}

/// A snapshot of 16 MiB is not to be had: it fails so, and leaves what there was.
fn assert_leaves_nothing(mounted: &Mounted, kinds: &[i32]) {
    let path = mounted.path("image");
    std::fs::write(&path, b"precious").unwrap();
    let from = guest_of(16 * MIB);
    for direct in [false, true] {
        let io = FileIo { threads: 4, direct };
        let failed = write_image(&path, |file| save_with(&from, file, io).0).unwrap_err();
        let MigrationError::Io { source, .. } = &failed else { panic!("{failed}") };
        assert!(source.raw_os_error().is_some_and(|errno| kinds.contains(&errno)), "{failed}");
        assert_eq!(mounted.names(), ["image"], "{failed}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}

#[test]
fn a_snapshot_that_finds_the_disk_full_leaves_nothing_under_its_name_nor_beside_it() {
    match Mounted::new("tmpfs", ("size", "8m")) {
        Ok(small) => assert_leaves_nothing(&small, &[libc::ENOSPC]),
        Err(error) => eprintln!("skipped: tmpfs: {error}"),
    }
}

/// A loop device, on a file that has no room for what is written to it.
struct Loop(String);

impl Loop {
    fn new(file: &Path) -> std::io::Result<Self> {
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output()?;
        let name = String::from_utf8_lossy(&made.stdout).trim().to_owned();
        let why = String::from_utf8_lossy(&made.stderr).into_owned();
        made.status.success().then_some(Self(name)).ok_or_else(|| std::io::Error::other(why))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn a_snapshot_on_a_disk_that_fails_leaves_nothing_under_its_name_nor_beside_it() {
    let made = || {
        let small = Mounted::new("tmpfs", ("size", "8m"))?;
        let disk = small.path("disk");
        File::create(&disk)?.set_len(48 * MIB)?;
        // Without a journal, since that would be what fails.
        let options = ["-q", "-F", "-O", "^has_journal", "-E", "nodiscard"];
        let formatted = Command::new("mkfs.ext4").args(options).arg(&disk).status()?;
        if !formatted.success() {
            return Err(std::io::Error::other("mkfs.ext4 failed"));
        }
        let device = Loop::new(&disk)?;
        Ok((Mounted::new("ext4", ("source", &device.0))?, device, small))
    };
    match made() {
        Ok((disk, _device, _small)) => assert_leaves_nothing(&disk, &[libc::EIO, libc::ENOSPC]),
        Err(error) => eprintln!("skipped: {error}"),
    }
}

#[test]
fn a_snapshot_by_any_number_of_threads_past_the_page_cache_or_not_is_the_same() {
    let from = guest_of(16 * MIB);
    fill(&from.region, 5000..5001, 0);
    fill(&from.region, 6000..6003, 8);
    let content = |file: &File| {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    let first = tempfile::tempfile().unwrap();
    let (saved, seen) = save_with(&from, &first, FileIo { threads: 1, direct: false });
    saved.unwrap();
    for threads in [1, 4, usize::MAX] {
        for direct in [true, false] {
            for file in [tempfile::tempfile().unwrap(), memfd(0)] {
                let io = FileIo { threads, direct };
                let (saved, again) = save_with(&from, &file, io);
                saved.unwrap();
                assert!(content(&file) == content(&first), "{io:?}");
                assert_eq!(
                    (again.normal, again.duplicate, again.remaining, again.transferred),
                    (seen.normal, seen.duplicate, 0, seen.transferred)
                );
                let to = Side::of_region(64 * MIB);
                restore_with(&to, &file, io).unwrap();
                assert_eq!(to.resident().0, 16 * MIB / PAGE + 3);
                for page in [0, 4095, 4096, 5000, 6000, 6002] {
                    assert_eq!(to.page(page), from.page(page), "{page}: {io:?}");
                }
            }
        }
    }
}

#[test]
fn the_size_of_an_image_is_told_before_it_is_taken_and_touches_nothing() {
    let from = filled();
    let before = from.resident();
    let size = image_size(&from.blocks, &Configuration::new("test")).unwrap();
    assert_eq!(from.resident(), before);
    let file = memfd(0);
    save_to(&from, &file).0.unwrap();
    let metadata = file.metadata().unwrap();
    assert_eq!(size.length, metadata.len());
    // But for its four pages of zeros.
    assert_eq!(size.on_disk, metadata.blocks() * 512 + 4 * PAGE);
}
