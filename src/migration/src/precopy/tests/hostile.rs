//! Streams that no source sends.

use std::io::{Read, Write};

use super::*;
use crate::stream::{Command, put_command, put_eof, put_header};

/// What a destination says to `stream`; it does not run the guest.
fn refusal(stream: Vec<u8>) -> String {
    let (mut near, far) = UnixStream::pair().unwrap();
    let source = thread::spawn(move || {
        let _ = near.write_all(&stream);
        let _ = near.shutdown(std::net::Shutdown::Write);
        let _ = near.read_to_end(&mut Vec::new());
    });
    let (guest, progress) = (Witness::default(), Arc::new(Progress::new()));
    let incoming = Incoming {
        configuration: Configuration::new("test"),
        guest: &guest,
        handlers: Vec::new(),
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    let result = incoming.run(Channel::new(far, progress).unwrap());
    source.join().unwrap();
    assert!(guest.log().is_empty());
    result.unwrap_err().to_string()
}

fn packaged(inner: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_command(&mut bytes, &Command::Packaged { len: inner.len() as u32 });
    bytes.extend_from_slice(inner);
    bytes
}

#[test]
fn a_package_in_a_package_is_refused_however_deep() {
    let mut header = Vec::new();
    put_header(&mut header, &Configuration::new("test"));
    // Each level says how long all that is in it is.
    const LEVELS: u32 = 20_000;
    let level = packaged(&[]).len() as u32;
    let mut nested = header.clone();
    for inside in (0..LEVELS).rev() {
        put_command(&mut nested, &Command::Packaged { len: inside * level });
    }
    for stream in [nested, [header, packaged(&packaged(&[]))].concat()] {
        let error = refusal(stream);
        assert!(error.contains("\"Command(Packaged {"), "{error}");
        assert!(error.contains("inside a package"), "{error}");
    }
}

#[test]
fn the_end_of_the_stream_in_a_package_is_refused() {
    let (mut stream, mut end) = (Vec::new(), Vec::new());
    put_header(&mut stream, &Configuration::new("test"));
    put_eof(&mut end);
    let at = stream.len();
    stream.extend(packaged(&end));
    let error = refusal(stream);
    assert_eq!(error, format!("section \"Eof\" at byte {at:#x} of the stream: inside a package"));
}
