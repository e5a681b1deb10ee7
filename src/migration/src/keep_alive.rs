//! Noticing that the other host of a TCP connection has vanished.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::sockopt;
use rustix::net::{AddressFamily, SocketType};

/// The longest that Linux takes for a keep-alive time, seconds.
const KEEP_ALIVE_MAX: u64 = 32_767;

/// Probes of a silent connection within the patience.
const PROBES: u32 = 3;

/// Has the kernel end a TCP connection whose other host has not acknowledged anything for `patience`: neither
/// what was sent (TCP_USER_TIMEOUT) nor, while nothing is sent, probes (SO_KEEPALIVE). Reads and writes of it fail
/// then, and a migration learns where its guest is. Without it, a host that has lost its power is waited for for hours.
///
/// The kernel does not tell a host that has vanished from one that takes nothing: a peer that lives, and reads nothing
/// of what waits for it for `patience`, loses its connection as well. So `patience` also ends writes that would be
/// waited for longer than that ([`Channel::set_write_patience`](crate::Channel::set_write_patience)).
///
/// For helpers that connect or accept a [`Channel`](crate::Channel); of anything but a TCP socket nothing is
/// changed, since what is on the same host does not vanish.
///
/// # Errors
///
/// When the kernel refuses.
pub fn keep_alive(socket: impl AsFd, patience: Duration) -> io::Result<()> {
    let socket = socket.as_fd();
    let is_tcp = sockopt::socket_type(socket).is_ok_and(|kind| kind == SocketType::STREAM)
        && sockopt::socket_domain(socket)
            .is_ok_and(|domain| [AddressFamily::INET, AddressFamily::INET6].contains(&domain));
    if !is_tcp {
        return Ok(());
    }
    let seconds = patience.as_secs().div_ceil(u64::from(PROBES) + 1).clamp(1, KEEP_ALIVE_MAX);
    let time = Duration::from_secs(seconds);
    sockopt::set_tcp_keepidle(socket, time)?;
    sockopt::set_tcp_keepintvl(socket, time)?;
    sockopt::set_tcp_keepcnt(socket, PROBES)?;
    // 0 stands for the kernel's default.
    let millis = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX).clamp(1, i32::MAX as u32);
    sockopt::set_tcp_user_timeout(socket, millis)?;
    Ok(sockopt::set_socket_keepalive(socket, true)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{PATIENCE, tcp_pair};
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_tcp_connection_ends_after_patience_and_what_is_none_is_left_alone() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else {
                eprintln!("skipped: {address}");
                continue;
            };
            let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            for (patience, seconds, millis) in [
                (Duration::from_secs(30), 8, 30_000),
                (Duration::ZERO, 1, 1),
                (Duration::MAX, KEEP_ALIVE_MAX, i32::MAX as u32),
            ] {
                keep_alive(&stream, patience).unwrap();
                let time = Duration::from_secs(seconds);
                assert_eq!(sockopt::tcp_keepidle(&stream).unwrap(), time);
                assert_eq!(sockopt::tcp_keepintvl(&stream).unwrap(), time);
                assert_eq!(sockopt::tcp_keepcnt(&stream).unwrap(), PROBES);
                assert_eq!(sockopt::tcp_user_timeout(&stream).unwrap(), millis);
                assert!(sockopt::socket_keepalive(&stream).unwrap());
            }
        }
        let (unix, _peer) = UnixStream::pair().unwrap();
        keep_alive(&unix, Duration::from_secs(30)).unwrap();
        assert!(!sockopt::socket_keepalive(&unix).unwrap());
        keep_alive(io::pipe().unwrap().0, Duration::from_secs(30)).unwrap();
    }

    #[test]
    fn a_peer_that_lives_and_reads_nothing_loses_its_connection_as_well() {
        let (mut near, _far) = tcp_pair();
        near.set_write_timeout(Some(PATIENCE)).unwrap();
        keep_alive(&near, Duration::from_secs(1)).unwrap();
        let ended = loop {
            if let Err(error) = near.write_all(&[0; 64 << 10]) {
                break error;
            }
        };
        assert_eq!(ended.raw_os_error(), Some(libc::ETIMEDOUT), "{ended}");
    }
}
