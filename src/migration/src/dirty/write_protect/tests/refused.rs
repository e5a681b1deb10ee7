//! What cannot be tracked.

use super::*;

#[test]
fn a_truncated_file_is_an_error() {
    if !supported() {
        return;
    }
    let block = Block::shmem(4 << 20);
    let mut tracker = block.tracker();
    tracker.start(&[range(0, 4 << 20)]).unwrap();
    block.file.set_len(1 << 20).unwrap();
    let mut dirty = PageBitmap::new(1024);
    let error = tracker.sync(&mut dirty).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    tracker.stop().unwrap();
    assert!(tracker.start(&[range(0, 4 << 20)]).is_err());
}

#[test]
fn what_cannot_be_tracked_is_refused() {
    if !supported() {
        return;
    }
    let block = Block::shmem(4 << 20);
    let mut tracker = block.tracker();
    for wrong in [
        vec![range(0, 5 << 20)],
        vec![range(1, PAGE)],
        vec![range(PAGE, 2 * PAGE), range(0, PAGE)],
        vec![range(0, 2 * PAGE), range(PAGE, 3 * PAGE)],
    ] {
        let error = tracker.start(&wrong).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
    // Another userfaultfd has it.
    tracker.start(&[range(0, PAGE)]).unwrap();
    let error = block.tracker().start(&[range(0, PAGE)]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
    let short = Arc::new(HostMapping::map(&block.file, 0, PAGE).unwrap());
    assert!(WriteProtect::new(short, Some(Arc::clone(&block.block))).is_err());
}
