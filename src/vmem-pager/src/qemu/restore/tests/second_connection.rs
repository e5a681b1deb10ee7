//! A second connection that QEMU reads, does not read, or closes.

use std::net::{Shutdown, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use super::*;

/// All that one channel needs to end, when nothing was ever read of the second one.
fn assert_all_of_one_channel(fake: &Fake, sample: &Sample) {
    let placed = fake.placed.lock();
    assert_eq!(placed.twice, []);
    for (page, bytes) in expected(sample) {
        assert_eq!(placed.pages.get(&page), Some(&bytes), "{page:?}");
    }
    // Also the page that was sent on the other.
    for page in 0..64 {
        assert!(placed.order.contains(&("ram".to_owned(), page)), "page {page} of RAM is left out");
    }
}

/// A restore to a QEMU that has its devices, places what comes on the main channel, and does not look at the second
/// connection.
struct WithoutSecond {
    sample: Sample,
    fake: Fake,
    main: fake::Main,
    placing: JoinHandle<()>,
    restored: Restored,
    _dir: TempDir,
}

impl WithoutSecond {
    fn begin(how: How) -> Self {
        let (sample, dir) = (Sample::new(true), tempfile::tempdir().unwrap());
        let fake = Fake::listen(dir.path());
        let restored = restore(&sample, &dir, how);
        let mut main = fake.accept_main();
        main.greet();
        main.setup(&sample);
        let placing = main.place();
        Self { sample, fake, main, placing, restored, _dir: dir }
    }

    /// QEMU has all of it: so does the restore, by one channel.
    fn finish(mut self) {
        self.fake.wait_ended();
        self.main.say(&ReturnMessage::Shut(0));
        self.restored.join().unwrap().0.unwrap();
        self.placing.join().unwrap();
        assert_all_of_one_channel(&self.fake, &self.sample);
    }
}

/// A QEMU without postcopy-preempt that is slow: it closes the second connection without having read it.
#[test]
fn a_second_connection_is_not_relied_on_before_it_is_read() {
    for closed_late in [false, true] {
        let mut qemu = WithoutSecond::begin(How::default());
        // Its devices need these before it looks at the connection.
        qemu.main.ask(Some("ram"), 40);
        qemu.main.ask(None, 31);
        qemu.fake.wait_for("ram", 40);
        qemu.fake.wait_for("ram", 31);
        if closed_late {
            // All of the image is here, but for a page that nothing reads.
            for (block, page) in expected(&qemu.sample).keys() {
                qemu.fake.wait_for(block, *page);
            }
            thread::sleep(Duration::from_millis(100));
            assert!(!qemu.fake.placed.lock().ended, "the end came with a page on its way nowhere");
        }
        drop(qemu.fake.accept());
        qemu.finish();
    }
}

/// The same, whose main thread waits for the very page that went there, so that it never closes it.
#[test]
fn a_page_on_a_connection_that_nothing_reads_is_sent_again_when_it_is_waited_for() {
    let mut qemu = WithoutSecond::begin(How::default());
    // What goes there goes first.
    qemu.fake.wait_for("ram", 0);
    // The first that RAM has no content for.
    qemu.main.ask(Some("ram"), 2);
    qemu.fake.wait_for("ram", 2);
    qemu.finish();
}

#[test]
fn a_second_connection_that_is_neither_read_nor_closed_is_a_timeout() {
    let qemu = WithoutSecond::begin(How { silence: Some(SHORT_SILENCE), ..How::default() });
    let error = qemu.restored.join().unwrap().0.unwrap_err();
    assert_eq!(error.exit_status(), 3);
    assert!(
        error.to_string().contains("neither reads its second connection nor closes it"),
        "{error}"
    );
    qemu.placing.join().unwrap();
    assert!(!qemu.fake.placed.lock().ended);
}

#[test]
fn once_a_second_connection_is_read_requests_are_answered_there() {
    let (sample, dir) = (large(), tempfile::tempdir().unwrap());
    let fake = Fake::listen(dir.path());
    let restored = restore(&sample, &dir, How { bandwidth: Some(1), ..How::default() });
    let (mut main, urgent) = fake.load(&sample);
    let placing = main.place();
    let answered_there = (0..600).step_by(20).any(|page| {
        main.ask(Some("big"), page);
        fake.wait_for("big", page);
        !fake.placed.lock().order.contains(&("big".to_owned(), page))
    });
    assert!(answered_there);
    main.back.shutdown(Shutdown::Both).unwrap();
    assert!(restored.join().unwrap().0.is_err());
    placing.join().unwrap();
    urgent.join().unwrap();
    assert_eq!(fake.placed.lock().twice, []);
}

#[test]
fn a_connection_that_was_read_and_is_closed_breaks_the_restore() {
    let (sample, dir) = (large(), tempfile::tempdir().unwrap());
    let fake = Fake::listen(dir.path());
    let how = How { bandwidth: Some(1), preempt: Some(true), ..How::default() };
    let restored = restore(&sample, &dir, how);
    let mut main = fake.accept_main();
    main.greet();
    let urgent = fake.accept();
    main.setup(&sample);
    let placing = main.place();
    main.say(&ReturnMessage::Pong(0x42));
    main.ask(Some("big"), 100);
    let mut byte = [0];
    std::io::Read::read_exact(&mut &urgent, &mut byte).unwrap();
    drop(urgent);
    let error = restored.join().unwrap().0.unwrap_err();
    assert!(error.to_string().contains("run this again with --recover"), "{error}");
    placing.join().unwrap();
}

/// Passes TCP connections on to a Unix socket; the address.
fn relay(to: PathBuf) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        for near in listener.incoming().map_while(Result::ok) {
            let far = UnixStream::connect(&to).unwrap();
            let (mut from, mut to) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Write);
            });
            thread::spawn(move || {
                let _ = std::io::copy(&mut &far, &mut &near);
                let _ = near.shutdown(Shutdown::Write);
            });
        }
    });
    address
}

#[test]
fn a_second_connection_by_tcp_carries_nothing_unless_qemu_is_known_to_read_it() {
    for preempt in [None, Some(true)] {
        let (sample, dir) = (Sample::new(true), tempfile::tempdir().unwrap());
        let fake = Fake::listen(dir.path());
        let tcp = Some(relay(dir.path().join("vm.sock")));
        let restored = restore(&sample, &dir, How { tcp, preempt, ..How::default() });
        let mut main = fake.accept_main();
        main.greet();
        let mut urgent = preempt.map(|_| fake.accept());
        main.setup(&sample);
        let mut urgent = urgent.take().unwrap_or_else(|| fake.accept());
        main.say(&ReturnMessage::Pong(4));
        main.ask(Some("ram"), 40);
        main.ask(Some("ram"), 50);
        let placing = main.place();
        fake.wait_ended();
        main.say(&ReturnMessage::Shut(0));
        restored.join().unwrap().0.unwrap();
        placing.join().unwrap();
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut urgent, &mut bytes).unwrap();
        match preempt {
            Some(_) => assert!(!bytes.is_empty(), "requests are not answered there"),
            None => {
                assert!(bytes.is_empty(), "{bytes:x?}");
                assert_all_of_one_channel(&fake, &sample);
            }
        }
    }
}
