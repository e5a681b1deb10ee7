//! A snapshot under its name: whole, or not there.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

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
    let (temporary, file) =
        create_beside(path).map_err(MigrationError::io("create a file for the snapshot"))?;
    let named = write(&file).and_then(|()| {
        file.sync_all().map_err(MigrationError::io("sync the snapshot"))?;
        std::fs::rename(&temporary, path).map_err(MigrationError::io("give the snapshot its name"))
    });
    if named.is_err() {
        // It is of no use.
        let _ = std::fs::remove_file(&temporary);
        return named;
    }
    let folder = File::open(folder_of(path));
    let synced = folder.and_then(|folder| folder.sync_all());
    synced.map_err(MigrationError::io("sync the folder of the snapshot"))
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A new file with a name that nothing has.
fn create_beside(path: &Path) -> io::Result<(PathBuf, File)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut result = Err(io::ErrorKind::AlreadyExists.into());
    for _ in 0..ATTEMPTS {
        // Process ids are the same in every container, so that time decides, and O_EXCL.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let count = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut temporary = name.to_owned();
        temporary.push(format!(".{:x}-{:x}-{count:x}.part", std::process::id(), now.as_nanos()));
        let temporary = folder_of(path).join(temporary);
        let mut options = File::options();
        result = options.read(true).write(true).create_new(true).mode(0o600).open(&temporary);
        match &result {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            _ => return result.map(|file| (temporary, file)),
        }
    }
    result.map(|file| (path.to_owned(), file))
}
