//! The message of a VMM that says to be Firecracker, the events of its userfaultfd, and the states that a pager has left.
//!
//! What is promised: no panic; regions that are accepted cover the memory file, each byte once, in whole pages that do
//! not overlap in the VMM; a message that is cut is not complete, whatever follows; states that are not
//! whole are refused; of layers the topmost with data is read; a page that a removal covers as a whole is zeros, and
//! no other page is touched.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::LazyLock;

use migration::lazy::vmm_faults::{Event, MESSAGE_LEN};
use rustix::fs::{MemfdFlags, memfd_create};
use vmem_pager::firecracker::guest::{Guest, MESSAGES, State};
use vmem_pager::firecracker::memory_files::MemoryFiles;
use vmem_pager::firecracker::message::parse;

const PAGE: u64 = 4096;

/// A right message for a memory file of 64 KiB.
pub const GOOD: &str = r#"[{"base_host_virt_addr":1048576,"size":16384,"offset":0,"page_size":4096},
{"base_host_virt_addr":65536,"size":49152,"offset":16384,"page_size_kib":4096,"newer":[{}]}]"#;

/// The body of the target: what it is, the length of the memory file in pages, and the bytes.
pub fn run(data: &[u8]) {
    let [kind, pages, bytes @ ..] = data else { return };
    let len = (u64::from(*pages) + 1) * PAGE;
    match kind % 5 {
        0 => message(bytes, len),
        1 => bytes.as_chunks::<MESSAGE_LEN>().0.iter().for_each(|message| {
            assert_eq!(Event::decode(message).is_none(), message[0] == 0);
        }),
        2 => left(bytes, len),
        3 => layers(bytes, len),
        _ => removals(bytes),
    }
}

fn message(bytes: &[u8], len: u64) {
    let Ok(Some(regions)) = parse(bytes, len) else { return };
    let mut end = 0;
    for region in &regions {
        assert!(region.page_size == PAGE || region.page_size == 2 << 20);
        assert!(region.size != 0 && region.size % region.page_size == 0);
        assert!(region.base % region.page_size == 0 && region.offset == end);
        end += region.size;
        for other in regions.iter().filter(|other| other.base > region.base) {
            assert!(region.base + region.size <= other.base, "{region:?} {other:?}");
        }
    }
    assert_eq!(end, len);
    let text = bytes.trim_ascii_end();
    for cut in [1, text.len() / 2, text.len() - 1] {
        assert!(!matches!(parse(&text[..cut], len), Ok(Some(_))), "a cut message was accepted");
    }
    // The states begin with what the file has, and are found again.
    let files = files(len);
    let guest = Guest::new(bytes, &regions, &files).unwrap();
    assert_eq!(
        guest.outstanding_bytes(),
        regions.iter().find(|region| region.offset == 0).unwrap().page_size
    );
    let journal = guest.journal().try_clone_to_owned().unwrap();
    let again = Guest::take_over(journal, &files).unwrap();
    assert_eq!(again.outstanding_bytes(), guest.outstanding_bytes());
}

