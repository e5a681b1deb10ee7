//! `max_postcopy_bandwidth`: of what is not asked for, and of nothing else.

use std::io::Write;
use std::time::Instant;

use super::super::received;
use super::incoming::{send_again, send_at};
use super::peers::RawDestination;
use super::*;
use crate::page_bitmap::PageBitmap;
use crate::stream::{
    Command, PageHeader, PageKind, ReturnMessage, SectionKind, put_continued, put_end_of_section,
    put_eof, put_footer,
};

#[test]
fn a_bandwidth_limit_does_not_hold_up_a_vcpu_that_waits_for_a_page() {
    for urgent in [false, true] {
        let (from, expected) = filled();
        let to = Side::new(&[1, 4, 5, 9]);
        // A page in a tenth of a second: the guest has to ask for nearly everything.
        let mut parameters = Parameters::new(Configuration::new("test"));
        parameters.max_postcopy_bandwidth = Some(10 * PAGE);
        let (near, far) = UnixStream::pair().unwrap();
        let (when, channels) = (SwitchWhen::AtOnce, vec![(near.into(), far.into())]);
        let begin = Instant::now();
        let run = migrate_by(parameters, &from, &to, expected, when, urgent, channels);
        run.outgoing.unwrap();
        run.incoming.unwrap();
        assert_eq!(run.wrong, 0);
        // However long it took: what was not asked for came a page at a time, and more than that was
        // asked for, which the limit alone would not have let through.
        let asked = run.sent.postcopy_requests;
        let tenths = u64::try_from(begin.elapsed().as_millis() / 100).unwrap();
        let background = run.sent.normal.saturating_sub(asked);
        assert!(background <= tenths + 2, "{background} pages in {tenths} tenths of a second");
        assert!(asked > tenths, "{asked} requests in {tenths} tenths of a second");
    }
}

const PAGES: u64 = 16;

/// A destination that has the guest, and a page that came unasked; in a pause nothing else comes. Then it
/// asks for all others but the last `unasked`, and says that it has everything when the source does.
fn ask(pages: u64, unasked: u64, pause: Duration, main: UnixStream, urgent: Option<UnixStream>) {
    // Much longer than it takes, and much less than what would have to be paid back.
    main.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut destination = RawDestination(main);
    destination.read_to_command(&Command::Ping(PING_PACKAGE_LOADED));
    destination.say(&ReturnMessage::Pong(PING_PACKAGE_LOADED));
    destination.read_to_command(&Command::PostcopyRun);
    destination.say(&ReturnMessage::SwitchoverAck);
    let first = PageHeader::page_word(PageKind::Normal, 0, false);
    destination.read_to(&first.to_be_bytes());
    if !pause.is_zero() {
        // In it, a source that pays nothing back would send some more.
        thread::sleep(pause);
        let unread = rustix::io::ioctl_fionread(&destination.0).unwrap();
        assert!(unread < 2 * PAGE, "{unread} bytes came unasked behind the first page");
    }
    let reading = urgent
        .map(|mut urgent| thread::spawn(move || io::copy(&mut urgent, &mut io::sink()).unwrap()));
    for page in 1..pages - unasked {
        let (block, start) = (Some("vmem0".to_owned()), page * PAGE);
        destination.say(&ReturnMessage::RequestPages { block, start, len: PAGE as u32 });
    }
    read_to_the_end(&mut destination);
    drop(destination);
    if let Some(reading) = reading {
        reading.join().unwrap();
    }
}

/// Takes the rest of the stream, and says that all has come.
fn read_to_the_end(destination: &mut RawDestination) {
    let mut end = Vec::new();
    put_continued(&mut end, SectionKind::End, 0);
    put_end_of_section(&mut end);
    put_footer(&mut end, 0);
    put_eof(&mut end);
    destination.read_to(&end);
    destination.say(&ReturnMessage::Shut(0));
}

/// Sends so many pages to such a destination; what came of it by either way of asking.
fn send_to_one_that_asks(
    (pages, unasked): (u64, u64),
    pause: Duration,
    rate: u64,
) -> [MigrationInfo; 2] {
    [false, true].map(|urgent| {
        let from = Side::of_region(pages * PAGE);
        fill(&from.region, 0..pages, 7);
        let (near, far) = UnixStream::pair().unwrap();
        let (near_urgent, far_urgent) = urgent.then(|| UnixStream::pair().unwrap()).unzip();
        let there = thread::spawn(move || ask(pages, unasked, pause, far, far_urgent));
        let progress = Arc::new(Progress::new());
        let (sent, _) = send_at(Some(rate), &from, near, near_urgent, &progress);
        there.join().unwrap();
        sent.unwrap();
        progress.snapshot()
    })
}

