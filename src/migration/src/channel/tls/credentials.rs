//! Certificates and keys, read from a folder and checked as far as one side can.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::ServerCertVerifier;
use rustls::client::{Resumption, WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, VerifierBuilderError, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore,
    ServerConfig, SignatureScheme,
};

use super::error::TlsError;

type Chain = Vec<CertificateDer<'static>>;

/// What both sides have.
struct Authority {
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    revoked: Vec<CertificateRevocationListDer<'static>>,
    /// To be named in errors.
    path: PathBuf,
    /// The file of what is revoked.
    list: PathBuf,
}

impl Authority {
    fn read(dir: &Path) -> Result<Self, TlsError> {
        let path = dir.join("ca-cert.pem");
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&path)? {
            roots.add(certificate).map_err(|error| wrong(&path, error))?;
        }
        let list = dir.join("ca-crl.pem");
        let revoked = revocations(&list)?;
        let provider = Arc::new(ring::default_provider());
        Ok(Self { provider, roots: Arc::new(roots), revoked, path, list })
    }

    /// Which file the library refuses.
    fn wrong(&self, error: VerifierBuilderError) -> TlsError {
        let list = matches!(error, VerifierBuilderError::InvalidCrl(_));
        wrong(if list { &self.list } else { &self.path }, error)
    }

    fn of_servers(&self) -> Result<Arc<WebPkiServerVerifier>, TlsError> {
        let roots = Arc::clone(&self.roots);
        WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&self.provider))
            .with_crls(self.revoked.iter().cloned())
            .only_check_end_entity_revocation()
            .build()
            .map_err(|error| self.wrong(error))
    }

    fn of_clients(&self) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        let roots = Arc::clone(&self.roots);
        WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&self.provider))
            .with_crls(self.revoked.iter().cloned())
            .only_check_end_entity_revocation()
            .build()
            .map_err(|error| self.wrong(error))
    }
}

/// What is revoked, where there is such a file. One that is there and cannot be read, or has no list, is not taken for
/// one by which nothing is revoked.
fn revocations(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    if !path.try_exists().map_err(|error| wrong(path, error))? {
        return Ok(Vec::new());
    }
    let read = CertificateRevocationListDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let found = read.map_err(|error| wrong(path, error))?;
    if found.is_empty() {
        return Err(wrong(path, "there is no revocation list in it"));
    }
    Ok(found)
}

fn wrong(path: &Path, why: impl ToString) -> TlsError {
    TlsError::File { path: path.to_owned(), what: why.to_string() }
}

pub(super) fn certificates(path: &Path) -> Result<Chain, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Chain, _>>);
    let found = read.map_err(|error| wrong(path, error))?;
    if found.is_empty() {
        return Err(wrong(path, "there is no certificate in it"));
    }
    Ok(found)
}

/// The certificate of one side with its chain, and the key.
struct Own {
    path: PathBuf,
    chain: Chain,
    key_path: PathBuf,
    key: PrivateKeyDer<'static>,
}

impl Own {
    fn read(dir: &Path, side: &str) -> Result<Self, TlsError> {
        let path = dir.join(format!("{side}-cert.pem"));
        let key_path = dir.join(format!("{side}-key.pem"));
        let chain = certificates(&path)?;
        let key =
            PrivateKeyDer::from_pem_file(&key_path).map_err(|error| wrong(&key_path, error))?;
        Ok(Self { path, chain, key_path, key })
    }

    /// An error of the two together.
    fn refused(path: &Path, key_path: &Path, error: rustls::Error) -> TlsError {
        wrong(key_path, format!("it does not go with {}: {error}", path.display()))
    }
}

/// As a client would, so that what it would refuse is said where it can be mended.
fn check_own(own: &Own, verified: Result<(), rustls::Error>) -> Result<(), TlsError> {
    match verified {
        Ok(()) => Ok(()),
        Err(error) => {
            let what = format!("the other side would refuse it: {error}");
            Err(TlsError::File { path: own.path.clone(), what })
        }
    }
}

pub(super) fn client(dir: &Path) -> Result<Arc<ClientConfig>, TlsError> {
    let authority = Authority::read(dir)?;
    let own = Own::read(dir, "client")?;
    let verifier = authority.of_clients()?;
    let (leaf, between) = (&own.chain[0], &own.chain[1..]);
    let verified = verifier.verify_client_cert(leaf, between, UnixTime::now());
    check_own(&own, verified.map(drop))?;
    let Own { path, chain, key_path, key } = own;
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&authority.provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| TlsError::Setup { what: error.to_string() })?
        .with_webpki_verifier(authority.of_servers()?)
        .with_client_auth_cert(chain, key)
        .map_err(|error| Own::refused(&path, &key_path, error))?;
    // Each connection is for itself.
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

pub(super) fn server(
    dir: &Path,
    client: Option<ServerName<'static>>,
) -> Result<Arc<ServerConfig>, TlsError> {
    let authority = Authority::read(dir)?;
    let own = Own::read(dir, "server")?;
    let (leaf, between) = (&own.chain[0], &own.chain[1..]);
    // Of whatever name it is, which is looked at last.
    let any = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
    let verified =
        authority.of_servers()?.verify_server_cert(leaf, between, &any, &[], UnixTime::now());
    let verified = match verified {
        Err(rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        )) => Ok(()),
        verified => verified.map(drop),
    };
    check_own(&own, verified)?;
    let mut verifier = authority.of_clients()?;
    if let Some(name) = client {
        verifier = Arc::new(Named { inner: verifier, name });
    }
    let Own { path, chain, key_path, key } = own;
    let mut config = ServerConfig::builder_with_provider(Arc::clone(&authority.provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| TlsError::Setup { what: error.to_string() })?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|error| Own::refused(&path, &key_path, error))?;
    // A source that never reads would leave them unread, and closing would then take pages that are under way.
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Clients of one name.
#[derive(Debug)]
struct Named {
    inner: Arc<dyn ClientCertVerifier>,
    name: ServerName<'static>,
}

impl ClientCertVerifier for Named {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.inner.verify_client_cert(leaf, between, now)?;
        verify_server_name(&ParsedCertificate::try_from(leaf)?, &self.name)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