fn left(bytes: &[u8], len: u64) {
    let mut file = File::from(memfd_create("left", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(bytes).unwrap();
    if let Ok(guest) = Guest::take_over(file.into(), &files(len)) {
        assert!(guest.outstanding_bytes() <= len);
    }
}

/// Each layer is 32 bytes, in which a bit is a page with data.
fn layers(bytes: &[u8], len: u64) {
    let masks: Vec<&[u8]> = bytes.chunks(32).take(4).collect();
    if masks.is_empty() {
        return;
    }
    let pages = len / PAGE;
    let has = |mask: &[u8], page: u64| {
        mask.get((page / 8) as usize).is_some_and(|byte| byte >> (page % 8) & 1 == 1)
    };
    let mut kept = Vec::new();
    for (layer, mask) in masks.iter().enumerate() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        for page in (0..pages).filter(|page| has(mask, *page)) {
            file.as_file().write_all_at(&[layer as u8 + 1; PAGE as usize], page * PAGE).unwrap();
        }
        kept.push(file);
    }
    let paths: Vec<_> = kept.iter().map(|file| file.path().to_owned()).collect();
    let files = MemoryFiles::open(&paths).unwrap();
    let topmost = |page| (0..masks.len()).rev().find(|layer| has(masks[*layer], page));
    let mut read = vec![0xaa; len as usize];
    files.read(0, &mut read).unwrap();
    for page in 0..pages {
        let expected = topmost(page).map_or(0, |layer| layer as u8 + 1);
        let content = &read[(page * PAGE) as usize..][..PAGE as usize];
        assert!(content.iter().all(|byte| *byte == expected), "page {page}");
    }
    let data: u64 = (0..pages).filter(|page| topmost(*page).is_some()).count() as u64 * PAGE;
    assert_eq!(files.data_bytes(), data);
    for (layer, figures) in files.layers().enumerate() {
        let own = (0..pages).filter(|page| has(masks[layer], *page)).count() as u64 * PAGE;
        let used = (0..pages).filter(|page| topmost(*page) == Some(layer)).count() as u64 * PAGE;
        assert_eq!((figures.data, figures.used), (own, used));
    }
}

/// The first byte says the size of pages; then each removal is a start and a length, in 512 bytes from
/// below the first region.
fn removals(bytes: &[u8]) {
    const BASE: u64 = 64 << 20;
    static FILES: LazyLock<MemoryFiles> = LazyLock::new(|| {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; LEN as usize]).unwrap();
        MemoryFiles::open(&[file.path().to_owned()]).unwrap()
    });
    const LEN: u64 = 8 << 20;
    const BELOW: u64 = 1 << 20;
    let Some((kind, removals)) = bytes.split_first() else { return };
    let page_size = if kind % 2 == 0 { PAGE } else { 2 << 20 };
    // The second region is further up, and each has half of the file.
    let (half, gap) = (LEN / 2, 2 << 20);
    let text = format!(
        r#"[{{"base_host_virt_addr":{BASE},"size":{half},"offset":0,"page_size":{page_size}}},
        {{"base_host_virt_addr":{},"size":{half},"offset":{half},"page_size":{page_size}}}]"#,
        BASE + half + gap
    );
    let regions = parse(text.as_bytes(), LEN).unwrap().unwrap();
    let mut guest = Guest::new(text.as_bytes(), &regions, &FILES).unwrap();
    let mut done = Vec::new();
    for batch in removals.as_chunks::<4>().0.chunks(MESSAGES).take(8) {
        for (index, [a, b, c, d]) in batch.iter().enumerate() {
            let start = BASE - BELOW + u64::from(u16::from_le_bytes([*a, *b])) * 512;
            let end = start + u64::from(u16::from_le_bytes([*c, *d])) * 512;
            let mut message = [0; MESSAGE_LEN];
            message[0] = 0x15;
            message[8..16].copy_from_slice(&start.to_le_bytes());
            message[16..24].copy_from_slice(&end.to_le_bytes());
            let (map, at) = guest.messages();
            map.write(at + (index * MESSAGE_LEN) as u64, &message);
            done.push(start..end);
        }
        let (events, _) = guest.take_messages();
        assert!(events.is_empty());
    }
    let mut outstanding = 0;
    for (index, region) in regions.iter().enumerate() {
        for page in 0..region.size / page_size {
            let start = region.base + page * page_size;
            let gone =
                done.iter().any(|range| range.start <= start && start + page_size <= range.end);
            let expected = if gone { State::Zeros } else { State::Missing };
            assert_eq!(guest.state(index, page), expected, "{start:#x}");
            outstanding += if gone { 0 } else { page_size };
        }
    }
    assert_eq!(guest.outstanding_bytes(), outstanding);
    // The next pager finds the same.
    let journal = guest.journal().try_clone_to_owned().unwrap();
    assert_eq!(Guest::take_over(journal, &FILES).unwrap().outstanding_bytes(), outstanding);
}

/// A memory file with one page of data.
fn files(len: u64) -> MemoryFiles {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&[7; PAGE as usize]).unwrap();
    file.as_file().set_len(len).unwrap();
    MemoryFiles::open(&[file.path().to_owned()]).unwrap()
}
