//! The state file of a Firecracker snapshot, as far as its format is known to others than Firecracker.
//!
//! It ends with a CRC-64 of what is before it. What that is, columns of bits without names or lengths (bitcode), only
//! the release that has written it can tell: so nothing here says which memory is plugged.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::PagerError;

/// Bytes of a state file that Firecracker reads at most.
const LEN_MAX: u64 = 10_000_000;

/// A state file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateFile {
    /// Its length, bytes.
    pub len: u64,
    /// Its checksum matches.
    pub is_whole: bool,
}

impl StateFile {
    /// Reads one.
    ///
    /// # Errors
    ///
    /// When it cannot be read, or cannot be a state file by its length.
    pub fn read(path: &Path) -> Result<Self, PagerError> {
        let failed = || PagerError::file("read the snapshot's state from", path);
        let file = File::open(path).map_err(failed())?;
        let mut bytes = Vec::new();
        file.take(LEN_MAX + 1).read_to_end(&mut bytes).map_err(failed())?;
        let len = bytes.len() as u64;
        if len <= size_of::<u64>() as u64 || len > LEN_MAX {
            let what = format!(
                "not a state file of Firecracker, which has 9 to {LEN_MAX} bytes; the snapshot's memory is given \
                 with --memory-file"
            );
            return Err(PagerError::Image { path: path.to_owned(), what });
        }
        Ok(Self { len, is_whole: crc64(&bytes) == 0 })
    }

    /// What is odd about it.
    pub fn warning(&self, path: &Path) -> Option<String> {
        (!self.is_whole).then(|| {
            let path = path.display();
            format!(
                "{path}: not a whole state file of Firecracker, as far as its checksum tells; Firecracker may refuse it"
            )
        })
    }
}

/// CRC-64 (Jones). 0 for what ends with its own.
fn crc64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |crc, byte| {
        (0..8).fold(crc ^ u64::from(*byte), |crc, _| {
            (crc >> 1) ^ if crc & 1 == 1 { 0x95ac_9329_ac4b_c9b5 } else { 0 }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_jones_and_found_at_the_end() {
        assert_eq!(crc64(b"123456789"), 0xe9c6_d914_c4b8_d9ca);
        let mut bytes = b"123456789".to_vec();
        bytes.extend(crc64(&bytes).to_le_bytes());
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        let whole = StateFile::read(file.path()).unwrap();
        assert_eq!(whole, StateFile { len: 17, is_whole: true });
        assert_eq!(whole.warning(file.path()), None);
        bytes[3] ^= 1;
        std::fs::write(file.path(), &bytes).unwrap();
        let damaged = StateFile::read(file.path()).unwrap();
        assert!(damaged.warning(file.path()).unwrap().contains("not a whole state file"));
    }

    #[test]
    fn what_cannot_be_one_by_its_length_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for len in [0, 8, LEN_MAX + 1] {
            file.as_file().set_len(len).unwrap();
            let error = StateFile::read(file.path()).unwrap_err().to_string();
            assert!(error.contains("not a state file"), "{len}: {error}");
        }
    }
}
