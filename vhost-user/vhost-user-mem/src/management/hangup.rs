//! Clients that have closed their connection.

use std::future::pending;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net;
use std::sync::Arc;

use tokio::io::Interest;
use tokio::net::UnixStream;

/// Tells when a client has closed its connection for both directions.
///
/// A client that only ended its requests, which reads as the end of the stream, still waits for its
/// answers; what a client that has gone is to be told would only be found out by writing to it.
#[derive(Clone)]
pub(super) struct Hangup(Option<Arc<UnixStream>>);

impl Hangup {
    /// Watches a connection. Without a descriptor to spare, none is seen to close.
    pub(super) fn of(stream: &UnixStream) -> Self {
        // One of its own, so that looking here takes no notice away from the connection.
        let watched = stream.as_fd().try_clone_to_owned();
        let watched = watched.map(net::UnixStream::from).and_then(UnixStream::from_std);
        Self(watched.ok().map(Arc::new))
    }

    /// Returns when the client has gone.
    pub(super) async fn gone(&self) {
        let Some(stream) = &self.0 else { return pending().await };
        while let Ok(ready) = stream.ready(Interest::WRITABLE).await {
            if ready.is_write_closed() {
                return;
            }
            // There is room: wait for the next change.
            let _ =
                stream.try_io::<()>(Interest::WRITABLE, || Err(io::ErrorKind::WouldBlock.into()));
        }
        pending().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::Shutdown;
    use std::time::Duration;

    #[tokio::test]
    async fn only_the_end_of_both_directions_is_a_hangup() {
        let (mut client, server) = net::UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        let server = UnixStream::from_std(server).unwrap();
        let hangup = Hangup::of(&server);
        let moment = Duration::from_millis(50);
        client.write_all(b"GET").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert!(tokio::time::timeout(moment, hangup.gone()).await.is_err(), "half closed");
        drop(client);
        tokio::time::timeout(Duration::from_secs(20), hangup.gone()).await.unwrap();
        tokio::time::timeout(Duration::from_secs(20), hangup.clone().gone()).await.unwrap();
    }
}
