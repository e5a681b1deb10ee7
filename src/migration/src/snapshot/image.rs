//! A snapshot under its name: whole, or not there.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, CWD, OFlags, linkat};
use rustix::io::Errno;

use crate::error::MigrationError;

/// How many names are tried for the file that is written.
const ATTEMPTS: usize = 16;

/// The longest name of a file, bytes (NAME_MAX).
const NAME_MAX: usize = 255;

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
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let failed = MigrationError::io("create a file for the snapshot");
    let image = NewImage::create(path).map_err(named).map_err(failed)?;
    write(image.file())?;
    image.commit().map_err(named).map_err(MigrationError::io("give the snapshot its name"))
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
    /// When the folder does not take a file, or what has the name is not a file that can be replaced.
    pub fn create(path: &Path) -> io::Result<Self> {
        check_name(path)?;
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

/// Refuses a name that no image can have, before the image is written for nothing. What is neither a file nor
/// a link to one is not given way to: a rename would put a file in the place of a device.
fn check_name(path: &Path) -> io::Result<()> {
    let refuse = |what| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    if path.file_name().is_none() {
        return refuse("a folder, not a file");
    }
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => refuse("a folder has its name"),
        Ok(found) if !found.is_file() && !found.is_symlink() => {
            refuse("a device, pipe or socket has its name")
        }
        // What is wrong with the folder is told by creating a file in it.
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::InvalidFilename => Err(error),
        Err(_) => Ok(()),
    }
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
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    // Process ids are the same in every container, so that time decides, and O_EXCL.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let count = NEXT.fetch_add(1, Ordering::Relaxed);
    let end = format!(".{:x}-{:x}-{count:x}.part", std::process::id(), now.as_nanos());
    // A long name leaves no room for it.
    let begin = name.len().min(NAME_MAX - end.len());
    let mut name = name.as_bytes()[..begin].to_vec();
    name.extend_from_slice(end.as_bytes());
    Ok(folder_of(path).join(OsString::from_vec(name)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, symlink};
    use std::os::unix::net::UnixListener;

    fn names(folder: &Path) -> Vec<OsString> {
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
        for create in KINDS {
            let image = create(&path);
            fs::create_dir(&path).unwrap();
            image.commit().unwrap_err();
            assert_eq!(names(dir.path()), ["image"]);
            fs::remove_dir(&path).unwrap();
        }
    }

    #[test]
    fn a_name_that_no_image_can_have_is_refused_before_one_is_written() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("folder")).unwrap();
        let _socket = UnixListener::bind(dir.path().join("socket")).unwrap();
        let long = "x".repeat(NAME_MAX + 1);
        for (name, why) in [
            ("folder", "a folder"),
            ("socket", "a device"),
            ("..", "a folder"),
            (&long, "too long"),
        ] {
            let refused = NewImage::create(&dir.path().join(name)).unwrap_err().to_string();
            assert!(refused.contains(why), "{name}: {refused}");
        }
        let path = dir.path().join("nowhere/image");
        let refused = write_image(&path, |_| unreachable!("there is no file")).unwrap_err();
        assert!(refused.to_string().contains(path.to_str().unwrap()), "{refused}");
        assert_eq!(names(dir.path()).len(), 2);
    }

    #[test]
    fn an_image_may_have_a_long_name_also_when_it_replaces_another() {
        let dir = tempfile::tempdir().unwrap();
        let name = "x".repeat(NAME_MAX);
        let path = dir.path().join(&name);
        for create in KINDS {
            for _ in 0..2 {
                create(&path).commit().unwrap();
                assert_eq!(names(dir.path()), [&*name]);
            }
        }
    }

    #[test]
    fn a_link_gives_way_to_an_image_and_what_it_leads_to_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("image"), dir.path().join("other"));
        fs::write(&other, b"precious").unwrap();
        for create in KINDS {
            let _ = fs::remove_file(&path);
            symlink(&other, &path).unwrap();
            create(&path).commit().unwrap();
            assert!(fs::symlink_metadata(&path).unwrap().is_file());
            assert_eq!(fs::read(&other).unwrap(), b"precious");
        }
    }
}