/// Minutes are owed for the first page. What is asked for is sent meanwhile, and that nothing is left then is
/// noticed without waiting for these minutes.
#[test]
fn a_page_beyond_the_limit_is_owed_and_holds_up_neither_requests_nor_the_end() {
    for info in send_to_one_that_asks((16, 0), Duration::from_millis(300), 10) {
        assert_eq!((info.status, info.normal), (Status::Completed, 16));
        assert_eq!(info.postcopy_requests, 15);
    }
}

/// The last page is due in a quarter of a second; in more than a minute, were those counted that are asked
/// for.
#[test]
fn what_is_asked_for_does_not_use_up_the_limit() {
    for info in send_to_one_that_asks((301, 1), Duration::ZERO, 4 * PAGE) {
        assert_eq!((info.status, info.normal), (Status::Completed, 301));
        assert_eq!(info.postcopy_requests, 299);
    }
}

#[test]
fn a_limit_of_0_is_none() {
    let from = Side::of_region(PAGES * PAGE);
    fill(&from.region, 0..PAGES, 7);
    let to = Side::of_region(PAGES * PAGE);
    let mut parameters = Parameters::new(Configuration::new("test"));
    parameters.max_postcopy_bandwidth = Some(0);
    let (near, far) = UnixStream::pair().unwrap();
    // The guest reads nothing, so that everything comes unasked.
    let (when, channels) = (SwitchWhen::AtOnce, vec![(near.into(), far.into())]);
    let run = migrate_by(parameters, &from, &to, Vec::new(), when, true, channels);
    run.outgoing.unwrap();
    run.incoming.unwrap();
    assert_eq!((run.sent.normal, run.sent.postcopy_requests), (PAGES, 0));
}

/// Connects by what the test has made.
struct Made(mpsc::Receiver<Channels>);

impl Reconnect for Made {
    fn reconnect(&mut self, _: &MigrationError) -> Option<Channels> {
        self.0.recv().ok()
    }
}

/// Minutes are owed for the first page when the channel breaks.
#[test]
fn what_is_owed_is_not_forgiven_by_a_recovery() {
    let from = Side::of_region(PAGES * PAGE);
    fill(&from.region, 0..PAGES, 7);
    let (near, far) = UnixStream::pair().unwrap();
    let (near_again, far_again) = UnixStream::pair().unwrap();
    let progress = Arc::new(Progress::new());
    let (connect, made) = mpsc::channel();
    let main = Channel::new(near_again, Arc::clone(&progress)).unwrap();
    connect.send(Channels { main, urgent: None }).unwrap();
    let there = thread::spawn(move || {
        let mut destination = RawDestination(far);
        destination.read_to_command(&Command::Ping(PING_PACKAGE_LOADED));
        destination.say(&ReturnMessage::Pong(PING_PACKAGE_LOADED));
        destination.read_to_command(&Command::PostcopyRun);
        destination.say(&ReturnMessage::SwitchoverAck);
        let first = PageHeader::page_word(PageKind::Normal, 0, false);
        destination.read_to(&first.to_be_bytes());
        drop(destination);
        far_again.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut destination = RawDestination(far_again);
        let block = "vmem0".to_owned();
        destination.read_to_command(&Command::RecvBitmap { block: block.clone() });
        let mut outstanding = PageBitmap::new(PAGES);
        (0..PAGES).for_each(|page| {
            outstanding.set(page);
        });
        let mut bitmap = Vec::new();
        received::put(&mut bitmap, &block, &outstanding);
        destination.0.write_all(&bitmap).unwrap();
        destination.read_to_command(&Command::PostcopyResume);
        destination.say(&ReturnMessage::ResumeAck);
        // In it, a source that pays nothing back would send a page.
        thread::sleep(Duration::from_millis(300));
        let unread = rustix::io::ioctl_fionread(&destination.0).unwrap();
        for page in 0..PAGES {
            let (block, start) = (Some(block.clone()), page * PAGE);
            destination.say(&ReturnMessage::RequestPages { block, start, len: PAGE as u32 });
        }
        read_to_the_end(&mut destination);
        unread
    });
    let reconnect = Box::new(Made(made));
    let (sent, _) = send_again(Some(10), &from, (near, None), reconnect, &progress);
    let unread = there.join().unwrap();
    sent.unwrap();
    assert!(unread < PAGE, "{unread} bytes came unasked after the recovery");
    assert_eq!(progress.snapshot().postcopy_recoveries, 1);
}
