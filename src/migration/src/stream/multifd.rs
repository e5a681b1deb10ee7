//! The channels of QEMU's multifd: how each introduces itself, and packets of pages.

use ram_discard::ByteRange;
use vmstate::wire::{WireError, WireRead, WireWrite};

use super::{FormatError, PageBlocks, TARGET_PAGE_SIZE};

/// How a channel begins, and each of its packets.
pub const MULTIFD_MAGIC: u32 = 0x1122_3344;
const VERSION: u32 = 1;

/// The most pages of a packet: QEMU's 512 KiB.
pub const PACKET_PAGES: usize = 128;
/// Bytes of a packet before its payload, whatever it has.
#[cfg(test)]
const PACKET_HEAD: usize = 6 * 4 + 8 + 4 + UNUSED + NAME + PACKET_PAGES * 8;
/// The most bytes of a packet's payload: twice its pages, which is what QEMU makes room for where it compresses.
const PAYLOAD_MAX: usize = 2 * PACKET_PAGES * TARGET_PAGE_SIZE as usize;

/// Bytes of a greeting after the number of channels.
const GREETING_REST: usize = 6 + 4 * 8;
const UNUSED: usize = 4 + 3 * 8;
const NAME: usize = 256;

const SYNC: u32 = 1;
/// Which compression, as a number (QEMU's `MULTIFD_FLAG_COMPRESSION_MASK`).
const COMPRESSION: u32 = 0x1f << 1;
const ZSTD: u32 = 2 << 1;

/// How a channel introduces itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// Of the VM; the same on all channels.
    pub uuid: [u8; 16],
    /// Number of the channel, from 0.
    pub id: u8,
    /// How many there are; 0 where the source does not say, as QEMU.
    pub channels: u8,
}

impl Greeting {
    /// Bytes of it.
    pub const LEN: usize = 64;

    /// Appends it.
    pub fn put(&self, out: &mut Vec<u8>) {
        out.put_be32(MULTIFD_MAGIC);
        out.put_be32(VERSION);
        out.put(&self.uuid);
        out.put_u8(self.id);
        out.put_u8(self.channels);
        out.put(&[0; GREETING_REST]);
    }

    /// Reads it, from its magic number on.
    ///
    /// # Errors
    ///
    /// When it is of another protocol, or the channel ends or fails.
    pub fn read<R: WireRead + ?Sized>(reader: &mut R) -> Result<Self, FormatError> {
        expect(reader, "magic number of a multifd channel", MULTIFD_MAGIC)?;
        expect(reader, "version of a multifd channel", VERSION)?;
        let mut uuid = [0; 16];
        reader.read_exact(&mut uuid, "the UUID of a multifd channel")?;
        let id = reader.u8("the number of a multifd channel")?;
        let channels = reader.u8("the number of multifd channels")?;
        reader.skip(GREETING_REST as u64, "the greeting of a multifd channel")?;
        Ok(Self { uuid, id, channels })
    }
}

/// How the bytes of a packet's pages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// As they are.
    Plain,
    /// All of them together, compressed with zstd.
    Zstd,
}

/// What a packet has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketHead {
    /// Where it starts, bytes from the start of the channel.
    pub at: u64,
    /// Its number; each that a channel sends is greater than the one before.
    pub number: u64,
    /// Whether it ends a round: nothing more is read until all channels and the main one have come to it.
    pub sync: bool,
    /// Of the payload.
    pub encoding: Encoding,
    /// Id of the block that its pages are of.
    pub block: String,
    /// Pages with bytes.
    pub normal: usize,
    /// Pages of zeros.
    pub zero: usize,
    /// Bytes that follow.
    pub payload: usize,
}

impl PacketHead {
    /// Appends it. `offsets` are those of its normal pages, and then of its pages of zeros.
    ///
    /// # Panics
    ///
    /// When there are too many of them, or another number than it says, or the id is longer than 255 bytes.
    pub fn put(&self, offsets: &[u64], out: &mut Vec<u8>) {
        assert!(offsets.len() <= PACKET_PAGES && offsets.len() == self.normal + self.zero);
        assert!(self.block.len() < NAME, "the id of a block is short");
        let encoding = match self.encoding {
            Encoding::Plain => 0,
            Encoding::Zstd => ZSTD,
        };
        let short = |count: usize| u32::try_from(count).expect("a packet is small");
        out.put_be32(MULTIFD_MAGIC);
        out.put_be32(VERSION);
        out.put_be32(encoding | if self.sync { SYNC } else { 0 });
        out.put_be32(short(PACKET_PAGES));
        out.put_be32(short(self.normal));
        out.put_be32(short(self.payload));
        out.put_be64(self.number);
        out.put_be32(short(self.zero));
        out.put(&[0; UNUSED]);
        out.put(self.block.as_bytes());
        out.resize(out.len() + NAME - self.block.len(), 0);
        offsets.iter().for_each(|offset| out.put_be64(*offset));
        out.resize(out.len() + (PACKET_PAGES - offsets.len()) * 8, 0);
    }

    /// Whether it has pages.
    pub fn has_pages(&self) -> bool {
        self.normal + self.zero != 0
    }

    /// Bytes of its normal pages, when they are not compressed.
    pub fn plain_len(&self) -> usize {
        self.normal * TARGET_PAGE_SIZE as usize
    }
}

