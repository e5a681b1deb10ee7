//! A save that breaks off after its source has given the guest away, and pagers that finish it.

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::net::UnixStream;

use common::image;
use common::process::{Saving, hear, send};
use common::source::{Source, content, state};
use migration::stream::{Command, ReturnMessage, SectionKind};
use rustix::process::Signal;

const BLOCKS: [(&str, u64); 2] = [("ram", 4 << 20), ("vmem", 1 << 30)];
const SAVED: Option<ReturnMessage> = Some(ReturnMessage::Shut(0));

fn pong(value: u32) -> Option<ReturnMessage> {
    Some(ReturnMessage::Pong(value))
}

fn saved_pages(saving: &Saving) -> BTreeMap<(String, u64), Vec<u8>> {
    image::pages(&File::open(saving.image()).unwrap())
}

/// What a source that was paused asks first: what is here of each block, which is nothing.
fn ask_for_received(source: &mut UnixStream) {
    for (block, size) in BLOCKS {
        let block = block.to_owned();
        let ask = Source::default().command(&Command::RecvBitmap { block: block.clone() });
        send(source, &ask.bytes);
        assert_eq!(hear(source), Some(ReturnMessage::RecvBitmap { block }));
        let len = (size / 4096 / 8) as usize;
        let mut bytes = vec![0; 8 + len + 8];
        source.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes[..8], (len as u64).to_be_bytes());
        assert!(bytes[8..8 + len].iter().all(|byte| *byte == 0));
        assert_eq!(bytes[8 + len..], 0x0123_4567_89ab_cdefu64.to_be_bytes());
    }
}

#[test]
fn a_save_that_broke_off_in_postcopy_is_finished_by_another_pager() {
    let mut saving = Saving::start(&[]);
    let mut source = saving.connect();
    let stream = Source::new().return_path().advise().ram(&BLOCKS).package(&state());
    send(&mut source, &stream.bytes);
    assert_eq!([1, 3, 0x42].map(|_| hear(&mut source)), [1, 3, 0x42].map(pong));
    saving.signal(Signal::KILL);
    assert_eq!(hear(&mut source), None);
    saving.wait();
    assert!(saving.names().contains(&"image.recover".into()) && !saving.image().exists());

    // Another guest would take the place of this one.
    saving.launch(&[]);
    let (status, _, err) = saving.wait();
    assert!(status == Some(2) && err.contains("finish it with --recover"), "{status:?} {err}");

    // One that breaks off, too, loses nothing.
    for last in [false, true] {
        saving.launch(&["--recover"]);
        saving.wait_listening();
        let mut source = saving.connect();
        ask_for_received(&mut source);
        let resume = Source::default().command(&Command::PostcopyResume);
        send(&mut source, &resume.bytes);
        assert_eq!(hear(&mut source), Some(ReturnMessage::ResumeAck));
        let pages = Source::default().section(SectionKind::Part).page("ram", 0, Some(&content(1)));
        let pages = pages.page("vmem", 512 << 20, Some(&content(2))).end_section();
        send(&mut source, &pages.bytes);
        if !last {
            drop(source);
            let (status, _, err) = saving.wait();
            assert!(status == Some(1) && err.contains("--recover"), "{status:?} {err}");
            continue;
        }
        send(&mut source, &Source::default().end_postcopy().bytes);
        assert_eq!(hear(&mut source), SAVED);
    }
    assert_eq!(saving.wait(), (Some(0), String::new(), String::new()));
    let two = BTreeMap::from([
        (("ram".to_owned(), 0), content(1).to_vec()),
        (("vmem".to_owned(), 131_072), content(2).to_vec()),
    ]);
    assert_eq!(saved_pages(&saving), two);
    assert_eq!(saving.names(), ["image"]);
    let image = fs::read(saving.image()).unwrap();
    assert!(image.ends_with(&[&state()[..], &[0]].concat()), "the devices are not those of before");

    saving.launch(&["--recover"]);
    let (status, _, err) = saving.wait();
    assert!(status == Some(1) && err.contains("image.recover"), "{status:?} {err}");
}

#[test]
fn a_recovery_takes_nothing_but_what_a_paused_source_sends() {
    let mut saving = Saving::start(&[]);
    let mut source = saving.connect();
    let stream = Source::new().return_path().advise().ram(&BLOCKS).package(&state());
    send(&mut source, &stream.bytes);
    assert_eq!([1, 3, 0x42].map(|_| hear(&mut source)), [1, 3, 0x42].map(pong));
    drop(source);
    saving.wait();
    let unknown = Command::RecvBitmap { block: "other".to_owned() };
    for (stream, expected) in [
        (Source::default().command(&unknown), "\"other\""),
        (
            Source::default().command(&Command::PostcopyResume).command(&Command::PostcopyResume),
            "a recovery of postcopy",
        ),
        (Source::default().command(&Command::PostcopyListen), "not understood"),
    ] {
        saving.launch(&["--recover"]);
        saving.wait_listening();
        let mut source = saving.connect();
        send(&mut source, &stream.bytes);
        let (status, _, err) = saving.wait();
        assert!(status == Some(1) && err.contains(expected), "{status:?} {err}");
        assert_eq!(saving.names(), ["image.recover"]);
    }
    // What is kept may be damaged.
    let kept = saving.image().with_file_name("image.recover");
    let bytes = fs::read(&kept).unwrap();
    for bytes in [&bytes[..bytes.len() - 1], &bytes[..60], b"QEVM"] {
        fs::write(&kept, bytes).unwrap();
        saving.launch(&["--recover"]);
        saving.wait_listening();
        let mut source = saving.connect();
        ask_and_leave(&mut source);
        let (status, _, err) = saving.wait();
        assert!(status == Some(1) && !err.is_empty(), "{status:?} {err}");
    }
}

fn ask_and_leave(source: &mut UnixStream) {
    let ask = Source::default().command(&Command::RecvBitmap { block: "ram".to_owned() });
    send(source, &ask.bytes);
    while hear(source).is_some() {}
}
