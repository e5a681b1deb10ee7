//! Whole migrations of which one side is refused, or does not speak TLS.

use super::*;
use crate::devices::NoDevices;
use crate::dirty::{DirtyTracker, NeverWritten};
use crate::precopy::{Guest, Incoming, Outgoing, Parameters};
use crate::ram::{ListOptions, MigrationBlock, RamLoad, RamSave};
use crate::stream::Configuration;
use crate::test_support::{Side, fill};

struct Still;

impl Guest for Still {
    fn stop(&self) -> Result<(), String> {
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        Ok(())
    }
}

/// What a source says that migrates a guest over `channel`, which does not come about.
fn refused(channel: Channel) -> String {
    let from = Side::new(&[1, 4, 5]);
    fill(&from.region, 64..128, 7);
    let progress = progress();
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::new(NeverWritten) };
    let options = ListOptions::default();
    let ram = RamSave::new(&from.blocks, options, Arc::clone(&progress), tracker).unwrap();
    let outgoing = Outgoing {
        parameters: Parameters::new(Configuration::new("test")),
        guest: &Still,
        handlers: vec![Box::new(ram)],
        devices: &mut NoDevices,
        postcopy: None,
        progress,
    };
    outgoing.run(channel).unwrap_err().to_string()
}

fn tcp() -> (OwnedFd, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near.into(), listener.accept().unwrap().0.into())
}

fn unix() -> (OwnedFd, OwnedFd) {
    let (near, far) = UnixStream::pair().unwrap();
    (near.into(), far.into())
}

const PAIRS: [fn() -> (OwnedFd, OwnedFd); 2] = [tcp, unix];

#[test]
fn a_source_that_is_refused_says_which_certificate_is_wrong_however_late_it_looks() {
    let (ca, other) = (Ca::new("ca"), Ca::new("other"));
    let (dir, stranger) = (Dir::new(&ca), Dir::new(&other));
    stranger.put("ca-cert.pem", &(ca.pem.clone() + &other.pem));
    for (pair, waits) in PAIRS.into_iter().flat_map(|pair| [(pair, false), (pair, true)]) {
        let client = TlsClient::from_dir(&stranger.path(), "there.example").unwrap();
        let server = TlsServer::from_dir(&dir.path()).unwrap();
        let (near, far) = pair();
        let there = thread::spawn(move || server.accept(far, &progress()).unwrap_err());
        let channel = client.connect(near, &progress()).unwrap();
        let there = if waits { Err(there.join().unwrap()) } else { Ok(there) };
        let error = refused(channel);
        let there = there.map_or_else(|error| error, |there| there.join().unwrap()).to_string();
        assert!(there.contains("the client's certificate is refused: "), "{there}");
        let expected = "the server refuses this side's certificate in client-cert.pem";
        assert!(error.contains(expected), "waits {waits}: {error}");
    }
}

#[test]
fn what_is_written_after_another_thread_has_read_why_fails_with_that() {
    let (ca, other) = (Ca::new("ca"), Ca::new("other"));
    let (dir, stranger) = (Dir::new(&ca), Dir::new(&other));
    stranger.put("ca-cert.pem", &(ca.pem.clone() + &other.pem));
    for reads in [true, false] {
        let client = TlsClient::from_dir(&stranger.path(), "there.example").unwrap();
        let server = TlsServer::from_dir(&dir.path()).unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        let there = thread::spawn(move || server.accept(far, &progress()).unwrap_err());
        let mut channel = client.connect(near, &progress()).unwrap();
        there.join().unwrap();
        let mut said = Vec::new();
        if reads {
            said.push(channel.read(&mut [0; 10]).unwrap_err());
        } else {
            assert!(channel.is_readable(LONG));
        }
        said.extend((0..3).map(|_| channel.write(b"QEVM").unwrap_err()));
        for error in said.into_iter().map(|error| error.to_string()) {
            assert!(
                error.contains("refuses this side's certificate in client-cert.pem"),
                "{error}"
            );
        }
    }
}

