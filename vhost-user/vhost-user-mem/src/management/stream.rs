//! A Unix stream that gives up on a peer who reads too slowly.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::{Instant, Sleep, sleep};

/// What a client reads, at least, bytes a second.
const SLOWEST: u64 = 64 << 10;

/// Fails a write when the peer has kept it waiting for longer than a bound. What the peer reads buys
/// time back, at the slowest rate that is allowed, and so does time in which nothing waits.
///
/// HTTP timeouts cover requests only; without this a client that does not read its answer, or only a
/// few bytes now and then, would hold its connection for good.
pub(super) struct PatientStream {
    stream: UnixStream,
    patience: Patience,
    /// Ends the wait of the write that found no room.
    alarm: Option<Pin<Box<Sleep>>>,
}

#[derive(Debug)]
struct Patience {
    bound: Duration,
    left: Duration,
    /// Since when a write waits for room, or none does.
    waiting: bool,
    since: Instant,
}

impl Patience {
    fn new(bound: Duration, now: Instant) -> Self {
        Self { bound, left: bound, waiting: false, since: now }
    }

    /// A write finds no room: until when it may wait.
    fn wait(&mut self, now: Instant) -> Instant {
        if !self.waiting {
            self.gain(now.saturating_duration_since(self.since));
            self.waiting = true;
            self.since = now;
        }
        self.since + self.left
    }

    /// So many bytes were written.
    fn progress(&mut self, bytes: usize, now: Instant) {
        let passed = now.saturating_duration_since(self.since);
        if self.waiting {
            self.left = self.left.saturating_sub(passed);
        } else {
            self.gain(passed);
        }
        self.waiting = false;
        self.since = now;
        self.gain(Duration::from_nanos((bytes as u64).saturating_mul(1_000_000_000) / SLOWEST));
    }

    fn gain(&mut self, time: Duration) {
        self.left = self.left.saturating_add(time).min(self.bound);
    }
}

impl PatientStream {
    pub(super) fn new(stream: UnixStream, patience: Duration) -> Self {
        let patience = Patience::new(patience, Instant::now());
        Self { stream, patience, alarm: None }
    }

    fn judge(
        &mut self,
        cx: &mut Context<'_>,
        outcome: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        let now = Instant::now();
        if let Poll::Ready(written) = outcome {
            self.patience.progress(*written.as_ref().unwrap_or(&0), now);
            return Poll::Ready(written);
        }
        let deadline = self.patience.wait(now);
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(sleep(Duration::ZERO)));
        if alarm.deadline() != deadline {
            alarm.as_mut().reset(deadline);
        }
        // Further writes fail at once: no time is left.
        alarm.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for PatientStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for PatientStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.judge(cx, outcome)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.judge(cx, outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trickle_uses_patience_up_and_a_client_that_reads_does_not() {
        let second = Duration::from_secs(1);
        let start = Instant::now();
        let mut patience = Patience::new(10 * second, start);
        // 64 KiB each 3 s are a third of what is needed: each round costs 2 s.
        let mut now = start;
        for left in [10, 8, 6, 4] {
            assert_eq!(patience.wait(now), now + left * second);
            now += 3 * second;
            patience.progress(64 << 10, now);
        }
        assert_eq!(patience.wait(now), now + 2 * second, "the next ones come too late");
        let mut patience = Patience::new(10 * second, start);
        let mut now = start;
        for _ in 0..100 {
            assert_eq!(patience.wait(now), now + 10 * second);
            assert_eq!(patience.wait(now + second / 2), now + 10 * second, "the same wait");
            now += second;
            patience.progress(64 << 10, now);
        }
        // Time in which there is nothing to write is not the fault of the client.
        patience.wait(now);
        now += 9 * second;
        patience.progress(1, now);
        now += 60 * second;
        assert_eq!(patience.wait(now), now + 10 * second);
    }
}
