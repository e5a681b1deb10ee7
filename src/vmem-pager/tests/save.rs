//! The pager as a process, saving what a source sends that keeps to the protocol, or does not.

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use common::image;
use common::process::{Saving, hear, send};
use common::source::{Source, content, multifd_greeting, multifd_packet, state};
use migration::stream::{ReturnMessage, SectionKind};
use rustix::process::Signal;

const BLOCKS: [(&str, u64); 2] = [("ram", 4 << 20), ("vmem", 1 << 30)];
const SAVED: Option<ReturnMessage> = Some(ReturnMessage::Shut(0));
const FAILED: Option<ReturnMessage> = Some(ReturnMessage::Shut(1));

fn pong(value: u32) -> Option<ReturnMessage> {
    Some(ReturnMessage::Pong(value))
}

/// A stream with a return path and two pages, up to the state of devices.
fn begun() -> Source {
    Source::new()
        .return_path()
        .ram(&BLOCKS)
        .section(SectionKind::Part)
        .page("ram", 0, Some(&content(1)))
        .page("vmem", 512 << 20, Some(&content(2)))
        .end_section()
}

fn saved_pages(saving: &Saving) -> BTreeMap<(String, u64), Vec<u8>> {
    image::pages(&File::open(saving.image()).unwrap())
}

fn two_pages() -> BTreeMap<(String, u64), Vec<u8>> {
    BTreeMap::from([
        (("ram".to_owned(), 0), content(1).to_vec()),
        (("vmem".to_owned(), 131_072), content(2).to_vec()),
    ])
}

#[test]
fn the_source_is_told_when_the_image_has_its_name() {
    let mut saving = Saving::start(&["--json"]);
    fs::write(saving.image(), "of before").unwrap();
    let mut source = saving.connect();
    send(&mut source, &begun().bytes);
    assert_eq!(hear(&mut source), pong(1));
    assert_eq!(fs::read(saving.image()).unwrap(), b"of before");
    send(&mut source, &Source::default().end(&state()).bytes);
    assert_eq!(hear(&mut source), SAVED);
    assert_eq!(saved_pages(&saving), two_pages());
    assert_eq!(hear(&mut source), None);
    let (status, out, err) = saving.wait();
    assert_eq!((status, err.as_str()), (Some(0), ""));
    let events: Vec<&str> = out.lines().filter(|line| !line.contains("progress")).collect();
    assert!(events[0].contains("listening") && events.last().unwrap().contains("saved"), "{out}");
    assert_eq!(saving.names(), ["image"]);
}

#[test]
fn a_source_without_a_return_path_is_read_to_its_end() {
    let mut saving = Saving::start(&[]);
    let mut source = saving.connect();
    let stream = Source::new().ram(&BLOCKS).section(SectionKind::Part);
    let stream = stream.page("ram", 0, Some(&content(1))).end_section().end(&state());
    send(&mut source, &stream.bytes);
    drop(source);
    assert_eq!(saving.wait(), (Some(0), String::new(), String::new()));
    assert_eq!(saved_pages(&saving).len(), 1);
}

#[test]
fn state_that_looks_like_its_own_end_does_not_end_it() {
    let mut saving = Saving::start(&[]);
    let mut source = saving.connect();
    // All of a stream's end, as a guest could have it in the memory of a device; and then the rest.
    let mut state = Source::default().end(&state()).bytes[18..].to_vec();
    state.extend(b"more state\x7e\0\0\0\x32");
    let end = Source::default().end(&state);
    send(&mut source, &[&begun().bytes[..], &end.bytes].concat());
    assert_eq!(hear(&mut source), pong(1));
    assert_eq!(hear(&mut source), SAVED);
    assert_eq!(saving.wait().0, Some(0));
    let bytes = image::tail(&File::open(saving.image()).unwrap());
    assert!(bytes.windows(state.len()).any(|part| part == state));
}

