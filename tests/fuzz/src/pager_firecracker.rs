//! The message of a VMM that says to be Firecracker, the events of its userfaultfd, and the states that a pager has left.
//!
//! What is promised: no panic; regions that are accepted cover the memory file, each byte once, in whole pages that do
//! not overlap in the VMM; a message that is cut is not complete, whatever follows; states that are not
//! whole are refused.

use std::fs::File;
use std::io::Write;

use migration::lazy::vmm_faults::{Event, MESSAGE_LEN};
use rustix::fs::{MemfdFlags, memfd_create};
use vmem_pager::firecracker::guest::Guest;
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
    match kind % 3 {
        0 => message(bytes, len),
        1 => bytes.as_chunks::<MESSAGE_LEN>().0.iter().for_each(|message| {
            assert_eq!(Event::decode(message).is_none(), message[0] == 0);
        }),
        _ => left(bytes, len),
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
    assert_eq!(guest.outstanding_bytes(), regions.iter().find(|region| region.offset == 0).unwrap().page_size);
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

/// A memory file with one page of data.
fn files(len: u64) -> MemoryFiles {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&[7; PAGE as usize]).unwrap();
    file.as_file().set_len(len).unwrap();
    MemoryFiles::open(&[file.path().to_owned()]).unwrap()
}
