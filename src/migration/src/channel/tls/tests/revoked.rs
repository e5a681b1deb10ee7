//! Certificates that the CA has revoked, in `ca-crl.pem`.

use rcgen::{
    CertificateRevocationListParams, KeyIdMethod, RevocationReason, RevokedCertParams, SerialNumber,
};

use super::*;

/// Serial numbers of the two sides.
const CLIENT: u64 = 7;
const SERVER: u64 = 8;

impl Ca {
    /// A list of what is revoked, as text.
    fn revoke(&self, serials: &[u64]) -> String {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: Some(RevocationReason::KeyCompromise),
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(4096, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).unwrap().pem().unwrap()
    }
}

/// A folder whose certificates have these serial numbers.
fn numbered(ca: &Ca) -> Dir {
    let dir = Dir::new(ca);
    let serial = |number: u64| {
        move |params: &mut CertificateParams| {
            params.serial_number = Some(SerialNumber::from(number));
        }
    };
    dir.put_pair("client", &ca.sign("here.example", serial(CLIENT)));
    dir.put_pair("server", &ca.sign("there.example", serial(SERVER)));
    dir
}

#[test]
fn a_peer_whose_certificate_is_revoked_is_refused_and_hears_why() {
    let ca = Ca::new("ca");
    let (plain, strict) = (numbered(&ca), numbered(&ca));
    let client = |dir: &Dir| TlsClient::from_dir(&dir.path(), "there.example").unwrap();
    let server = |dir: &Dir| TlsServer::from_dir(&dir.path()).unwrap();
    let both = |(here, there): (Result<Channel, String>, Result<Channel, String>)| {
        (here.unwrap_err(), there.unwrap_err())
    };

    // One side alone has the list, with another number than its own.
    strict.put("ca-crl.pem", &ca.revoke(&[CLIENT, 99]));
    let (here, there) = both(connect(client(&plain), server(&strict)));
    assert!(there.contains("the client's certificate is refused: it is revoked"), "{there}");
    assert!(there.contains("ca-crl.pem"), "{there}");
    let expected =
        "the server refuses this side's certificate in client-cert.pem: CertificateRevoked";
    assert!(here.contains(expected), "{here}");

    strict.put("ca-crl.pem", &ca.revoke(&[SERVER]));
    let (here, there) = both(connect(client(&strict), server(&plain)));
    assert!(here.contains("the server's certificate is refused: it is revoked"), "{here}");
    let expected =
        "the client refuses this side's certificate in server-cert.pem: CertificateRevoked";
    assert!(there.contains(expected), "{there}");

    // What is not in it connects.
    strict.put("ca-crl.pem", &ca.revoke(&[99]));
    let (here, there) = connect(client(&strict), server(&strict));
    here.unwrap();
    there.unwrap();
}

#[test]
fn a_list_that_cannot_be_used_is_refused_by_name_and_never_passed_over() {
    let ca = Ca::new("ca");
    let dir = numbered(&ca);
    let wrong = || {
        let client = TlsClient::from_dir(&dir.path(), "there.example").map(drop);
        let server = TlsServer::from_dir(&dir.path()).map(drop);
        [client, server].map(|made| made.unwrap_err().to_string())
    };
    let list = dir.path().join("ca-crl.pem");
    let broken = "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n";
    let cut = ca.revoke(&[99]);
    let certificate = ca.pem.clone();
    for text in ["", "nothing", broken, &cut[..cut.len() / 2], &certificate] {
        fs::write(&list, text).unwrap();
        for error in wrong() {
            assert!(error.starts_with(&list.display().to_string()), "{text:?}: {error}");
        }
    }
    fs::remove_file(&list).unwrap();
    fs::create_dir(&list).unwrap();
    for error in wrong() {
        assert!(error.starts_with(&list.display().to_string()), "{error}");
    }
    fs::remove_dir(&list).unwrap();

    // This side's own certificate is revoked.
    dir.put("ca-crl.pem", &ca.revoke(&[CLIENT, SERVER]));
    for (error, file) in wrong().iter().zip(["client-cert.pem", "server-cert.pem"]) {
        let file = dir.path().join(file).display().to_string();
        assert!(error.starts_with(&file) && error.contains("evoked"), "{error}");
    }

    // A list of another CA says nothing of these.
    dir.put("ca-crl.pem", &Ca::new("other").revoke(&[99]));
    for error in wrong() {
        assert!(error.contains("the other side would refuse it: "), "{error}");
    }
}
