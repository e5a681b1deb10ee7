//! Records of pages as they are read: what a header, the id of a block and an offset may be.
//!
//! Every reader of pages takes them off its stream by this, so that one place decides which are possible.

use ram_discard::ByteRange;
use vmstate::wire::{WireError, WireRead};

use super::{FormatError, PageHeader, PageKind, TARGET_PAGE_SIZE};

/// What a record's id is called in an error.
const ID: &str = "the id of a RAM block";

/// The blocks that pages are of.
pub trait PageBlocks {
    /// Why pages are refused.
    type Error: From<FormatError>;

    /// Number of the block of that id; `at` is where its record stands on the stream.
    ///
    /// # Errors
    ///
    /// When there is no such block, or no pages of it are taken.
    fn find(&self, id: &str, at: u64) -> Result<usize, Self::Error>;

    /// Id of a block that was found.
    fn id(&self, block: usize) -> &str;

    /// Its used length, bytes.
    fn used_length(&self, block: usize) -> u64;
}

/// A record of a section of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageRecord {
    /// A page.
    Page {
        /// Number of its block.
        block: usize,
        /// Zeros, or bytes that follow.
        kind: PageKind,
        /// Which page: [`TARGET_PAGE_SIZE`] bytes within the block, at a multiple of that.
        page: ByteRange,
    },
    /// A list of blocks of that many bytes in all follows.
    List {
        /// Sum of the used lengths, bytes.
        total: u64,
    },
    /// Pages on other channels are to be waited for. Nothing to do with a single channel.
    Flush,
    /// The section ends.
    EndOfSection,
}

/// Reads the records of one channel. A record without an id is of the block of the record before it.
#[derive(Clone, Copy, Debug, Default)]
pub struct PageRecords {
    current: Option<usize>,
}

/// A record whose block is not looked up yet.
struct Raw<'a> {
    header: PageHeader,
    id: Option<&'a [u8]>,
    /// What a page of zeros is filled with.
    fill: u8,
    /// Its length without the bytes of a page.
    len: usize,
}

/// Why there is no record.
enum Missing {
    /// So many bytes are needed, from the start of the record.
    Bytes(usize),
    Impossible(FormatError),
}

impl PageRecords {
    /// On a channel on which nothing was read, or at the start of a section that may not continue the
    /// one before.
    pub const fn new() -> Self {
        Self { current: None }
    }

    /// Takes the next record off `reader`. Where a page has bytes, they are what comes next.
    ///
    /// # Errors
    ///
    /// When the record is impossible, its block is refused, or the stream ends or fails.
    pub fn read<B, R>(&mut self, reader: &mut R, blocks: &B) -> Result<PageRecord, B::Error>
    where
        B: PageBlocks + ?Sized,
        R: WireRead + ?Sized,
    {
        let at = reader.offset();
        let (mut needed, mut what) = (PageHeader::LEN, "the header of a page");
        let raw = loop {
            match Raw::parse(reader.peek(needed, what).map_err(FormatError::from)?, at) {
                Ok(raw) => break raw,
                Err(Missing::Bytes(more)) => (needed, what) = (more, ID),
                Err(Missing::Impossible(error)) => return Err(error.into()),
            }
        };
        let record = self.resolve(&raw, at, blocks)?;
        let len = raw.len;
        reader.take(len);
        Ok(record)
    }

    /// The record that `bytes` start with, at byte `at` of the stream, and its length without the bytes
    /// of a page, which are there too. `None` when it is not whole; it has no effect then.
    ///
    /// # Errors
    ///
    /// When the record is impossible, or its block is refused.
    #[inline]
    pub fn parse<B>(
        &mut self,
        bytes: &[u8],
        at: u64,
        blocks: &B,
    ) -> Result<Option<(PageRecord, usize)>, B::Error>
    where
        B: PageBlocks + ?Sized,
    {
        match self.parse_usual(bytes, blocks) {
            Some(record) => Ok(Some(record)),
            None => self.parse_any(bytes, at, blocks),
        }
    }

    /// A whole page of the block of the record before, as nearly all records are. Anything else, and all that
    /// is wrong, is for [`parse_any`](Self::parse_any).
    #[inline]
    fn parse_usual<B>(&self, bytes: &[u8], blocks: &B) -> Option<(PageRecord, usize)>
    where
        B: PageBlocks + ?Sized,
    {
        let block = self.current?;
        let word = u64::from_be_bytes(*bytes.first_chunk::<{ PageHeader::LEN }>()?);
        let (kind, offset) = PageHeader::continued_page(word)?;
        let len = match kind {
            PageKind::Normal if bytes.len() - PageHeader::LEN < TARGET_PAGE_SIZE as usize => {
                return None;
            }
            PageKind::Normal => PageHeader::LEN,
            PageKind::Zero if *bytes.get(PageHeader::LEN)? != 0 => return None,
            PageKind::Zero => PageHeader::LEN + 1,
        };
        let page = ByteRange::new(offset, TARGET_PAGE_SIZE)?;
        let is_inside = page.end() <= blocks.used_length(block);
        is_inside.then_some((PageRecord::Page { block, kind, page }, len))
    }

