//! Pages that are compressed with zstd: one stream a channel, of which each packet has what goes up to a flush,
//! as QEMU's.
//!
//! A packet that compression does not make smaller goes as it is. The stream of its channel ends there on both
//! sides, and the next packet that is compressed begins another.

use std::io;

use zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd_safe::{
    CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer, ResetDirective, get_error_name,
};

use crate::error::MigrationError;
use crate::stream::{PACKET_PAGES, TARGET_PAGE_SIZE};

const PACKET_BYTES: usize = PACKET_PAGES * TARGET_PAGE_SIZE as usize;

/// log2 of how far back a stream refers: four packets. What the destination keeps of each channel is of this size,
/// and not of one that the source says.
const WINDOW_LOG: u32 = 21;

/// What a decompressor says that it wants next at the end of a packet: the header of a block, or of a stream.
const BETWEEN_BLOCKS: [usize; 2] = [3, 0];

/// Succeeds: pages can be compressed and decompressed here.
pub(super) fn available() -> Result<(), MigrationError> {
    Ok(())
}

/// The source's side of a channel.
pub(super) struct Compressor {
    context: CCtx<'static>,
    /// Some of a stream was sent.
    in_stream: bool,
    /// Of that stream.
    level: Option<u8>,
    /// The pages of a packet.
    pages: Vec<u8>,
    /// What they are compressed to.
    out: Vec<u8>,
}

impl Compressor {
    pub(super) fn new() -> Result<Self, MigrationError> {
        let mut context = CCtx::try_create().ok_or_else(no_memory)?;
        checked(context.set_parameter(CParameter::WindowLog(WINDOW_LOG)))?;
        let (pages, out) = (vec![0; PACKET_BYTES], vec![0; PACKET_BYTES]);
        Ok(Self { context, in_stream: false, level: None, pages, out })
    }

    /// Compresses `len` bytes of pages, which `copy` puts where it is told; to how many bytes. `None` when that
    /// does not make them fewer: they have to go as they are.
    ///
    /// A stream has one level, so it ends with the packet behind which there is another.
    pub(super) fn compress(
        &mut self,
        level: u8,
        len: usize,
        copy: impl FnOnce(&mut [u8]),
    ) -> Result<Option<usize>, MigrationError> {
        let pages = &mut self.pages[..len];
        copy(pages);
        if !self.in_stream && self.level != Some(level) {
            checked(self.context.set_parameter(CParameter::CompressionLevel(level.into())))?;
            self.level = Some(level);
        }
        let ends = self.level != Some(level);
        let until = match ends {
            true => ZSTD_EndDirective::ZSTD_e_end,
            false => ZSTD_EndDirective::ZSTD_e_flush,
        };
        let mut input = InBuffer::around(pages);
        let mut output = OutBuffer::around(&mut self.out[..len - 1]);
        loop {
            let left = checked(self.context.compress_stream2(&mut output, &mut input, until))?;
            if left == 0 {
                self.in_stream = !ends;
                return Ok(Some(output.pos()));
            }
            if output.pos() == output.capacity() {
                checked(self.context.reset(ResetDirective::SessionOnly))?;
                self.in_stream = false;
                return Ok(None);
            }
        }
    }

    /// The bytes that were made last.
    pub(super) fn compressed(&self, len: usize) -> &[u8] {
        &self.out[..len]
    }
}

/// The destination's side of a channel.
pub(super) struct Decompressor {
    context: DCtx<'static>,
    payload: Vec<u8>,
}

impl Decompressor {
    pub(super) fn new() -> Result<Self, MigrationError> {
        let mut context = DCtx::try_create().ok_or_else(no_memory)?;
        checked(context.set_parameter(DParameter::WindowLogMax(WINDOW_LOG)))?;
        Ok(Self { context, payload: Vec::with_capacity(PACKET_BYTES) })
    }

    /// Where the `len` bytes of the next packet's payload go.
    pub(super) fn payload(&mut self, len: usize) -> &mut [u8] {
        self.payload.resize(len, 0);
        &mut self.payload
    }

    /// Decompresses the payload to `pages`, `len` bytes of them, and no more than one beyond that.
    ///
    /// # Errors
    ///
    /// What is wrong with it. What is in `pages` then is not to be used, and the channel ends.
    pub(super) fn decompress(&mut self, pages: &mut Vec<u8>, len: usize) -> Result<(), String> {
        pages.resize(len + 1, 0);
        let mut input = InBuffer::around(&self.payload);
        let mut output = OutBuffer::around(&mut pages[..]);
        let mut wants = 0;
        // Each turn reads or writes some, or is the last.
        loop {
            let before = (input.pos(), output.pos());
            if output.pos() > len {
                return Err(format!("they are compressed, and more than its {len} bytes of pages"));
            }
            let wanted = self.context.decompress_stream(&mut output, &mut input);
            let wanted = wanted.map_err(|code| format!("zstd: {}", get_error_name(code)))?;
            if (input.pos(), output.pos()) == before {
                break;
            }
            wants = wanted;
        }
        let came = output.pos();
        if came != len || !BETWEEN_BLOCKS.contains(&wants) {
            return Err(format!(
                "they are compressed, and end within a block, after {came} of {len} bytes"
            ));
        }
        pages.truncate(len);
        Ok(())
    }

    /// Pages came as they are: what is compressed next begins a stream.
    pub(super) fn restart(&mut self) {
        // Fails for parameters, which this leaves alone, and for nothing else.
        let _ = self.context.reset(ResetDirective::SessionOnly);
    }
}

fn no_memory() -> MigrationError {
    MigrationError::io("compress pages")(io::ErrorKind::OutOfMemory.into())
}

fn checked(result: zstd_safe::SafeResult) -> Result<usize, MigrationError> {
    result.map_err(|code| {
        MigrationError::io("compress pages")(io::Error::other(get_error_name(code)))
    })
}

#[cfg(test)]
mod tests;
