//! A snapshot under its name: whole, or not there.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, CWD, OFlags, linkat};
use rustix::io::Errno;

use crate::error::MigrationError;

/// How many names are tried for the file that is written.
const ATTEMPTS: usize = 16;

/// Has `write` write a snapshot to a new file in the folder of `path`, and gives it that name once it is
/// on the disk; a file of that name is replaced. So what has the name is whole, whenever the host fails.
///
/// The file can be read and written by its owner only: guest memory is in it.
///
/// # Errors
///
/// What `write` fails with, or why there can be no such file. What had the name has it still; the new
/// file is removed.
pub fn write_image(
    path: &Path,
    write: impl FnOnce(&File) -> Result<(), MigrationError>,
) -> Result<(), MigrationError> {
    let image =
        NewImage::create(path).map_err(MigrationError::io("create a file for the snapshot"))?;
    write(image.file())?;
    image.commit().map_err(MigrationError::io("give the snapshot its name"))
}

/// A file that has no name, or a temporary one, until it is whole. Dropped before that, it is gone.
#[derive(Debug)]
pub struct NewImage {
    path: PathBuf,
    file: File,
    /// Its name until then, where the file system has no files without one.
    temporary: Option<PathBuf>,
}

impl NewImage {
    /// A new, empty file in the folder of `path`, for its owner only. Where the file system can, it has no
    /// name, so that nothing is left of it whatever ends this process.
    ///
    /// # Errors
    ///
    /// When the folder does not take a file.
    pub fn create(path: &Path) -> io::Result<Self> {
        if path.file_name().is_none() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a folder, not a file"));
        }
        let nameless = File::options()
            .read(true)
            .write(true)
            .mode(0o600)
            .custom_flags(OFlags::TMPFILE.bits().cast_signed())
            .open(folder_of(path));
        let (file, temporary) = match nameless {
            // Only there can it get a name.
            Ok(file) if proc_path(&file).exists() => (file, None),
            _ => create_beside(path).map(|(temporary, file)| (file, Some(temporary)))?,
        };
        Ok(Self { path: path.to_owned(), file, temporary })
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives the file its name, once all of it is on the disk; a file of that name is replaced. When this
    /// returns, the name is on the disk, too.
    ///
    /// # Errors
    ///
    /// Why it has not got its name. What had the name has it still, unless it was the last step that
    /// failed: to bring the folder to the disk.
    pub fn commit(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        match self.temporary.take() {
            None => self.link()?,
            Some(temporary) => {
                self.temporary = Some(temporary.clone());
                fs::rename(&temporary, &self.path)?;
                self.temporary = None;
            }
        }
        File::open(folder_of(&self.path))?.sync_all()
    }

    /// Names a file that has no name. A name that is taken can only be replaced by way of another.
    fn link(&mut self) -> io::Result<()> {
        let from = proc_path(&self.file);
        let link = |to: &Path| linkat(CWD, &from, CWD, to, AtFlags::SYMLINK_FOLLOW);
        match link(&self.path) {
            Err(Errno::EXIST) => {}
            linked => return Ok(linked?),
        }
        let mut linked = Err(io::ErrorKind::AlreadyExists.into());
        for _ in 0..ATTEMPTS {
            let temporary = temporary_name(&self.path)?;
            match link(&temporary) {
                Err(Errno::EXIST) => continue,
                Err(errno) => return Err(errno.into()),
                Ok(()) => {}
            }
            linked = fs::rename(&temporary, &self.path);
            if linked.is_err() {
                let _ = fs::remove_file(&temporary);
            }
            break;
        }
        linked
    }
}

impl Drop for NewImage {
    fn drop(&mut self) {
        if let Some(temporary) = self.temporary.take() {
            // It is of no use.
            let _ = fs::remove_file(temporary);
        }
    }
}

fn proc_path(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A new file with a name that nothing has.
fn create_beside(path: &Path) -> io::Result<(PathBuf, File)> {
    let mut result = Err(io::ErrorKind::AlreadyExists.into());
    for _ in 0..ATTEMPTS {
        let temporary = temporary_name(path)?;
        let mut options = File::options();
        result = options.read(true).write(true).create_new(true).mode(0o600).open(&temporary);
        match &result {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            _ => return result.map(|file| (temporary, file)),
        }
    }
    result.map(|file| (path.to_owned(), file))
}

/// A name beside `path` that most likely nothing has.
fn temporary_name(path: &Path) -> io::Result<PathBuf> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    // Process ids are the same in every container, so that time decides, and O_EXCL.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let count = NEXT.fetch_add(1, Ordering::Relaxed);
    name.push(format!(".{:x}-{:x}-{count:x}.part", std::process::id(), now.as_nanos()));
    Ok(folder_of(path).join(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn names(folder: &Path) -> Vec<std::ffi::OsString> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }

    /// One without a name, and one with a temporary one.
    const KINDS: [fn(&Path) -> NewImage; 2] = [
        |path| NewImage::create(path).unwrap(),
        |path| {
            let (temporary, file) = create_beside(path).unwrap();
            NewImage { path: path.to_owned(), file, temporary: Some(temporary) }
        },
    ];

    #[test]
    fn an_image_replaces_another_once_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        for before in [None, Some(b"precious")] {
            for create in KINDS {
                let _ = fs::remove_file(&path);
                if let Some(before) = before {
                    fs::write(&path, before).unwrap();
                }
                let image = create(&path);
                image.file().write_all_at(b"whole", 0).unwrap();
                assert_eq!(fs::read(&path).ok().as_deref(), before.map(|before| &before[..]));
                image.commit().unwrap();
                assert_eq!(fs::read(&path).unwrap(), b"whole");
                assert_eq!(names(dir.path()), ["image"]);
            }
        }
    }

    #[test]
    fn an_image_that_is_dropped_leaves_nothing_but_what_had_the_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        fs::write(&path, b"precious").unwrap();
        for create in KINDS {
            let image = create(&path);
            image.file().write_all_at(b"half", 0).unwrap();
            drop(image);
            assert_eq!(names(dir.path()), ["image"]);
            assert_eq!(fs::read(&path).unwrap(), b"precious");
        }
    }

    #[test]
    fn an_image_that_cannot_get_its_name_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        // A folder is not replaced.
        fs::create_dir(&path).unwrap();
        for create in KINDS {
            create(&path).commit().unwrap_err();
            assert_eq!(names(dir.path()), ["image"]);
        }
        assert!(path.is_dir());
    }
}