    #[inline(never)]
    fn parse_any<B>(
        &mut self,
        bytes: &[u8],
        at: u64,
        blocks: &B,
    ) -> Result<Option<(PageRecord, usize)>, B::Error>
    where
        B: PageBlocks + ?Sized,
    {
        let raw = match Raw::parse(bytes, at) {
            Ok(raw) if bytes.len() - raw.len >= raw.content() => raw,
            Ok(_) | Err(Missing::Bytes(_)) => return Ok(None),
            Err(Missing::Impossible(error)) => return Err(error.into()),
        };
        Ok(Some((self.resolve(&raw, at, blocks)?, raw.len)))
    }

    #[inline]
    fn resolve<B>(&mut self, raw: &Raw<'_>, at: u64, blocks: &B) -> Result<PageRecord, B::Error>
    where
        B: PageBlocks + ?Sized,
    {
        let (kind, offset) = match raw.header {
            PageHeader::Page { kind, offset, .. } => (kind, offset),
            PageHeader::List { total } => return Ok(PageRecord::List { total }),
            PageHeader::Flush => return Ok(PageRecord::Flush),
            PageHeader::EndOfSection => return Ok(PageRecord::EndOfSection),
        };
        if let Some(id) = raw.id {
            let offset = at + PageHeader::LEN as u64;
            let id = str::from_utf8(id)
                .map_err(|_| FormatError::Wire(WireError::NotText { offset, what: ID }))?;
            self.current = Some(blocks.find(id, at)?);
        }
        let block = self.current.ok_or(FormatError::NoBlock { offset: at })?;
        // An offset may be any multiple of the page size.
        let used_length = blocks.used_length(block);
        let page =
            ByteRange::new(offset, TARGET_PAGE_SIZE).filter(|page| page.end() <= used_length);
        let Some(page) = page else {
            let id = blocks.id(block).to_owned();
            return Err(
                FormatError::PagePastEnd { offset: at, id, page: offset, used_length }.into()
            );
        };
        match raw.fill {
            0 => Ok(PageRecord::Page { block, kind, page }),
            fill => Err(FormatError::Fill { offset: at, fill }.into()),
        }
    }
}

impl<'a> Raw<'a> {
    #[inline]
    fn parse(bytes: &'a [u8], at: u64) -> Result<Self, Missing> {
        let Some(word) = bytes.first_chunk::<{ PageHeader::LEN }>() else {
            return Err(Missing::Bytes(PageHeader::LEN));
        };
        let header =
            PageHeader::parse(u64::from_be_bytes(*word), at).map_err(Missing::Impossible)?;
        let mut len = PageHeader::LEN;
        let PageHeader::Page { kind, continued, .. } = header else {
            return Ok(Self { header, id: None, fill: 0, len });
        };
        let mut id = None;
        if !continued {
            let start = len + 1;
            let id_len = *bytes.get(len).ok_or(Missing::Bytes(start))?;
            len = start + usize::from(id_len);
            id = Some(bytes.get(start..len).ok_or(Missing::Bytes(len))?);
        }
        let mut fill = 0;
        if kind == PageKind::Zero {
            fill = *bytes.get(len).ok_or(Missing::Bytes(len + 1))?;
            len += 1;
        }
        Ok(Self { header, id, fill, len })
    }

