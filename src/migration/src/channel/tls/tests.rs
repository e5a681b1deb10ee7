//! Certificates of all kinds, peers that are not the ones, and guests that go over TLS.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    date_time_ymd,
};
use tempfile::TempDir;

use super::*;
use crate::channel::Sink;

mod revoked;
mod whole;

const LONG: Duration = Duration::from_secs(60);

/// A CA, and what it signs.
struct Ca {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// A certificate and its key, as text.
    fn sign(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> (String, String) {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let pem = params.signed_by(&key, &self.issuer).unwrap().pem();
        (pem, key.serialize_pem())
    }
}

fn expired(params: &mut CertificateParams) {
    params.not_before = date_time_ymd(2000, 1, 1);
    params.not_after = date_time_ymd(2001, 1, 1);
}

/// A folder with the files of both sides.
struct Dir(TempDir);

impl Dir {
    fn new(ca: &Ca) -> Self {
        let dir = Self(tempfile::tempdir().unwrap());
        dir.put("ca-cert.pem", &ca.pem);
        dir.put_pair("server", &ca.sign("there.example", |_| {}));
        dir.put_pair("client", &ca.sign("here.example", |_| {}));
        dir
    }

    fn put(&self, name: &str, text: &str) {
        fs::write(self.path().join(name), text).unwrap();
    }

    fn put_pair(&self, side: &str, (certificate, key): &(String, String)) {
        self.put(&format!("{side}-cert.pem"), certificate);
        self.put(&format!("{side}-key.pem"), key);
    }

    fn path(&self) -> PathBuf {
        self.0.path().to_owned()
    }
}

fn progress() -> Arc<Progress> {
    Arc::new(Progress::new())
}

/// What both sides come to, the client after it has written and heard something.
fn connect(
    client: TlsClient,
    server: TlsServer,
) -> (Result<Channel, String>, Result<Channel, String>) {
    let (near, far) = UnixStream::pair().unwrap();
    let there = thread::spawn(move || {
        let mut channel = server.accept(far, &progress()).map_err(|error| error.to_string())?;
        channel.write(b"hello").map_err(|error| error.to_string())?;
        Ok(channel)
    });
    let here = client.connect(near, &progress()).map_err(|error| error.to_string());
    let here = here.and_then(|mut channel| {
        channel.set_read_patience(Some(LONG));
        let mut hello = [0; 5];
        channel.read_exact(&mut hello).map_err(|error| error.to_string())?;
        assert_eq!(&hello, b"hello");
        Ok(channel)
    });
    (here, there.join().unwrap())
}

#[test]
fn what_is_said_arrives_in_pieces_of_any_size_and_its_end_is_told_from_a_cut() {
    let dir = Dir::new(&Ca::new("ca"));
    let client = TlsClient::from_dir(&dir.path(), "there.example").unwrap();
    let client = client.with_handshake_timeout(Duration::MAX);
    let server = TlsServer::from_dir_for(&dir.path(), "here.example").unwrap();
    let (here, there) = connect(client, server);
    let (mut here, mut there) = (here.unwrap(), there.unwrap());
    assert!(here.descriptor().is_none());
    let content: Vec<u8> = (0..5_000_000u32).map(|at| (at / 3) as u8).collect();
    let expected = content.clone();
    let writer = thread::spawn(move || {
        for piece in content.chunks(700_001) {
            here.write(piece).unwrap();
        }
        here
    });
    let mut read = vec![0; expected.len()];
    there.read_exact(&mut read).unwrap();
    assert!(read == expected);
    let here = writer.join().unwrap();
    // Both directions at once, and the end of one of them.
    here.shutdown_write();
    assert_eq!(there.read(&mut [0; 10]).unwrap(), 0);
    there.write(b"last word").unwrap();
    let mut last = [0; 9];
    let mut reading = here.clone_handle();
    reading.read_exact(&mut last).unwrap();
    assert_eq!(&last, b"last word");
}

#[test]
fn a_connection_that_is_cut_is_an_error_and_not_an_end() {
    let dir = Dir::new(&Ca::new("ca"));
    let client = TlsClient::from_dir(&dir.path(), "there.example").unwrap();
    let server = TlsServer::from_dir(&dir.path()).unwrap();
    // Between the two a relay that closes without a word.
    let (near, mut left) = UnixStream::pair().unwrap();
    let (mut right, far) = UnixStream::pair().unwrap();
    let (mut back_from, mut back_to) = (right.try_clone().unwrap(), left.try_clone().unwrap());
    let there = thread::spawn(move || {
        let mut channel = server.accept(far, &progress()).unwrap();
        channel.set_read_patience(Some(LONG));
        let mut first = [0; 5];
        channel.read_exact(&mut first).unwrap();
        channel.read(&mut first).unwrap_err()
    });
    thread::spawn(move || std::io::copy(&mut back_from, &mut back_to));
    let mut here = None;
    thread::scope(|scope| {
        let cut = right.try_clone().unwrap();
        scope.spawn(move || {
            let _ = std::io::copy(&mut left, &mut right);
        });
        let mut channel = client.connect(near, &progress()).unwrap();
        channel.write(b"hello").unwrap();
        // The relay has passed it on, since the server answers nothing more.
        thread::sleep(Duration::from_millis(50));
        cut.shutdown(std::net::Shutdown::Both).unwrap();
        let error = there.join().unwrap();
        assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof, "{error}");
        assert!(error.to_string().contains("it was cut"), "{error}");
        channel.shutdown();
        here = Some(channel);
    });
}

