//! Names of files that are being made, and the removal of those that a killed daemon has left.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::lock;

/// Between the name of the state file and the digits.
const MARK: &str = ".new-";
const DIGITS: usize = 16;

/// A name beside `path` that no other process uses.
pub(super) fn new_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    let random = RandomState::new().build_hasher().finish();
    name.push(format!("{MARK}{random:0DIGITS$x}"));
    name.into()
}

/// Removes what daemons that were killed have left beside `path`, which is `held` and locked here: no
/// other daemon makes a file for it then that it could keep. A file that is locked is being made, and
/// left alone, as is anything that is not a file.
///
/// The start does not depend on it: an error is logged.
pub(super) fn remove(path: &Path, held: &File) {
    let removed = || -> io::Result<()> {
        let path = fs::canonicalize(path)?;
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if is_new_name(&entry.file_name(), name) {
                remove_one(&entry.path(), held)?;
            }
        }
        Ok(())
    };
    if let Err(error) = removed() {
        let path = path.display();
        tracing::warn!(%error, %path, "cannot remove what a killed daemon left beside the state file");
    }
}

fn is_new_name(name: &OsStr, of: &OsStr) -> bool {
    let rest = name.as_bytes().strip_prefix(of.as_bytes());
    let digits = rest.and_then(|rest| rest.strip_prefix(MARK.as_bytes()));
    let is_digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    digits.is_some_and(|digits| digits.len() == DIGITS && digits.iter().all(is_digit))
}

fn remove_one(path: &Path, held: &File) -> io::Result<()> {
    let identity = |metadata: &fs::Metadata| (metadata.dev(), metadata.ino());
    let metadata = fs::symlink_metadata(path)?;
    if !metadata.is_file() {
        return Ok(());
    }
    // The state file itself has the name as well, where it got its own by a link.
    if identity(&metadata) != identity(&held.metadata()?) {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file =
            OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path)?;
        if lock(&file, path).is_err() || identity(&file.metadata()?) != identity(&metadata) {
            return Ok(());
        }
    }
    fs::remove_file(path)?;
    tracing::info!(path = %path.display(), "removed a state file that a killed daemon did not finish");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_are_made_here_are_taken_for_such() {
        let name = new_name(Path::new("/run/state"));
        assert!(is_new_name(name.file_name().unwrap(), OsStr::new("state")), "{}", name.display());
        let hex = "0123456789abcdef";
        let cases = [
            (format!("state.new-{hex}"), true),
            (format!("state.new-{hex}0"), false),
            ("state.new-0123456789ABCDEF".to_owned(), false),
            ("state.new-".to_owned(), false),
            ("state".to_owned(), false),
            (format!("state2.new-{hex}"), false),
            (format!("other.new-{hex}"), false),
            (format!("state.new-{hex}.new-{hex}"), false),
        ];
        for (name, expected) in cases {
            assert_eq!(is_new_name(OsStr::new(&name), OsStr::new("state")), expected, "{name}");
        }
    }
}