#[test]
fn a_source_that_breaks_the_protocol_is_told_and_nothing_is_left() {
    let part = || begun().section(SectionKind::Part);
    let mut twice = part();
    twice.bytes.extend(0x1004u64.to_be_bytes());
    let cases: [(Source, &str); 6] = [
        (part().page("rom", 0, None), "\"rom\""),
        (part().page("ram", 4 << 20, None), "past its end"),
        (twice, "second list"),
        (begun().package(&state()).package(&state()), "a package, of which there is one at most"),
        (begun().package(b"no section"), "package of devices"),
        (begun().ram(&BLOCKS), "START"),
    ];
    for (stream, why) in cases {
        let mut saving = Saving::start(&[]);
        fs::write(saving.image(), "of before").unwrap();
        let mut source = saving.connect();
        send(&mut source, &stream.bytes);
        let mut heard = hear(&mut source);
        while matches!(heard, Some(ReturnMessage::Pong(_))) {
            heard = hear(&mut source);
        }
        // Of a guest that was given away there is nothing to undo: the source keeps it by itself.
        assert!(heard == FAILED || why.contains("at most") && heard.is_none(), "{why}: {heard:?}");
        drop(source);
        let (status, _, err) = saving.wait();
        assert_eq!(status, Some(1), "{err}");
        assert!(err.contains(why) && err.lines().count() == 1, "{why}: {err}");
        match why.contains("at most") {
            true => assert_eq!(saving.names(), ["image", "image.recover"]),
            false => assert_eq!(saving.names(), ["image"]),
        }
        assert_eq!(fs::read(saving.image()).unwrap(), b"of before");
    }
}

#[test]
fn a_source_that_leaves_is_a_failure_and_nothing_is_left() {
    for stream in [
        begun(),
        begun().section(SectionKind::Part),
        begun().section(SectionKind::End).end_section(),
    ] {
        let mut saving = Saving::start(&[]);
        let mut source = saving.connect();
        send(&mut source, &stream.bytes);
        drop(source);
        let (status, _, err) = saving.wait();
        assert_eq!(status, Some(1));
        let told =
            ["QEMU closed the connection", "connection with QEMU broke", "does not take an answer"];
        assert!(told.iter().any(|words| err.contains(words)), "{err}");
        assert!(saving.names().is_empty());
    }
}

#[test]
fn a_signal_ends_a_save_with_the_guest_at_its_source() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut saving = Saving::start(&[]);
        let mut source = saving.connect();
        send(&mut source, &begun().bytes);
        assert_eq!(hear(&mut source), pong(1));
        saving.signal(signal);
        assert_eq!(hear(&mut source), FAILED);
        drop(source);
        let (status, _, err) = saving.wait();
        assert_eq!((status, err.as_str()), (Some(1), "vmem-pager: interrupted by a signal\n"));
        assert!(saving.names().is_empty());
    }
}

#[test]
fn a_pager_that_is_killed_leaves_no_file_and_a_broken_channel() {
    let mut saving = Saving::start(&[]);
    let mut source = saving.connect();
    send(&mut source, &begun().bytes);
    assert_eq!(hear(&mut source), pong(1));
    saving.signal(Signal::KILL);
    assert_eq!(hear(&mut source), None);
    assert_eq!(saving.wait().0, None);
    assert!(!saving.names().iter().any(|name| name.to_string_lossy().starts_with("image")));
    // The next one begins where it was.
    saving.launch(&[]);
    saving.wait_listening();
    let mut source = saving.connect();
    send(&mut source, &begun().end(&state()).bytes);
    assert_eq!((hear(&mut source), hear(&mut source)), (pong(1), SAVED));
    assert_eq!(saving.wait().0, Some(0));
    assert_eq!(saved_pages(&saving), two_pages());
}

#[test]
fn time_that_is_over_ends_a_save_with_status_3() {
    let mut saving = Saving::start(&["--timeout", "1s"]);
    let (status, _, err) = saving.wait();
    assert_eq!(status, Some(3));
    assert!(err.contains("no VMM has connected"), "{err}");
    assert!(saving.names().is_empty());

    let mut saving = Saving::start(&["--timeout", "1s", "--json"]);
    let mut source = saving.connect();
    send(&mut source, &begun().bytes);
    assert_eq!((hear(&mut source), hear(&mut source)), (pong(1), FAILED));
    drop(source);
    let (status, _, err) = saving.wait();
    assert_eq!(status, Some(3));
    assert!(err.starts_with("{\"error\":\"timed out after 1 s"), "{err}");
    assert!(saving.names().is_empty());
}

#[test]
fn what_is_not_a_migration_is_closed_and_the_migration_is_taken() {
    let mut saving = Saving::start(&[]);
    drop(saving.connect());
    let mut other = saving.connect();
    send(&mut other, b"GET / HTTP/1.1\r\n\r\n");
    assert_eq!(hear(&mut other), None);
    let mut source = saving.connect();
    send(&mut source, &begun().end(&state()).bytes);
    assert_eq!((hear(&mut source), hear(&mut source)), (pong(1), SAVED));
    let (status, _, err) = saving.wait();
    assert_eq!(status, Some(0));
    assert!(err.contains("warning: a connection that is not a migration"), "{err}");
    assert_eq!(saved_pages(&saving), two_pages());
}