#[test]
fn whose_certificate_is_wrong_and_why_is_said_on_the_side_that_sees_it_and_on_the_other() {
    let (ca, other) = (Ca::new("ca"), Ca::new("other"));
    let dir = Dir::new(&ca);
    let client = |dir: &Dir, name: &str| TlsClient::from_dir(&dir.path(), name).unwrap();
    let server = |dir: &Dir| TlsServer::from_dir(&dir.path()).unwrap();

    // A server of another name.
    let (here, there) = connect(client(&dir, "elsewhere.example"), server(&dir));
    let (here, there) = (here.unwrap_err(), there.unwrap_err());
    assert!(here.contains("the server's certificate is refused"), "{here}");
    assert!(here.contains("and of the name elsewhere.example"), "{here}");
    assert!(
        there.contains("the client refuses this side's certificate in server-cert.pem"),
        "{there}"
    );

    // A server, and a client, of another CA.
    let stranger = Dir::new(&other);
    let (here, there) = connect(client(&dir, "there.example"), server(&stranger));
    let (here, there) = (here.unwrap_err(), there.unwrap_err());
    assert!(here.contains("the server's certificate is refused: "), "{here}");
    assert!(here.contains("issued by the CA in ca-cert.pem"), "{here}");
    assert!(there.contains("refuses this side's certificate in server-cert.pem"), "{there}");
    stranger.put("ca-cert.pem", &(ca.pem.clone() + &other.pem));
    let (here, there) = connect(client(&stranger, "there.example"), server(&dir));
    let (here, there) = (here.unwrap_err(), there.unwrap_err());
    assert!(there.contains("the client's certificate is refused: "), "{there}");
    assert!(
        here.contains("the server refuses this side's certificate in client-cert.pem"),
        "{here}"
    );

    // A client of another name than the server wants.
    let wants = TlsServer::from_dir_for(&dir.path(), "another.example").unwrap();
    let (here, there) = connect(client(&dir, "there.example"), wants);
    let (here, there) = (here.unwrap_err(), there.unwrap_err());
    assert!(there.contains("the client's certificate is refused: "), "{there}");
    assert!(here.contains("refuses this side's certificate in client-cert.pem"), "{here}");
}

