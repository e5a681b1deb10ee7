//! Files that are made as a whole: beside their name, and then under it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FallocateFlags, MemfdFlags, RenameFlags, fallocate, renameat_with};
use rustix::io::Errno;

use super::layout::{self, BITMAP, Header, Lasting, Slot};
use super::{BootId, Geometry, left, lock};

/// Words that are written at once.
const CHUNK: usize = 8192;

/// Links that lead to a file, at most, as the kernel has it.
const LINKS_MAX: usize = 40;

/// What a file starts with.
pub(super) struct Content<'a> {
    pub(super) geometry: &'a Geometry,
    pub(super) boot: BootId,
    pub(super) slot: &'a Slot,
    pub(super) words: &'a [u64],
}

/// The synced size of a file that starts with this commit.
pub(super) fn lasting(slot: &Slot) -> Lasting {
    Lasting { seq: 1, requested_size: slot.requested_size }
}

/// How a file gets its name without taking the place of another.
#[derive(Clone, Copy, Debug)]
enum Naming {
    /// Not on every file system, nor with every kernel.
    Rename,
    /// Not on file systems without hard links.
    Link,
}

/// Makes a file where there is none.
pub(super) fn new(path: &Path, content: &Content<'_>) -> io::Result<File> {
    new_by(&[Naming::Rename, Naming::Link], path, content)
}

fn new_by(namings: &[Naming], path: &Path, content: &Content<'_>) -> io::Result<File> {
    let (temporary, file) = beside(path, content)?;
    let mut done = Err(io::Error::from(io::ErrorKind::Unsupported));
    for naming in namings {
        done = match naming {
            Naming::Rename => {
                let flags = RenameFlags::NOREPLACE;
                renameat_with(CWD, &temporary, CWD, path, flags).map_err(Into::into)
            }
            Naming::Link => fs::hard_link(&temporary, path),
        };
        if !matches!(&done, Err(error) if is_unsupported(error)) {
            break;
        }
    }
    let named = match done {
        // Neither: then in place. A kill leaves a file that is refused, since the head is last.
        Err(error) if is_unsupported(&error) => {
            let _ = fs::remove_file(&temporary);
            let file = create(path)?;
            if let Err(error) = write(&file, path, content) {
                let _ = fs::remove_file(path);
                return Err(error);
            }
            sync_folder(path)?;
            return Ok(file);
        }
        done => done.and_then(|()| assert_same(&file, path)),
    };
    // Gone already, where it was renamed.
    let _ = fs::remove_file(&temporary);
    named?;
    sync_folder(path)?;
    Ok(file)
}

fn is_unsupported(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    // EPERM is what link(2) says of file systems without links.
    let unsupported = [Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP, Errno::PERM, Errno::MLINK];
    error.kind() == io::ErrorKind::Unsupported || errno.is_some_and(|e| unsupported.contains(&e))
}

