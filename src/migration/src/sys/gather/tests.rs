use super::*;
use proptest::prelude::*;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

const PAGE: u64 = 4096;

/// Waits as often as this, and is cancelled then.
struct Waits(u32);

impl WritePolicy for Waits {
    fn check(&self) -> io::Result<()> {
        if self.0 == 0 { Err(Errno::CANCELED.into()) } else { Ok(()) }
    }

    fn wrote(&mut self, _bytes: u64) {}

    fn wait_writable(&mut self) -> io::Result<()> {
        self.0 -= 1;
        std::thread::yield_now();
        Ok(())
    }
}

fn patient() -> Waits {
    Waits(u32::MAX)
}

fn memfd(size: u64) -> File {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = File::from(rustix::fs::memfd_create("gather-test", flags).unwrap());
    file.set_len(size).unwrap();
    file
}

fn memory(pages: u64) -> Arc<HostMapping> {
    let mapping = HostMapping::map(&memfd(pages * PAGE), 0, pages * PAGE).unwrap();
    let content: Vec<u8> = (0..pages * PAGE).map(|at| (at / 7 % 251) as u8).collect();
    mapping.write(0, &content);
    Arc::new(mapping)
}

fn written(gather: &GatherWrite) -> Vec<u8> {
    let file = memfd(0);
    gather.write_at(&file, 3).unwrap();
    let mut bytes = vec![0; gather.len_bytes() as usize];
    assert_eq!(file.metadata().unwrap().len().saturating_sub(3), gather.len_bytes());
    file.read_exact_at(&mut bytes, 3).unwrap();
    bytes
}

#[test]
fn neighbours_become_one_piece() {
    let (one, other) = (memory(4), memory(4));
    let mut gather = GatherWrite::new();
    gather.push_memory(&one, 0, PAGE);
    gather.push_memory(&one, PAGE, PAGE);
    assert_eq!(gather.segments(), 1);
    gather.push_memory(&one, 3 * PAGE, PAGE);
    gather.push_memory(&other, 0, PAGE);
    gather.push_memory(&one, 0, 0);
    gather.push_bytes(b"");
    gather.push_bytes(b"he");
    gather.push_bytes(b"ad");
    assert_eq!(gather.segments(), 4);
    assert_eq!(gather.len_bytes(), 4 * PAGE + 4);
    gather.clear();
    assert!(gather.is_empty());
    assert_eq!((gather.len_bytes(), Arc::strong_count(&one)), (0, 1));
    gather.write_at(memfd(0), 0).unwrap();
}

#[test]
fn memory_stays_mapped_until_it_is_written() {
    let mapping = memory(1);
    let mut expected = vec![0; PAGE as usize];
    mapping.read(0, &mut expected);
    let mut gather = GatherWrite::new();
    gather.push_memory(&mapping, 0, PAGE);
    drop(mapping);
    assert_eq!(written(&gather), expected);
}

/// More pieces than one call takes, through a socket with a small buffer to a slow reader.
#[test]
fn short_writes_and_many_pieces_lose_nothing() {
    let mapping = memory(64);
    let mut gather = GatherWrite::new();
    for i in 0..3000u64 {
        gather.push_bytes(&i.to_be_bytes());
        gather.push_memory(&mapping, i * 37 % (60 * PAGE), 100 + i);
    }
    assert_eq!(gather.segments(), 6000);
    let expected = written(&gather);
    for nonblocking in [false, true] {
        let (sender, mut receiver) = UnixStream::pair().unwrap();
        sender.set_nonblocking(nonblocking).unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&sender, 4096).unwrap();
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            receiver.read_to_end(&mut bytes).unwrap();
            bytes
        });
        gather.write_to(&sender, &mut patient()).unwrap();
        drop(sender);
        assert!(reader.join().unwrap() == expected);
    }
}

#[test]
fn waiting_for_a_receiver_that_reads_nothing_can_be_cancelled() {
    let mapping = memory(256);
    let mut gather = GatherWrite::new();
    gather.push_memory(&mapping, 0, 256 * PAGE);
    let (sender, _receiver) = UnixStream::pair().unwrap();
    sender.set_nonblocking(true).unwrap();
    let error = gather.write_to(&sender, &mut Waits(4)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ECANCELED));
}

#[test]
fn memory_that_is_gone_is_an_error() {
    let file = memfd(4 * PAGE);
    let mapping = Arc::new(HostMapping::map(&file, 0, 4 * PAGE).unwrap());
    let mut gather = GatherWrite::new();
    gather.push_memory(&mapping, 0, 4 * PAGE);
    file.set_len(PAGE).unwrap();
    let (sender, _receiver) = UnixStream::pair().unwrap();
    let error = gather.write_to(&sender, &mut patient()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    assert_eq!(gather.write_at(memfd(0), 0).unwrap_err().raw_os_error(), Some(libc::EFAULT));
}

#[test]
fn a_receiver_that_is_gone_is_an_error() {
    let mut gather = GatherWrite::new();
    gather.push_bytes(b"x");
    let (sender, receiver) = UnixStream::pair().unwrap();
    drop(receiver);
    let error = gather.write_to(&sender, &mut patient()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    assert!(gather.write_at(memfd(0), u64::MAX).is_err());
}

proptest! {
    #[test]
    fn what_is_written_is_what_was_pushed(
        pieces in prop::collection::vec((any::<bool>(), 0u64..8192, 0u64..5000), 0..40),
    ) {
        let mapping = memory(4);
        let mut gather = GatherWrite::new();
        let mut expected = Vec::new();
        for (own, offset, len) in pieces {
            let mut bytes = vec![0; len as usize];
            mapping.read(offset, &mut bytes);
            if own {
                gather.push_bytes(&bytes);
            } else {
                gather.push_memory(&mapping, offset, len);
            }
            expected.extend(bytes);
        }
        prop_assert_eq!(gather.len_bytes(), expected.len() as u64);
        prop_assert!(written(&gather) == expected);
        let (mut copied, most) = (Vec::new(), 700);
        let mut take = |bytes: &[u8]| {
            assert!(!bytes.is_empty() && bytes.len() <= most);
            copied.extend_from_slice(bytes);
            Ok(())
        };
        gather.copy_out(most, &mut take).unwrap();
        prop_assert!(copied == expected);
    }
}

#[test]
fn a_socket_that_is_closed_raises_no_signal_and_a_pipe_does() {
    let (near, far) = UnixStream::pair().unwrap();
    drop(far);
    let (reader, pipe) = io::pipe().unwrap();
    drop(reader);
    let mut gathered = GatherWrite::new();
    gathered.push_bytes(b"page");
    let broken = |result: io::Result<()>| {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    };
    assert!(!testing::raises_sigpipe(|| broken(gathered.write_to(&near, &mut patient()))));
    assert!(testing::raises_sigpipe(|| broken(gathered.write_to(&pipe, &mut patient()))));
}
