//! What stands for compression where the crate is built without it: a refusal.

use std::convert::Infallible;

use crate::error::MigrationError;
use crate::stream::CAPABILITY_MULTIFD_ZSTD;

/// Fails: pages are neither compressed nor decompressed here.
pub(super) fn available() -> Result<Infallible, MigrationError> {
    let what = format!(
        "the configuration has the capability {CAPABILITY_MULTIFD_ZSTD}, and the engine was built \
         without zstd: build it with the feature `zstd`, or switch the capability off"
    );
    Err(MigrationError::NotPossible(what))
}

/// There is none.
pub(super) enum Compressor {}

/// There is none.
pub(super) enum Decompressor {}

impl Compressor {
    pub(super) fn new() -> Result<Self, MigrationError> {
        match available() {
            Err(error) => Err(error),
            Ok(never) => match never {},
        }
    }

    pub(super) fn compress(
        &mut self,
        _level: u8,
        _len: usize,
        _copy: impl FnOnce(&mut [u8]),
    ) -> Result<Option<usize>, MigrationError> {
        match *self {}
    }

    pub(super) fn compressed(&self, _len: usize) -> &[u8] {
        match *self {}
    }
}

impl Decompressor {
    pub(super) fn new() -> Result<Self, MigrationError> {
        match available() {
            Err(error) => Err(error),
            Ok(never) => match never {},
        }
    }

    pub(super) fn payload(&mut self, _len: usize) -> &mut [u8] {
        match *self {}
    }

    pub(super) fn decompress(&mut self, _pages: &mut Vec<u8>, _len: usize) -> Result<(), String> {
        match *self {}
    }

    pub(super) fn restart(&mut self) {
        match *self {}
    }
}

#[cfg(test)]
mod tests {
    use crate::ram::channels::check;
    use crate::stream::{CAPABILITY_MULTIFD, CAPABILITY_MULTIFD_ZSTD, Configuration};

    #[test]
    fn compression_is_refused_where_it_was_not_built() {
        let mut configuration = Configuration::new("test");
        configuration.uuid = Some([1; 16]);
        configuration.capabilities = vec![CAPABILITY_MULTIFD.to_owned()];
        check(Some(2), &configuration).unwrap();
        configuration.capabilities.push(CAPABILITY_MULTIFD_ZSTD.to_owned());
        let error = check(Some(2), &configuration).unwrap_err().to_string();
        assert!(error.contains("build it with the feature `zstd`"), "{error}");
    }
}
