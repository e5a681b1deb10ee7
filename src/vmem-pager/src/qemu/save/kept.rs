//! What is kept of a guest that its source gives away before all of its memory is here (postcopy): everything but its
//! memory, which the source has until the end, and sends again.
//!
//! It is a file beside the image, `IMAGE.recover`: a stream as QEMU writes it to a file, without a page.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use migration::snapshot::NewImage;
use migration::stream::{
    BlockEntry, BlockList, Configuration, SectionHeader, SectionKind, put_continued,
    put_end_of_section, put_eof, put_footer, put_header, put_list, put_section,
};

use super::package::PACKAGE_MAX;
use crate::error::PagerError;

/// A package, and what stands before pages.
const KEPT_MAX: u64 = 2 * PACKAGE_MAX;

/// What is kept of the guest of an image, for a save and for its recovery.
pub(super) struct Kept {
    /// Where.
    pub path: PathBuf,
    /// What was kept before, of a save that is continued.
    pub bytes: Option<Vec<u8>>,
}

impl Kept {
    /// Of a guest that is saved to `image`, or whose save there is continued.
    ///
    /// # Errors
    ///
    /// When there is nothing to continue, or when the save of another guest there is to be.
    pub fn of(image: &Path, recover: bool) -> Result<Self, PagerError> {
        let path = path_of(image);
        if recover {
            let bytes = Some(read(&path)?);
            return Ok(Self { path, bytes });
        }
        if path.exists() {
            let path = path.display();
            return Err(PagerError::Usage(format!(
                "{path} has the devices of a guest whose save to this image broke off in postcopy: finish it with \
                 --recover, choose another image, or remove the file, with which that guest is given up"
            )));
        }
        Ok(Self { path, bytes: None })
    }
}

fn path_of(image: &Path) -> PathBuf {
    let mut path = image.as_os_str().to_owned();
    path.push(".recover");
    path.into()
}

/// Everything up to the pages.
pub(super) fn put_head(
    out: &mut Vec<u8>,
    configuration: &Configuration,
    early: &[u8],
    ram: &SectionHeader,
    list: &BlockList,
) {
    put_header(out, configuration);
    out.extend_from_slice(early);
    put_section(out, ram);
    let plain = list.entries.iter().map(|entry| BlockEntry { page_size: None, ..entry.clone() });
    put_list(out, &BlockList { entries: plain.collect() });
    put_end_of_section(out);
    put_footer(out, ram.section_id);
    put_continued(out, SectionKind::End, ram.section_id);
    put_end_of_section(out);
    put_footer(out, ram.section_id);
}

/// And what follows them.
pub(super) fn put_tail(out: &mut Vec<u8>, state: &[u8]) {
    out.extend_from_slice(state);
    put_eof(out);
}

/// Writes it, onto the disk.
///
/// # Errors
///
/// When the disk does not take it.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), PagerError> {
    let failed = || PagerError::file("write", path);
    let file = NewImage::create(path).map_err(failed())?;
    file.file().write_all_at(bytes, 0).map_err(failed())?;
    file.commit().map_err(failed())
}

/// Reads it.
///
/// # Errors
///
/// When there is none.
fn read(path: &Path) -> Result<Vec<u8>, PagerError> {
    let failed = || PagerError::file("read", path);
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed())?;
    file.take(KEPT_MAX + 1).read_to_end(&mut bytes).map_err(failed())?;
    if bytes.len() as u64 > KEPT_MAX {
        return Err(failed()(io::ErrorKind::FileTooLarge.into()));
    }
    Ok(bytes)
}

/// Removes it, if there is one. It is of no use any more.
pub(super) fn remove(path: &Path) {
    let _ = fs::remove_file(path);
}