/// Makes a file in the place of `old`, which is `path`, with its owner and permissions.
pub(super) fn instead_of(old: &File, path: &Path, content: &Content<'_>) -> io::Result<File> {
    let (temporary, file) = beside(path, content)?;
    let replaced = || -> io::Result<()> {
        let metadata = old.metadata()?;
        let made = file.metadata()?;
        if (made.uid(), made.gid()) != (metadata.uid(), metadata.gid()) {
            let kept = fchown(&file, Some(metadata.uid()), Some(metadata.gid()));
            if let Err(error) = kept {
                // Only root may. The state is worth more than who owns its file.
                tracing::warn!(%error, path = %path.display(), "the state file changes its owner");
            }
        }
        file.set_permissions(metadata.permissions())?;
        fs::rename(&temporary, path)
    };
    if let Err(error) = replaced() {
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    // It has the name by now, so this cannot be an error any more.
    if let Err(error) = sync_folder(path) {
        tracing::warn!(%error, path = %path.display(), "cannot sync the folder of the state file");
    }
    Ok(file)
}

/// Makes a file without a name.
pub(super) fn in_memory(content: &Content<'_>) -> io::Result<File> {
    let file = File::from(rustix::fs::memfd_create("vhost-user-mem-state", MemfdFlags::CLOEXEC)?);
    file.set_len(layout::file_len(content.geometry))?;
    fill(&file, content)?;
    Ok(file)
}

/// The file that a chain of links leads to, whether it is there or not.
pub(super) fn resolve(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..LINKS_MAX {
        match fs::read_link(&path) {
            Ok(target) => path = path.parent().unwrap_or(Path::new("/")).join(target),
            Err(_) => return Ok(path),
        }
    }
    Err(Errno::LOOP.into())
}

/// Makes a file beside `path`, under a name that no other process uses.
fn beside(path: &Path, content: &Content<'_>) -> io::Result<(PathBuf, File)> {
    loop {
        let temporary = left::new_name(path);
        let file = match create(&temporary) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            other => other?,
        };
        match write(&file, &temporary, content) {
            Ok(()) => return Ok((temporary, file)),
            Err(error) => {
                let _ = fs::remove_file(&temporary);
                return Err(error);
            }
        }
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// Locks a file and writes all of it, at its full size.
fn write(file: &File, path: &Path, content: &Content<'_>) -> io::Result<()> {
    lock(file, path).map_err(io::Error::other)?;
    let len = layout::file_len(content.geometry);
    match fallocate(file, FallocateFlags::empty(), 0, len) {
        // Without it, a commit may fail later; the guest is then told BUSY.
        Err(Errno::OPNOTSUPP) => file.set_len(len)?,
        other => other?,
    }
    fill(file, content)?;
    file.sync_all()
}

/// Writes what is not zero into a file of zeros. The head comes last.
fn fill(file: &File, content: &Content<'_>) -> io::Result<()> {
    let Content { geometry, boot, slot, words } = content;
    let lasting = lasting(slot);
    file.write_all_at(&lasting.to_bytes(), lasting.place())?;
    file.write_all_at(&slot.to_bytes(), slot.place())?;
    for (chunk, part) in words.chunks(CHUNK).enumerate() {
        if part.iter().any(|word| *word != 0) {
            write_words(file, part, chunk * CHUNK)?;
        }
    }
    file.write_all_at(&Header::new(geometry, *boot).to_bytes(), 0)
}

/// Writes words of the bitmap, the first of which has the index `first`.
pub(super) fn write_words(file: &File, words: &[u64], first: usize) -> io::Result<()> {
    for (chunk, words) in words.chunks(CHUNK).enumerate() {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        file.write_all_at(&bytes, BITMAP + (first + chunk * CHUNK) as u64 * 8)?;
    }
    Ok(())
}

/// Refuses to go on with a file that another process has put away.
fn assert_same(file: &File, path: &Path) -> io::Result<()> {
    let (ours, named) = (file.metadata()?, fs::symlink_metadata(path)?);
    if (ours.dev(), ours.ino()) == (named.dev(), named.ino()) {
        return Ok(());
    }
    Err(io::Error::other("another process has put its file there meanwhile"))
}

/// Makes a name outlive the host.
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    match File::open(folder.unwrap_or(Path::new(".")))?.sync_all() {
        // Some file systems have nothing to sync there.
        Err(error) if is_unsupported(&error) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry =
        Geometry { addr: 0, region_size: 64 * 4096, block_size: 4096, node_id: None };
    const WAYS: [&[Naming]; 3] = [&[Naming::Rename], &[Naming::Link], &[]];

    fn made_by(namings: &[Naming], path: &Path) -> io::Result<File> {
        let slot = Slot { seq: 1, plugged_blocks: 0, ..Slot::default() };
        let (boot, words) = (BootId([1; 16]), [0]);
        new_by(namings, path, &Content { geometry: &GEOMETRY, boot, slot: &slot, words: &words })
    }

    #[test]
    fn a_file_gets_its_name_on_every_file_system() {
        for namings in WAYS {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("state");
            let file = made_by(namings, &path).unwrap();
            assert_same(&file, &path).unwrap();
            assert_eq!(file.metadata().unwrap().len(), layout::file_len(&GEOMETRY));
            drop(file);
            let opened = super::super::StateFile::open_in(&path, &GEOMETRY, BootId([1; 16]));
            assert_eq!(opened.unwrap().1.plugged, [0]);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "{namings:?}");
        }
    }

    #[test]
    fn a_name_that_exists_is_left_alone() {
        for namings in WAYS {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("state");
            fs::write(&path, "precious").unwrap();
            let error = made_by(namings, &path).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AlreadyExists, "{namings:?}");
            assert_eq!(fs::read(&path).unwrap(), b"precious");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn what_other_daemons_are_about_to_name_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let slot = Slot { seq: 1, ..Slot::default() };
        let (boot, words) = (BootId([1; 16]), [0]);
        let content = Content { geometry: &GEOMETRY, boot, slot: &slot, words: &words };
        let (first, mine) = beside(&path, &content).unwrap();
        let (second, _) = beside(&path, &content).unwrap();
        assert!(first != second && first.exists() && second.exists());
        fs::rename(&second, &path).unwrap();
        assert!(assert_same(&mine, &path).is_err());
    }

    #[test]
    fn a_circle_of_links_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        std::os::unix::fs::symlink("state", &path).unwrap();
        assert!(resolve(&path).is_err());
    }
}
