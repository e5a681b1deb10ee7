//! The `ui` command: the daemon's page in a browser, without exposing the daemon's socket.
//!
//! A proxy on a loopback address, which every program of this host can reach, and web pages of other
//! sites through the browser. [`Guard`] decides what passes; the server brings that to the daemon.
//! The token is in the fragment of the address, which browsers keep to themselves, and comes back in a
//! header that no other site can make them send.

mod guard;
mod places;
mod server;
#[cfg(test)]
mod tests;

use std::fmt::Write;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use serde_json::json;
use tokio::net::TcpListener;

use super::{Client, Console, Failure};
use guard::Guard;

/// Where the proxy listens when it is not told: any port that is free.
pub(super) const LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Bytes of a token.
const TOKEN: usize = 32;

/// An address that only this host reaches.
pub(super) fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr =
        text.parse().map_err(|_| format!("{text} is not an address such as 127.0.0.1:8080"))?;
    if !address.ip().is_loopback() {
        return Err(format!(
            "{} is not a loopback address: other hosts would reach the page; use 127.0.0.1 or [::1], and \
             a tunnel from elsewhere",
            address.ip()
        ));
    }
    Ok(address)
}

/// Prints the page's address and serves it until the process ends.
pub(super) async fn run(
    client: &Client,
    listen: SocketAddr,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    // A wrong path is told here, rather than in the browser.
    client.device().await?;
    let failed = |source| Failure::Listen { address: listen, source };
    let listener = TcpListener::bind(listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let token = token().map_err(Failure::Runtime)?;
    let url = format!("http://{address}/#token={token}");
    if console.json {
        console.print(&format!("{}\n", json!({ "url": url })))?;
    } else {
        console.print(&format!("{url}\n"))?;
        console.complain(
            "Open this address in a browser of this host. It is a secret: it shows the device, and changes \
             nothing. Ctrl-C ends it.",
        );
    }
    server::serve(listener, client, &Arc::new(Guard::new(address, token))).await
}

/// A new secret, hexadecimal.
fn token() -> io::Result<String> {
    let mut bytes = [0; TOKEN];
    // So few bytes come whole, or not at all.
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    }))
}
