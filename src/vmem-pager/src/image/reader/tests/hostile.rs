//! Files that are not, or no longer, the whole of a guest.

use super::*;
use crate::image::reader::sample::SampleBlock;

fn refused(bytes: &[u8]) -> String {
    let (_dir, image) = open_bytes(|path| std::fs::write(path, bytes).unwrap());
    let error = image.expect_err("it was accepted");
    assert!(matches!(error, PagerError::Image { .. }), "{error:?}");
    assert_eq!(error.exit_status(), 1);
    error.to_string()
}

/// Puts `bytes` where `what` stands for the `nth` time.
fn replace(file: &mut [u8], what: &[u8], nth: usize, bytes: &[u8]) {
    let mut found = (0..file.len() - what.len()).filter(|at| file[*at..].starts_with(what));
    let at = found.nth(nth).expect("the sample has it");
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

#[test]
fn a_file_that_is_not_there_is_told_with_its_name() {
    let error = GuestImage::open(Path::new("/nowhere/guest.img")).unwrap_err().to_string();
    assert!(error.contains("cannot open /nowhere/guest.img"), "{error}");
}

#[test]
fn other_files_are_named_for_what_they_are_not() {
    assert!(refused(b"").contains("ends at byte 0x0"));
    assert!(refused(&[0x7f; 100]).contains("not a migration stream"));
    let mut old = Sample::new(false).bytes();
    old[7] = 2;
    assert!(refused(&old).contains("only version 3"));
}

#[test]
fn pages_of_another_size_are_refused() {
    let mut file = Sample::new(true).bytes();
    // Version and page size of the first block's header.
    replace(&mut file, b"\0\0\0\x01\0\0\0\0\0\0\x10\0", 0, b"\0\0\0\x01\0\0\0\0\0\0\x20\0");
    assert!(refused(&file).contains("page size of a mapped-ram block"));
}

#[test]
fn memory_that_the_file_leaves_to_others_is_refused() {
    let mut file = Sample::new(true).bytes();
    let at = file.windows(10).position(|bytes| bytes == b"mapped-ram").unwrap();
    file.splice(at - 1..at + 10, *b"\x0fx-ignore-shared");
    assert!(refused(&file).contains("x-ignore-shared"));
    let mut file = Sample::new(true).bytes();
    replace(&mut file, b"mapped-ram", 0, b"unknown-it");
    assert!(refused(&file).contains("unknown-it"));
}

#[test]
fn a_recording_of_postcopy_is_refused() {
    let sample = Sample::new(false);
    let mut file = sample.bytes();
    let mut listen = Vec::new();
    migration::stream::put_command(&mut listen, &migration::stream::Command::PostcopyListen);
    let at = file.windows(3).position(|bytes| bytes == b"ram").unwrap() - 6;
    file.splice(at..at, listen);
    assert!(refused(&file).contains("recording of postcopy"));
}

#[test]
fn impossible_devices_are_refused() {
    let sample = Sample::new(false);
    let early = sample.early();
    let file = sample.bytes();
    let at = file.windows(early.len()).position(|bytes| bytes == early).unwrap();
    // Of the early section: addr, region size, block size, node, size, bitmap.
    let fields = at + early.len() - 5 - 28 - 8 - 8;
    for (offset, bytes, expected) in [
        (16, &[0u8; 8][..], "geometry"),
        (16, b"\0\0\0\0\0\0\x30\0", "impossible"),
        (28, b"\0\0\0\0\0\0\x10\0", "size is 0x1000"),
        (36, b"\0\0\0\0\x80\0\0\x07", "beyond the region"),
    ] {
        let mut file = file.clone();
        file[fields + offset..][..bytes.len()].copy_from_slice(bytes);
        let error = refused(&file);
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn a_guest_larger_than_any_is_refused_before_its_bitmaps_are_made() {
    let mut sample = Sample::new(false);
    let block = |id: &str, pages| SampleBlock { id: id.to_owned(), pages };
    sample.blocks = vec![block("a", 1 << 31), block("b", 1 << 31), block("c", 1 << 31)];
    sample.plugged = None;
    sample.records = vec![Record { block: 2, page: 1, seed: Some(1) }];
    assert!(refused(&sample.bytes()).contains("at most 16 TiB"));
    // A length that no processor has, which is not even added up.
    sample.blocks = vec![block("a", 1 << 42)];
    sample.records = Vec::new();
    assert!(refused(&sample.bytes()).contains("length of a RAM block"));
}

#[test]
fn device_state_that_does_not_end_as_sections_do_is_refused() {
    for description in [false, true] {
        let sample = Sample { description, ballast: 100, ..Sample::new(false) };
        let file = sample.bytes();
        assert!(open_bytes(|path| std::fs::write(path, &file).unwrap()).1.is_ok());
        // Byte by byte from the end of the sections to their start.
        let state = sample.device_state();
        let end = file.windows(state.len()).position(|bytes| bytes == state).unwrap() + state.len();
        for cut in end - state.len()..end + 1 {
            assert!(refused(&file[..cut]).contains("guest.img"), "cut at {cut} of {end}");
        }
    }
}

#[test]
fn a_description_that_contradicts_the_devices_is_a_refusal() {
    let mut file = Sample { ballast: 100, ..Sample::new(false) }.bytes();
    let at = file.windows(7).position(|bytes| bytes == b"ballast").unwrap();
    // A byte of the state is missing.
    file.remove(at + 30);
    assert!(refused(&file).contains("damaged"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn a_file_that_is_cut_anywhere_is_refused(mapped: bool, share in 0.0..1.0f64) {
        let file = Sample { description: false, ..Sample::new(mapped) }.bytes();
        let cut = (file.len() as f64 * share) as usize;
        refused(&file[..cut]);
    }

    #[test]
    fn a_file_that_is_garbled_is_refused_or_read_within_its_bounds(
        mapped: bool,
        changes in proptest::collection::vec((0usize..3000, any::<u8>()), 1..6),
    ) {
        let mut file = Sample::new(mapped).bytes();
        for (at, byte) in changes {
            file[at] = byte;
        }
        let (_dir, image) = open_bytes(|path| std::fs::write(path, &file).unwrap());
        if let Ok(image) = image {
            let mut reader = PageReader::new(&image);
            for block in image.blocks() {
                for run in block.present().runs(0..block.nr_pages()) {
                    let _ = reader.read(block, run, |page, _| assert!(page < block.nr_pages()));
                }
            }
        }
    }
}
