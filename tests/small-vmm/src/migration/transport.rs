//! Where a guest goes to or comes from: `unix:PATH` or `tcp:HOST:PORT`.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use migration::{Channel, Progress, TlsClient, TlsServer};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Links;

/// How long a host may not be heard of, or read nothing, before the guest is said to be alone.
const VANISHED: Duration = Duration::from_secs(30);

enum Address<'a> {
    Unix(&'a Path),
    Tcp(&'a str),
}

fn parse(address: &str) -> anyhow::Result<Address<'_>> {
    match address.split_once(':') {
        Some(("unix", path)) if !path.is_empty() => Ok(Address::Unix(Path::new(path))),
        Some(("tcp", host)) if host.contains(':') => Ok(Address::Tcp(host)),
        _ => bail!("{address:?} is neither unix:PATH nor tcp:HOST:PORT"),
    }
}

/// Connects to where a guest is waited for.
///
/// # Errors
///
/// When no process listens there.
pub fn connect(address: &str) -> anyhow::Result<OwnedFd> {
    let refused = || format!("cannot connect to {address}");
    Ok(match parse(address)? {
        Address::Unix(path) => UnixStream::connect(path).with_context(refused)?.into(),
        Address::Tcp(host) => {
            let stream = TcpStream::connect(host).with_context(refused)?;
            stream.set_nodelay(true)?;
            migration::keep_alive(&stream, VANISHED)?;
            stream.into()
        }
    })
}

/// A channel to where a guest is waited for; over TLS, to a server that has the name of the host, or `localhost`.
///
/// # Errors
///
/// When no process listens there, or it is not the one that was meant.
pub fn channel_to(
    address: &str,
    links: &Links,
    progress: &Arc<Progress>,
) -> anyhow::Result<Channel> {
    let server = server_name(&parse(address)?);
    let client =
        links.tls_dir.as_deref().map(|dir| TlsClient::from_dir(dir, server)).transpose()?;
    let socket = connect(address)?;
    match client {
        Some(client) => Ok(client.connect(socket, progress)?),
        None => Ok(Channel::new(socket, Arc::clone(progress))?),
    }
}

/// The name in the certificate of who listens there. Addresses of IPv6 are in brackets, and names are not.
fn server_name<'a>(address: &Address<'a>) -> &'a str {
    match *address {
        Address::Unix(_) => "localhost",
        Address::Tcp(host) => {
            let host = host.rsplit_once(':').map_or(host, |(host, _)| host);
            host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
        }
    }
}

/// Waits for a guest to come.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: String,
}

#[derive(Debug)]
enum Socket {
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener),
}

impl Listener {
    /// Listens at an address; port 0 stands for any that is free.
    ///
    /// # Errors
    ///
    /// When the address is none, or taken.
    pub fn bind(address: &str) -> anyhow::Result<Self> {
        let taken = || format!("cannot listen at {address}");
        let (socket, address) = match parse(address)? {
            Address::Unix(path) => {
                let listener = UnixListener::bind(path).with_context(taken)?;
                (Socket::Unix(listener, path.to_owned()), address.to_owned())
            }
            Address::Tcp(host) => {
                let listener = TcpListener::bind(host).with_context(taken)?;
                let address = format!("tcp:{}", listener.local_addr()?);
                (Socket::Tcp(listener), address)
            }
        };
        Ok(Self { socket, address })
    }

    /// Where it listens really.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Waits for the other side until `gives_up` says so.
    ///
    /// # Errors
    ///
    /// When no source came.
    pub fn accept(&self, gives_up: impl Fn() -> bool) -> anyhow::Result<OwnedFd> {
        let step = Timespec { tv_sec: 0, tv_nsec: Duration::from_millis(20).subsec_nanos().into() };
        while poll(&mut [PollFd::from_borrowed_fd(self.fd(), PollFlags::IN)], Some(&step))
            .map_err(io::Error::from)?
            == 0
        {
            if gives_up() {
                bail!("cancelled before anything connected to {}", self.address);
            }
        }
        Ok(match &self.socket {
            Socket::Unix(listener, _) => listener.accept()?.0.into(),
            Socket::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                migration::keep_alive(&stream, VANISHED)?;
                stream.into()
            }
        })
    }

    /// Waits for a channel of the other side, until the migration is cancelled.
    ///
    /// # Errors
    ///
    /// When no source came, or one that may not.
    pub fn channel(&self, links: &Links, progress: &Arc<Progress>) -> anyhow::Result<Channel> {
        let server = links.tls_dir.as_deref().map(TlsServer::from_dir).transpose()?;
        let socket = self.accept(|| progress.is_cancelled())?;
        match server {
            Some(server) => Ok(server.accept(socket, progress)?),
            None => Ok(Channel::new(socket, Arc::clone(progress))?),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Unix(listener, _) => listener.as_fd(),
            Socket::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Socket::Unix(_, path) = &self.socket {
            // Fails only when another process was faster.
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_are_none_are_refused() {
        for wrong in ["", "unix:", "tcp:localhost", "udp:1:2", "/a/path"] {
            assert!(connect(wrong).is_err(), "{wrong:?}");
            assert!(Listener::bind(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_certificate_has_the_name_or_address_of_the_host() {
        for (address, name) in [
            ("unix:/a/path", "localhost"),
            ("tcp:there.example:4444", "there.example"),
            ("tcp:192.0.2.1:4444", "192.0.2.1"),
            ("tcp:[2001:db8::1]:4444", "2001:db8::1"),
        ] {
            assert_eq!(server_name(&parse(address).unwrap()), name);
        }
    }

    #[test]
    fn a_free_port_is_told_and_found_and_both_ends_notice_a_host_that_vanishes() {
        let listener = Listener::bind("tcp:127.0.0.1:0").unwrap();
        let near = connect(listener.address()).unwrap();
        let far = listener.accept(|| false).unwrap();
        for end in [near, far] {
            assert_eq!(rustix::net::sockopt::tcp_user_timeout(&end).unwrap(), 30_000);
            assert!(rustix::net::sockopt::socket_keepalive(&end).unwrap());
        }
        let no_peer = listener.accept(|| true).unwrap_err().to_string();
        assert!(no_peer.contains(listener.address()), "{no_peer}");
    }
}
