//! Certificates for one run: a CA, and one for each side, in the files that QEMU has them in.

use std::fs;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use tempfile::TempDir;

/// A folder with the certificates of both sides, of the names `localhost` and 127.0.0.1. It goes with what is
/// returned.
///
/// # Errors
///
/// When they cannot be made or written.
pub fn make() -> anyhow::Result<TempDir> {
    let dir = tempfile::tempdir()?;
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.distinguished_name.push(DnType::CommonName, "small-vmm demo");
    let key = KeyPair::generate()?;
    fs::write(dir.path().join("ca-cert.pem"), authority.self_signed(&key)?.pem())?;
    let issuer = Issuer::new(authority, key);
    for (side, usage) in [
        ("server", ExtendedKeyUsagePurpose::ServerAuth),
        ("client", ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(names)?;
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &issuer)?;
        fs::write(dir.path().join(format!("{side}-cert.pem")), certificate.pem())?;
        fs::write(dir.path().join(format!("{side}-key.pem")), key.serialize_pem())?;
    }
    Ok(dir)
}
