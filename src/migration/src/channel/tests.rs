//! Patience, cancellation and the ends of a channel.

use super::*;
use crate::sys::gather::testing::raises_sigpipe;
use crate::test_support::{Slow, SlowReader};
use ram_discard::memory::HostMapping;
use std::os::unix::net::UnixStream;

const MOMENT: Duration = Duration::from_millis(20);
/// Longer than any thread is kept from running.
const LONG: Duration = Duration::from_secs(60);

/// A channel to a peer that may be so slow.
fn pair(patience: Duration) -> (Channel, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&near, 4096).unwrap();
    let mut channel = Channel::new(near, Arc::new(Progress::new())).unwrap();
    channel.set_write_patience(patience);
    (channel, far)
}

/// Writes without an end, by either way of writing.
fn write_on(channel: &mut Channel, gathers: bool) -> io::Error {
    let file = crate::test_support::memfd(1 << 20);
    let memory = Arc::new(HostMapping::map(&file, 0, 1 << 20).unwrap());
    loop {
        let written = if gathers {
            let mut gathered = GatherWrite::new();
            gathered.push_bytes(b"header");
            gathered.push_memory(&memory, 0, 1 << 20);
            channel.write_gathered(&mut gathered)
        } else {
            channel.write(b"message")
        };
        if let Err(error) = written {
            return error;
        }
    }
}

#[test]
fn a_peer_that_reads_nothing_or_next_to_nothing_ends_any_write_of_any_handle() {
    for (slow, gathers) in [
        (Slow::Nothing, false),
        (Slow::Nothing, true),
        (Slow::Trickle, false),
        (Slow::Trickle, true),
    ] {
        let (channel, far) = pair(MOMENT);
        let _reader = SlowReader::start(far, slow);
        let clone = channel.clone_handle();
        let committed = Arc::new(AtomicBool::new(true));
        for mut handle in
            [clone.clone_handle(), clone.uncancellable(), clone.cancellable_until(committed)]
        {
            let error = write_on(&mut handle, gathers);
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{slow:?} {gathers}: {error}");
        }
    }
}

#[test]
fn a_peer_that_reads_is_waited_for_however_often() {
    let (mut channel, mut far) = pair(LONG);
    let reader = std::thread::spawn(move || io::copy(&mut far, &mut io::sink()).unwrap());
    let file = crate::test_support::memfd(1 << 20);
    let memory = Arc::new(HostMapping::map(&file, 0, 1 << 20).unwrap());
    for _ in 0..50 {
        let mut gathered = GatherWrite::new();
        gathered.push_memory(&memory, 0, 1 << 20);
        channel.write_gathered(&mut gathered).unwrap();
        assert!(gathered.is_empty());
        channel.write(b"message").unwrap();
    }
    let written = channel.written();
    drop(channel);
    assert_eq!((written, reader.join().unwrap()), (50 * ((1 << 20) + 7), written));
}

#[test]
fn a_wait_for_a_slow_peer_can_be_cancelled() {
    for gathers in [false, true] {
        let (near, _far) = UnixStream::pair().unwrap();
        let progress = Arc::new(Progress::new());
        let mut channel = Channel::new(near, Arc::clone(&progress)).unwrap();
        let cancelling = std::thread::spawn(move || progress.cancel());
        let error = write_on(&mut channel, gathers);
        assert_eq!(error.raw_os_error(), Some(libc::ECANCELED), "{error}");
        cancelling.join().unwrap();
    }
}

#[test]
fn a_peer_that_has_gone_is_an_error_and_no_signal() {
    let (near, far) = UnixStream::pair().unwrap();
    drop(far);
    let mut channel = Channel::new(near, Arc::new(Progress::new())).unwrap();
    assert!(!raises_sigpipe(|| {
        let error = channel.write(b"page").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }));
}

#[test]
fn a_read_may_wait_for_as_long_as_can_be_said() {
    let (near, far) = UnixStream::pair().unwrap();
    let mut channel = Channel::new(near, Arc::new(Progress::new())).unwrap();
    channel.set_read_patience(Some(Duration::MAX));
    drop(far);
    assert_eq!(channel.read(&mut [0; 8]).unwrap(), 0);
}