/// Reads packets, and keeps the offsets of one.
#[derive(Debug, Default)]
pub struct Packets {
    offsets: Vec<u64>,
    normal: usize,
}

impl Packets {
    /// Reads a packet up to its payload.
    ///
    /// # Errors
    ///
    /// When it is impossible, or the channel ends or fails.
    pub fn read_head<R: WireRead + ?Sized>(
        &mut self,
        reader: &mut R,
    ) -> Result<PacketHead, FormatError> {
        let at = reader.offset();
        expect(reader, "magic number of a packet", MULTIFD_MAGIC)?;
        expect(reader, "version of a packet", VERSION)?;
        let flags = reader.be32("the flags of a packet")?;
        let encoding = match flags & COMPRESSION {
            0 => Encoding::Plain,
            ZSTD => Encoding::Zstd,
            _ => {
                return Err(FormatError::value(
                    at,
                    "compression of a packet (zstd or none)",
                    flags,
                ));
            }
        };
        if flags & !(SYNC | COMPRESSION) != 0 {
            let what = "state of devices on multifd channels";
            return Err(FormatError::Unsupported { offset: at, what });
        }
        let allocated = reader.be32("the size of a packet")?;
        let normal = reader.be32("the pages of a packet")?;
        let payload = reader.be32("the payload of a packet")?;
        let number = reader.be64("the number of a packet")?;
        let zero = reader.be32("the pages of zeros of a packet")?;
        reader.skip(UNUSED as u64, "a packet")?;
        let mut name = [0; NAME];
        reader.read_exact(&mut name, "the block of a packet")?;
        let count = normal.checked_add(zero);
        let fits = |count: &u32| *count <= allocated && *count as usize <= PACKET_PAGES;
        let Some(count) = count.filter(fits) else {
            return Err(FormatError::value(at, "number of pages of a packet", normal.max(zero)));
        };
        let (normal, zero, payload) = (normal as usize, zero as usize, payload as usize);
        let plain = normal * TARGET_PAGE_SIZE as usize;
        let possible = match encoding {
            Encoding::Plain => payload == plain,
            Encoding::Zstd => payload <= PAYLOAD_MAX && (payload == 0) == (normal == 0),
        };
        if !possible {
            return Err(FormatError::value(at, "payload of a packet", payload as u64));
        }
        let len = name.iter().position(|byte| *byte == 0).unwrap_or(NAME);
        let what = "the block of a packet";
        let block = str::from_utf8(&name[..len])
            .map_err(|_| FormatError::Wire(WireError::NotText { offset: at, what }))?;
        self.offsets.clear();
        self.normal = normal;
        // There is room for as many offsets as a packet can have, whatever it has.
        for _ in 0..count {
            self.offsets.push(reader.be64("the offset of a page")?);
        }
        let unused = (PACKET_PAGES - self.offsets.len()) * 8;
        reader.skip(unused as u64, "the offsets of a packet")?;
        let sync = flags & SYNC != 0;
        let block = block.to_owned();
        Ok(PacketHead { at, number, sync, encoding, block, normal, zero, payload })
    }

    /// The block of the packet that was read, in which all of its pages lie.
    ///
    /// # Errors
    ///
    /// When there is no such block, or it does not have one of the pages.
    pub fn block<B>(&self, head: &PacketHead, blocks: &B) -> Result<usize, B::Error>
    where
        B: PageBlocks + ?Sized,
    {
        let block = blocks.find(&head.block, head.at)?;
        let used_length = blocks.used_length(block);
        for &offset in &self.offsets {
            let page = ByteRange::new(offset, TARGET_PAGE_SIZE);
            if page.is_none_or(|page| page.end() > used_length) {
                let id = blocks.id(block).to_owned();
                let (offset, page) = (head.at, offset);
                return Err(FormatError::PagePastEnd { offset, id, page, used_length }.into());
            }
            if !offset.is_multiple_of(TARGET_PAGE_SIZE) {
                let what = "offset of a page in a packet";
                return Err(FormatError::value(head.at, what, offset).into());
            }
        }
        Ok(block)
    }

    /// Runs of the normal pages of the packet whose block was found, in the order of their bytes.
    pub fn normal_runs(&self) -> impl Iterator<Item = ByteRange> {
        runs(&self.offsets[..self.normal])
    }

    /// Runs of its pages of zeros.
    pub fn zero_runs(&self) -> impl Iterator<Item = ByteRange> {
        runs(&self.offsets[self.normal..])
    }
}

fn runs(offsets: &[u64]) -> impl Iterator<Item = ByteRange> {
    let follows = |one: &u64, next: &u64| one.checked_add(TARGET_PAGE_SIZE) == Some(*next);
    let runs = offsets.chunk_by(follows);
    runs.filter_map(|run| ByteRange::new(run[0], run.len() as u64 * TARGET_PAGE_SIZE))
}

fn expect<R: WireRead + ?Sized>(
    reader: &mut R,
    what: &'static str,
    wanted: u32,
) -> Result<(), FormatError> {
    let at = reader.offset();
    match reader.be32(what)? {
        found if found == wanted => Ok(()),
        found => {
            let [first, second, ..] = found.to_be_bytes();
            let tls = at == 0 && super::is_tls([first, second]);
            Err(if tls { FormatError::Tls } else { FormatError::value(at, what, found) })
        }
    }
}

#[cfg(test)]
mod tests;