#[test]
fn a_source_in_the_clear_hears_that_the_destination_speaks_tls() {
    let dir = Dir::new(&Ca::new("ca"));
    for pair in PAIRS {
        let server = TlsServer::from_dir(&dir.path()).unwrap();
        let (near, far) = pair();
        let there = thread::spawn(move || server.accept(far, &progress()).unwrap_err());
        let error = refused(Channel::new(near, progress()).unwrap());
        let there = there.join().unwrap().to_string();
        assert!(there.contains("the client does not speak TLS"), "{there}");
        let expected = "the other side encrypts this channel, and this side does not";
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn whatever_is_written_fails_with_what_a_peer_of_tls_has_said() {
    let alert = [0x15, 3, 3, 0, 2, 2, 10];
    let (from, mut memory) = (Side::new(&[1]), crate::sys::GatherWrite::new());
    for gathers in [false, true] {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(&alert).unwrap();
        drop(far);
        let mut channel = Channel::new(near, progress()).unwrap();
        let written = if gathers {
            memory.push_memory(from.blocks.get("vmem0").unwrap().mapping(), 64 * 4096, 4096);
            channel.write_gathered(&mut memory)
        } else {
            channel.write(b"QEVM")
        };
        let error = written.unwrap_err().to_string();
        assert!(error.contains("the other side encrypts this channel"), "{error}");
        // It is still there for who reads.
        let mut heard = [0; 7];
        channel.read_exact(&mut heard).unwrap();
        assert_eq!(heard, alert);
    }
    // A peer that said something else.
    let (near, mut far) = UnixStream::pair().unwrap();
    far.write_all(&[0, 2, 0, 4, 0, 0, 0, 1]).unwrap();
    drop(far);
    let error = Channel::new(near, progress()).unwrap().write(b"QEVM").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
}

#[test]
fn a_destination_in_the_clear_says_that_the_source_speaks_tls_and_the_source_hears_of_it() {
    let dir = Dir::new(&Ca::new("ca"));
    for pair in PAIRS {
        let client = TlsClient::from_dir(&dir.path(), "there.example").unwrap();
        let (near, far) = pair();
        let there = thread::spawn(move || {
            let (to, progress) = (Side::new(&[1]), progress());
            let options = ListOptions::default();
            let ram = RamLoad::new(Arc::clone(&to.blocks), options, Arc::clone(&progress));
            let incoming = Incoming {
                configuration: Configuration::new("test"),
                guest: &Still,
                handlers: vec![Box::new(ram)],
                devices: &mut NoDevices,
                postcopy: None,
                progress: Arc::clone(&progress),
            };
            incoming.run(Channel::new(far, progress).unwrap()).unwrap_err().to_string()
        });
        let error = client.connect(near, &progress()).unwrap_err().to_string();
        assert!(error.contains("the server closed the connection in the TLS handshake"), "{error}");
        assert!(error.contains("whether it speaks TLS"), "{error}");
        let there = there.join().unwrap();
        assert!(there.contains("the other side encrypts this channel"), "{there}");
    }
}

#[test]
fn a_peer_that_closes_before_the_handshake_is_said_to_have_closed() {
    let dir = Dir::new(&Ca::new("ca"));
    for pair in PAIRS {
        let client = TlsClient::from_dir(&dir.path(), "there.example").unwrap();
        let (near, far) = pair();
        drop(far);
        let error = client.connect(near, &progress()).unwrap_err().to_string();
        assert!(error.contains("the server closed the connection in the TLS handshake"), "{error}");
        let server = TlsServer::from_dir(&dir.path()).unwrap();
        let (near, far) = pair();
        drop(near);
        let error = server.accept(far, &progress()).unwrap_err().to_string();
        assert!(error.contains("the client closed the connection in the TLS handshake"), "{error}");
    }
}
