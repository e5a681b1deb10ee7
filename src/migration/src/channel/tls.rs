//! Channels over TLS 1.3, for connections that leave the host: both sides have a certificate of one CA, and
//! nothing is ever said in the clear.
//!
//! Certificates are in the files that QEMU has them in (`tls-creds-x509`): `ca-cert.pem`, `server-cert.pem` and
//! `server-key.pem` at the destination, `client-cert.pem` and `client-key.pem` at the source, and `ca-crl.pem`,
//! if it exists, with what the CA has revoked. Names are those of the extension subjectAltName.

mod credentials;
mod error;
mod transport;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};

use super::Channel;
use super::descriptor::Descriptor;
use crate::progress::Progress;
use error::Role;
pub use error::TlsError;
use transport::TlsTransport;

/// How long a handshake may take, unless it is set.
const HANDSHAKE: Duration = Duration::from_secs(30);

/// The side that connects, the source of a migration.
#[derive(Clone, Debug)]
pub struct TlsClient {
    config: Arc<ClientConfig>,
    server: ServerName<'static>,
    handshake: Duration,
}

/// The side that listens, the destination of a migration.
#[derive(Clone, Debug)]
pub struct TlsServer {
    config: Arc<ServerConfig>,
    handshake: Duration,
}

impl TlsClient {
    /// With the files of `dir`, of a server that has the name `server`: a host name or an IP address.
    ///
    /// # Errors
    ///
    /// When a file is missing or wrong, and which; also when the certificate is not one that the CA in the same
    /// folder vouches for now.
    pub fn from_dir(dir: &Path, server: &str) -> Result<Self, TlsError> {
        let name = ServerName::try_from(server.to_owned());
        let server = name.map_err(|_| TlsError::Name { name: server.to_owned() })?;
        Ok(Self { config: credentials::client(dir)?, server, handshake: HANDSHAKE })
    }

    /// Has handshakes end after so long; 30 s unless set.
    #[must_use]
    pub fn with_handshake_timeout(self, handshake: Duration) -> Self {
        Self { handshake, ..self }
    }

    /// Makes a channel of a connected socket. What the server says of the client's certificate comes after that:
    /// a channel that it refuses fails with the first thing that is read, or soon with what is written.
    ///
    /// # Errors
    ///
    /// When the server is not the one, does not speak TLS, or takes too long; when `progress` is cancelled.
    pub fn connect(
        &self,
        socket: impl Into<OwnedFd>,
        progress: &Arc<Progress>,
    ) -> Result<Channel, TlsError> {
        let connection = ClientConnection::new(Arc::clone(&self.config), self.server.clone())
            .map_err(|error| TlsError::Setup { what: error.to_string() })?;
        let expected = format!(" and of the name {}", self.server.to_str());
        let role = Role::Client { expected };
        begin(Connection::Client(connection), socket.into(), role, progress, self.handshake)
    }
}

impl TlsServer {
    /// With the files of `dir`.
    ///
    /// # Errors
    ///
    /// As [`TlsClient::from_dir`].
    pub fn from_dir(dir: &Path) -> Result<Self, TlsError> {
        Ok(Self { config: credentials::server(dir, None)?, handshake: HANDSHAKE })
    }

    /// As [`from_dir`](Self::from_dir), of clients that have the name `client`, which any of the CA has not.
    ///
    /// # Errors
    ///
    /// As [`TlsClient::from_dir`].
    pub fn from_dir_for(dir: &Path, client: &str) -> Result<Self, TlsError> {
        let name = ServerName::try_from(client.to_owned());
        let name = name.map_err(|_| TlsError::Name { name: client.to_owned() })?;
        Ok(Self { config: credentials::server(dir, Some(name))?, handshake: HANDSHAKE })
    }

    /// Has handshakes end after so long; 30 s unless set.
    #[must_use]
    pub fn with_handshake_timeout(self, handshake: Duration) -> Self {
        Self { handshake, ..self }
    }

    /// Makes a channel of a connected socket.
    ///
    /// # Errors
    ///
    /// When the client is not one that may connect, does not speak TLS, or takes too long; when `progress` is
    /// cancelled.
    pub fn accept(
        &self,
        socket: impl Into<OwnedFd>,
        progress: &Arc<Progress>,
    ) -> Result<Channel, TlsError> {
        let connection = ServerConnection::new(Arc::clone(&self.config))
            .map_err(|error| TlsError::Setup { what: error.to_string() })?;
        begin(Connection::Server(connection), socket.into(), Role::Server, progress, self.handshake)
    }
}

fn begin(
    connection: Connection,
    socket: OwnedFd,
    role: Role,
    progress: &Arc<Progress>,
    within: Duration,
) -> Result<Channel, TlsError> {
    let failed = |source| TlsError::Io { what: "set up a socket", source };
    let socket = Descriptor::new(socket).map_err(failed)?;
    let transport = TlsTransport::begin(connection, socket, role, progress, within)?;
    Ok(Channel::over(Arc::new(transport), Arc::clone(progress)))
}

#[cfg(test)]
mod tests;