#[test]
fn connections_beside_a_save_are_closed_and_it_continues() {
    let mut saving = Saving::start(&[]);
    let mut source = saving.connect();
    send(&mut source, &begun().bytes);
    assert_eq!(hear(&mut source), pong(1));
    for stranger in [&begun().bytes[..], b"GET / HTTP/1.1\r\n\r\n"] {
        let mut other = saving.connect();
        send(&mut other, stranger);
        assert_eq!(hear(&mut other), None);
    }
    send(&mut source, &Source::default().end(&state()).bytes);
    assert_eq!(hear(&mut source), SAVED);
    let (status, _, err) = saving.wait();
    assert_eq!((status, err.lines().count()), (Some(0), 2), "{err}");
    assert!(err.contains("a migration beside the one that is saved"), "{err}");
    assert_eq!(saved_pages(&saving), two_pages());
}

#[test]
fn an_image_that_cannot_be_is_refused_before_there_is_a_socket() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("image")).unwrap();
    let mut saving = Saving::in_folder(dir);
    saving.launch(&[]);
    let (status, _, err) = saving.wait();
    assert_eq!(status, Some(1));
    assert!(err.contains("image") && err.lines().count() == 1, "{err}");
    assert_eq!(saving.names(), ["image"]);
}

#[test]
fn a_wrong_word_is_one_line_and_status_2() {
    let mut saving = Saving::in_folder(tempfile::tempdir().unwrap());
    saving.launch(&["--timeout", "soon"]);
    let (status, _, err) = saving.wait();
    assert_eq!(status, Some(2));
    assert!(err.contains("--timeout") && err.lines().count() == 1, "{err}");
}

/// A save by two more channels: they have introduced themselves.
fn multifd() -> (Saving, UnixStream, [UnixStream; 2]) {
    let saving = Saving::start(&[]);
    let main = saving.connect();
    let channels = [1, 0].map(|id| {
        let mut channel = saving.connect();
        send(&mut channel, &multifd_greeting(id));
        channel
    });
    (saving, main, channels)
}

fn multifd_start() -> Source {
    let mut source = Source::new().return_path();
    source.put_ram(&BLOCKS);
    source.flush().end_section()
}

#[test]
fn pages_of_multifd_channels_are_taken_in_the_order_of_their_rounds() {
    let (mut saving, mut main, [mut slow, mut fast]) = multifd();
    let round = |source: Source| source.section(SectionKind::Part).flush().end_section();
    let stream = round(round(multifd_start())).end(&state());
    let sync = multifd_packet(true, "ram", &[], &[]);
    send(&mut main, &stream.bytes);
    send(&mut fast, &sync);
    // The first round, by the slow channel alone; then the second, by the other.
    let first = multifd_packet(false, "ram", &[(0, 1), (4096, 2), (8192, 3)], &[12_288]);
    send(&mut fast, &sync);
    send(&mut fast, &multifd_packet(true, "ram", &[(4096, 4), (12_288, 5)], &[8192]));
    thread::sleep(Duration::from_millis(100));
    send(&mut slow, &[&sync[..], &first[..500]].concat());
    thread::sleep(Duration::from_millis(100));
    send(&mut slow, &[&first[500..], &sync[..], &sync[..]].concat());
    assert_eq!((hear(&mut main), hear(&mut main)), (pong(1), SAVED));
    assert_eq!(saving.wait().0, Some(0));
    let page = |page, seed| (("ram".to_owned(), page), content(seed).to_vec());
    assert_eq!(saved_pages(&saving), BTreeMap::from([page(0, 1), page(1, 4), page(3, 5)]));
}

#[test]
fn a_source_of_an_old_machine_type_marks_rounds_by_the_ends_of_sections() {
    let (mut saving, mut main, [mut one, mut other]) = multifd();
    let stream = Source::new().return_path().ram(&BLOCKS);
    let stream = stream.section(SectionKind::Part).end_section().end(&state());
    let sync = multifd_packet(true, "ram", &[], &[]);
    let page = multifd_packet(true, "ram", &[(0, 1)], &[]);
    send(&mut one, &[&sync[..], &page, &sync].concat());
    send(&mut other, &[&sync[..], &sync, &multifd_packet(true, "ram", &[(0, 2)], &[])].concat());
    send(&mut main, &stream.bytes);
    assert_eq!((hear(&mut main), hear(&mut main)), (pong(1), SAVED));
    assert_eq!(saving.wait().0, Some(0));
    let only = BTreeMap::from([(("ram".to_owned(), 0), content(2).to_vec())]);
    assert_eq!(saved_pages(&saving), only);
}

