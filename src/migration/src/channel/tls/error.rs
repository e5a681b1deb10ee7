//! Why there is no channel over TLS, and whose certificate is the reason.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use rustls::{AlertDescription, CertificateError};
use thiserror::Error;

/// Why TLS fails.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file of certificates or keys is not of use.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A name that no certificate has.
    #[error("{name:?} is neither a host name nor an IP address, of which certificates are")]
    Name {
        /// The name.
        name: String,
    },
    /// The library refuses what it is set up with.
    #[error("cannot set up TLS: {what}")]
    Setup {
        /// Why.
        what: String,
    },
    /// The peer is not the one, or says that this side is not.
    #[error("{0}")]
    Peer(String),
    /// The peer does not finish the handshake.
    #[error(
        "the {peer} has not finished the TLS handshake within {after:?}: see whether it speaks TLS, and connect \
         it anew"
    )]
    Stalled {
        /// Which side that is.
        peer: &'static str,
        /// How long it had.
        after: Duration,
    },
    /// It was cancelled.
    #[error("cancelled in the TLS handshake")]
    Cancelled,
    /// A system call failed.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// Which side this is.
#[derive(Debug)]
pub(super) enum Role {
    Client {
        /// What is expected of the server's certificate besides the CA.
        expected: String,
    },
    Server,
}

impl Role {
    pub(super) fn peer(&self) -> &'static str {
        match self {
            Self::Client { .. } => "server",
            Self::Server => "client",
        }
    }

    fn own_file(&self) -> &'static str {
        match self {
            Self::Client { .. } => "client-cert.pem",
            Self::Server => "server-cert.pem",
        }
    }

    /// The peer said nothing before it closed.
    pub(super) fn closed(&self) -> TlsError {
        let peer = self.peer();
        TlsError::Peer(format!(
            "the {peer} closed the connection in the TLS handshake, and said nothing: see its message, and whether it \
             speaks TLS on this channel"
        ))
    }

    /// What an error of the library means.
    pub(super) fn explain(&self, error: &rustls::Error) -> TlsError {
        let peer = self.peer();
        TlsError::Peer(match error {
            rustls::Error::InvalidCertificate(CertificateError::Revoked) => format!(
                "the {peer}'s certificate is refused: it is revoked by ca-crl.pem; give that side a new one"
            ),
            rustls::Error::InvalidCertificate(CertificateError::UnknownRevocationStatus) => {
                format!(
                    "the {peer}'s certificate is refused: ca-crl.pem has no list of the CA that issued it, so that it \
                 is not known whether it is revoked"
                )
            }
            rustls::Error::InvalidCertificate(why) => {
                let expected = match self {
                    Self::Client { expected } => expected,
                    Self::Server => "",
                };
                format!(
                    "the {peer}'s certificate is refused: {why}; it must be valid now, issued by the CA in \
                     ca-cert.pem{expected}"
                )
            }
            rustls::Error::NoCertificatesPresented => format!(
                "the {peer} has no certificate, and must have one issued by the CA in ca-cert.pem"
            ),
            rustls::Error::AlertReceived(alert) if is_of_certificate(*alert) => format!(
                "the {peer} refuses this side's certificate in {}: {alert:?}; see its message",
                self.own_file()
            ),
            rustls::Error::AlertReceived(alert) => format!("the {peer} ends TLS: {alert:?}"),
            rustls::Error::InvalidMessage(what) => format!(
                "the {peer} does not speak TLS, or what it says was damaged ({what:?}): nothing goes in the clear, \
                 so switch TLS on there"
            ),
            rustls::Error::DecryptError => {
                format!("what the {peer} says was damaged or changed on its way")
            }
            other => format!("TLS with the {peer} fails: {other}"),
        })
    }
}

fn is_of_certificate(alert: AlertDescription) -> bool {
    use AlertDescription as Alert;
    matches!(
        alert,
        Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            | Alert::AccessDenied
            | Alert::CertificateRequired
            | Alert::DecryptError
    )
}