    /// Bytes of a page that follow.
    #[inline]
    fn content(&self) -> usize {
        match self.header {
            PageHeader::Page { kind: PageKind::Normal, .. } => TARGET_PAGE_SIZE as usize,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use vmstate::wire::{WireReader, WireWrite};

    use super::*;
    use crate::stream::put_end_of_section;

    const PAGE: u64 = TARGET_PAGE_SIZE;

    /// Blocks of 4 pages; no pages are taken of "shared".
    struct Blocks;

    impl PageBlocks for Blocks {
        type Error = FormatError;

        fn find(&self, id: &str, at: u64) -> Result<usize, FormatError> {
            match id {
                "ram" => Ok(0),
                "" => Ok(2),
                _ => Err(FormatError::Configuration { offset: at, name: id.to_owned() }),
            }
        }

        fn id(&self, block: usize) -> &str {
            ["ram", "shared", ""][block]
        }

        fn used_length(&self, _block: usize) -> u64 {
            4 * PAGE
        }
    }

    fn put(out: &mut Vec<u8>, kind: PageKind, page: u64, id: Option<&str>) {
        out.put_be64(PageHeader::page_word(kind, page * PAGE, id.is_none()));
        id.into_iter().for_each(|id| out.put_name(id));
        match kind {
            PageKind::Zero => out.put_u8(0),
            PageKind::Normal => out.put(&[7; PAGE as usize]),
        }
    }

    fn page(block: usize, kind: PageKind, page: u64) -> PageRecord {
        PageRecord::Page { block, kind, page: ByteRange::new(page * PAGE, PAGE).unwrap() }
    }

    /// All that is in `bytes`, by both ways of reading, and what ended it.
    fn records(bytes: &[u8]) -> (Vec<PageRecord>, Option<String>) {
        let (mut read, mut reader) = (Vec::new(), WireReader::new(bytes));
        let mut records = PageRecords::new();
        let error = loop {
            match records.read(&mut reader, &Blocks) {
                Ok(PageRecord::Page { kind: PageKind::Normal, block, page }) => {
                    let mut content = [0; PAGE as usize];
                    if let Err(error) = reader.read_exact(&mut content, "a page") {
                        break FormatError::from(error);
                    }
                    assert_eq!(content, [7; PAGE as usize]);
                    read.push(PageRecord::Page { kind: PageKind::Normal, block, page });
                }
                Ok(record) => read.push(record),
                Err(error) => break error,
            }
        };
        let (mut parsed, mut done) = (Vec::new(), 0);
        let mut records = PageRecords::new();
        let refused = loop {
            match records.parse(&bytes[done..], done as u64, &Blocks) {
                Ok(Some((record, len))) => {
                    parsed.push(record);
                    done += len;
                    if let PageRecord::Page { kind: PageKind::Normal, .. } = record {
                        done += PAGE as usize;
                    }
                }
                Ok(None) => break None,
                Err(error) => break Some(error.to_string()),
            }
        };
        assert_eq!(read, parsed);
        let truncated = matches!(error, FormatError::Wire(WireError::Truncated { .. }));
        assert_eq!(refused, (!truncated).then(|| error.to_string()));
        (read, refused)
    }

    #[test]
    fn a_section_cut_anywhere_gives_the_records_that_are_whole() {
        let mut bytes = Vec::new();
        let mut whole = vec![(0, None)];
        let mut push = |bytes: &Vec<u8>, record| whole.push((bytes.len(), Some(record)));
        for (kind, nth, block, id) in [
            (PageKind::Zero, 3, 0, Some("ram")),
            (PageKind::Normal, 0, 0, None),
            (PageKind::Normal, 1, 2, Some("")),
            (PageKind::Zero, 2, 2, None),
        ] {
            put(&mut bytes, kind, nth, id);
            push(&bytes, page(block, kind, nth));
        }
        bytes.put_be64(0x200);
        push(&bytes, PageRecord::Flush);
        bytes.put_be64(0x4000_0004);
        push(&bytes, PageRecord::List { total: 0x4000_0000 });
        put_end_of_section(&mut bytes);
        push(&bytes, PageRecord::EndOfSection);
        for cut in 0..=bytes.len() {
            let expected: Vec<_> =
                whole.iter().filter(|(end, _)| *end <= cut).filter_map(|(_, r)| *r).collect();
            assert_eq!(records(&bytes[..cut]), (expected, None), "cut at {cut}");
        }
    }

    #[test]
    fn impossible_records_are_refused_by_name_where_they_stand() {
        let mut before = Vec::new();
        put(&mut before, PageKind::Zero, 0, Some("ram"));
        let at = format!("{:#x}", before.len());
        let record = |word: u64, rest: &[u8]| [&word.to_be_bytes(), rest].concat();
        for (bytes, what) in [
            (
                record((4 * PAGE) | 0x22, &[0]),
                "a page at 0x4000 of block \"ram\" is past its end: the block has 0x4000",
            ),
            (record(!(PAGE - 1) | 0x22, &[0]), "a page at 0xfffffffffffff000 of block \"ram\""),
            (record(0x22, &[9]), "filled with 0x9"),
            (record(0x02, b"\x05other\0"), "\"other\""),
            (record(0x02, b"\x06shared\0"), "\"shared\""),
            (record(0x40, &[]), "XBZRLE pages are not supported"),
            (record(0x80, &[]), "RDMA pages are not supported"),
            (record(0x100, &[]), "flags of a page"),
            (record(0x0a, &[]), "flags of a page"),
        ] {
            let (read, refused) = records(&[before.as_slice(), &bytes].concat());
            let refused = refused.unwrap();
            assert_eq!(read, [page(0, PageKind::Zero, 0)]);
            assert!(refused.contains(what) && refused.contains(&at), "{refused}");
        }
        let (_, refused) = records(&[before.as_slice(), &record(0x02, b"\x01\xff\0")].concat());
        assert!(refused.unwrap().contains("is not text"));
        let (read, refused) = records(&record(0x22, &[0]));
        assert!(read.is_empty() && refused.unwrap().contains("a page that continues no block"));
    }
}