#[test]
fn a_multifd_channel_that_breaks_the_protocol_fails_the_save() {
    let sync = multifd_packet(true, "ram", &[], &[]);
    let mut flags = sync.clone();
    flags[8..12].copy_from_slice(&3u32.to_be_bytes());
    let mut many = sync.clone();
    many[16..20].copy_from_slice(&1000u32.to_be_bytes());
    let mut payload = multifd_packet(false, "ram", &[(0, 1)], &[]);
    payload[20..24].copy_from_slice(&1u32.to_be_bytes());
    let page = multifd_packet(false, "ram", &[(0, 1)], &[]);
    let cases: [(&[u8], &str); 7] = [
        (&multifd_packet(false, "rom", &[(0, 1)], &[]), "\"rom\""),
        (&multifd_packet(false, "ram", &[(4 << 20, 1)], &[]), "past its end"),
        (&multifd_packet(false, "ram", &[], &[u64::MAX]), "past its end"),
        (&flags, "compression of a packet"),
        (&many, "number of pages of a packet"),
        (&payload, "payload of a packet"),
        (&page[..2000], "QEMU closed the connection"),
    ];
    for (bytes, why) in cases {
        let (mut saving, mut main, [mut one, other]) = multifd();
        send(&mut main, &multifd_start().bytes);
        send(&mut one, bytes);
        drop(one);
        let mut heard = hear(&mut main);
        while matches!(heard, Some(ReturnMessage::Pong(_))) {
            heard = hear(&mut main);
        }
        assert_eq!(heard, FAILED, "{why}");
        drop((main, other));
        let (status, _, err) = saving.wait();
        assert_eq!(status, Some(1), "{why}: {err}");
        assert!(err.contains(why), "{why}: {err}");
        assert!(saving.names().is_empty());
    }
}

#[test]
fn a_multifd_channel_that_leaves_too_early_fails_the_save() {
    let (mut saving, mut main, [one, other]) = multifd();
    drop(one);
    send(&mut main, &multifd_start().bytes);
    assert_eq!((hear(&mut main), hear(&mut main)), (pong(1), FAILED));
    drop((main, other));
    let (status, _, err) = saving.wait();
    assert_eq!(status, Some(1));
    assert!(err.contains("a multifd channel was closed"), "{err}");
}

#[test]
fn two_channels_of_one_number_fail_the_save() {
    let saving = Saving::start(&[]);
    let mut saving = saving;
    let mut main = saving.connect();
    send(&mut main, &Source::new().return_path().bytes);
    assert_eq!(hear(&mut main), pong(1));
    let _channels = [0, 0].map(|id| {
        let mut channel = saving.connect();
        send(&mut channel, &multifd_greeting(id));
        channel
    });
    assert_eq!(hear(&mut main), FAILED);
    drop(main);
    let (status, _, err) = saving.wait();
    assert_eq!(status, Some(1));
    assert!(err.contains("two multifd channels with the number 0"), "{err}");
}

#[test]
fn a_guest_that_is_given_away_is_taken_and_a_failure_after_that_is_not_told_as_if_it_could_run_on()
{
    let stream = Source::new().return_path().advise().ram(&BLOCKS).package(&state());
    let rest = Source::default().section(SectionKind::Part).page("ram", 0, Some(&content(1)));
    let rest = rest.end_section().end_postcopy();

    let mut saving = Saving::start(&[]);
    let mut source = saving.connect();
    send(&mut source, &stream.bytes);
    assert_eq!([1, 3, 0x42].map(|_| hear(&mut source)), [1, 3, 0x42].map(pong));
    // The channel of postcopy-preempt, for pages that are asked for: none are.
    let _preempt = saving.connect();
    // To end now would lose the guest.
    saving.signal(Signal::TERM);
    thread::sleep(Duration::from_millis(200));
    send(&mut source, &rest.bytes);
    assert_eq!(hear(&mut source), SAVED);
    assert_eq!(saving.wait(), (Some(0), String::new(), String::new()));
    assert_eq!(saved_pages(&saving).len(), 1);

    let mut saving = Saving::start(&[]);
    let mut source = saving.connect();
    send(&mut source, &stream.bytes);
    assert_eq!([1, 3, 0x42].map(|_| hear(&mut source)), [1, 3, 0x42].map(pong));
    source.write_all(&[0xff]).unwrap();
    assert_eq!(hear(&mut source), None);
    let (status, _, err) = saving.wait();
    assert_eq!(status, Some(1));
    assert!(err.contains("Run this again with --recover"), "{err}");
    assert_eq!(saving.names(), ["image.recover"]);
}