#[test]
fn files_that_the_other_side_would_refuse_are_refused_where_they_are() {
    let ca = Ca::new("ca");
    let dir = Dir::new(&ca);
    let wrong = |dir: &Dir| {
        let client = TlsClient::from_dir(&dir.path(), "there.example").map(drop);
        let server = TlsServer::from_dir(&dir.path()).map(drop);
        [client, server].map(|made| made.err().map(|error| error.to_string()).unwrap_or_default())
    };
    assert_eq!(wrong(&dir), ["", ""]);
    let says = |text: &str, file: &str, what: &str| {
        let file = dir.path().join(file);
        assert!(text.starts_with(&file.display().to_string()), "{text}");
        assert!(text.contains(what), "{what}: {text}");
    };

    dir.put_pair("server", &ca.sign("there.example", expired));
    dir.put_pair("client", &ca.sign("here.example", expired));
    let [client, server] = wrong(&dir);
    says(&client, "client-cert.pem", "the other side would refuse it: ");
    says(&server, "server-cert.pem", "expired");
    assert!(client.contains("expired"), "{client}");

    // Signed by another; a key of another certificate; no certificate; no file.
    let dir_of_other = Ca::new("other").sign("there.example", |_| {});
    dir.put_pair("server", &dir_of_other);
    says(&wrong(&dir)[1], "server-cert.pem", "the other side would refuse it: ");
    dir.put("server-cert.pem", &ca.sign("there.example", |_| {}).0);
    says(&wrong(&dir)[1], "server-key.pem", "it does not go with");
    dir.put("server-cert.pem", "nothing");
    says(&wrong(&dir)[1], "server-cert.pem", "there is no certificate in it");
    fs::remove_file(dir.path().join("client-key.pem")).unwrap();
    dir.put_pair("server", &ca.sign("there.example", |_| {}));
    dir.put("client-cert.pem", &ca.sign("here.example", |_| {}).0);
    says(&wrong(&dir)[0], "client-key.pem", "No such file");
    fs::remove_file(dir.path().join("ca-cert.pem")).unwrap();
    says(&wrong(&dir)[1], "ca-cert.pem", "No such file");
    let name = TlsClient::from_dir(&dir.path(), "not a name").unwrap_err().to_string();
    assert!(name.contains("neither a host name nor an IP address"), "{name}");
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let dir = Dir::new(&Ca::new("ca"));
    let client = TlsClient::from_dir(&dir.path(), "there.example").unwrap();
    let mut roots = rustls::RootCertStore::empty();
    for certificate in credentials::certificates(&dir.path().join("ca-cert.pem")).unwrap() {
        roots.add(certificate).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let client = TlsClient { config: Arc::new(config), ..client };
    let (here, there) = connect(client, TlsServer::from_dir(&dir.path()).unwrap());
    let (here, there) = (here.unwrap_err(), there.unwrap_err());
    assert!(there.contains("the client has no certificate, and must have one"), "{there}");
    assert!(here.contains("CertificateRequired"), "{here}");
}

#[test]
fn a_peer_in_the_clear_gets_nothing_but_an_alert() {
    let dir = Dir::new(&Ca::new("ca"));
    for _ in 0..2 {
        let server = TlsServer::from_dir(&dir.path()).unwrap();
        let (mut near, far) = UnixStream::pair().unwrap();
        near.write_all(b"QEVM\0\0\0\x03\x07").unwrap();
        let error = server.accept(far, &progress()).unwrap_err().to_string();
        assert!(error.contains("the client does not speak TLS"), "{error}");
        let mut heard = Vec::new();
        near.read_to_end(&mut heard).unwrap();
        // A record of an alert, at most.
        assert!(heard.first().is_none_or(|first| *first == 0x15), "{heard:?}");

        let client = TlsClient::from_dir(&dir.path(), "there.example").unwrap();
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(b"QEVM\0\0\0\x03\x07").unwrap();
        let error = client.connect(near, &progress()).unwrap_err().to_string();
        assert!(error.contains("the server does not speak TLS"), "{error}");
        let (mut said, guest) = (Vec::new(), b"small-vmm");
        far.read_to_end(&mut said).unwrap();
        assert_eq!(said[0], 0x16);
        assert!(!said.windows(guest.len()).any(|bytes| bytes == guest));
    }
}

#[test]
fn a_handshake_that_stalls_or_trickles_ends_and_can_be_cancelled() {
    let dir = Dir::new(&Ca::new("ca"));
    let moment = Duration::from_millis(100);
    let server = TlsServer::from_dir(&dir.path()).unwrap().with_handshake_timeout(moment);
    let client = TlsClient::from_dir(&dir.path(), "there.example").unwrap();
    let client = client.with_handshake_timeout(moment);
    let (near, far) = UnixStream::pair().unwrap();
    let error = server.accept(far, &progress()).unwrap_err().to_string();
    assert!(
        error.contains("the client has not finished the TLS handshake within 100ms"),
        "{error}"
    );
    drop(near);
    let (near, _far) = UnixStream::pair().unwrap();
    let error = client.connect(near, &progress()).unwrap_err().to_string();
    assert!(
        error.contains("the server has not finished the TLS handshake within 100ms"),
        "{error}"
    );

    // A byte now and then, of a record that is as it should be.
    let (mut near, far) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        let hello = [0x16, 3, 1, 0x10, 0, 1, 0, 0x0f, 0xfc, 3, 3];
        for byte in hello.into_iter().chain(std::iter::repeat(0)) {
            if near.write_all(&[byte]).is_err() {
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
    });
    let error = server.accept(far, &progress()).unwrap_err();
    assert!(matches!(error, TlsError::Stalled { .. }), "{error}");

    let (_near, far) = UnixStream::pair().unwrap();
    let cancelled = progress();
    cancelled.cancel();
    let error = server.with_handshake_timeout(LONG).accept(far, &cancelled).unwrap_err();
    assert!(matches!(error, TlsError::Cancelled), "{error}");
}

#[test]
fn bytes_that_were_changed_on_their_way_are_noticed() {
    let dir = Dir::new(&Ca::new("ca"));
    let client = TlsClient::from_dir(&dir.path(), "there.example").unwrap();
    let server = TlsServer::from_dir(&dir.path()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut raw = near.try_clone().unwrap();
    let far = listener.accept().unwrap().0;
    let there = thread::spawn(move || {
        let mut channel = server.accept(far, &progress()).unwrap();
        channel.set_read_patience(Some(LONG));
        let mut page = [0; 5];
        channel.read_exact(&mut page).unwrap();
        channel.read_exact(&mut page).unwrap_err()
    });
    let mut here = client.connect(near, &progress()).unwrap();
    here.write(b"hello").unwrap();
    // A record of data that no key has made.
    raw.write_all(&[&[0x17, 3, 3, 0, 32][..], &[7; 32]].concat()).unwrap();
    let error = there.join().unwrap().to_string();
    assert!(error.contains("what the client says was damaged or changed on its way"), "{error}");
    // And this side hears of it.
    let error = loop {
        if let Err(error) = here.write(&[0; 4096]) {
            break error.to_string();
        }
    };
    assert!(error.contains("the server"), "{error}");
}
