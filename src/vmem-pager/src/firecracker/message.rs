//! What Firecracker sends when it loads a snapshot: one JSON array of its memory regions, with the userfaultfd.
//!
//! Nothing precedes it, nothing follows it, and nothing is answered. Keys that are not known are for newer
//! handlers, and are left alone.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use serde::Deserialize;

use crate::error::PagerError;
use crate::run::{POLL, Run};

/// Bytes of a message: thousands of regions.
pub const MESSAGE_MAX: usize = 1 << 20;
/// Regions in a message.
const REGIONS_MAX: usize = 4096;
/// Page sizes that Firecracker gives its guests: of the host, and of hugetlb.
const PAGE_SIZES: [u64; 2] = [4096, 2 << 20];

/// A region of the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its address in Firecracker.
    pub base: u64,
    /// Its length, bytes.
    pub size: u64,
    /// Its place in the memory file, bytes.
    pub offset: u64,
    /// Bytes of a page, by which faults are resolved.
    pub page_size: u64,
}

#[derive(Deserialize)]
struct Element {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    /// In bytes, whatever its name says. Older releases have it alone.
    page_size_kib: Option<u64>,
}

/// The regions in a message, ascending by their place in a memory file of `memory_len` bytes, which they cover.
///
/// # Errors
///
/// What is wrong with it. `Ok(None)` when it is not complete.
pub fn parse(bytes: &[u8], memory_len: u64) -> Result<Option<Vec<Region>>, String> {
    let mut items = serde_json::Deserializer::from_slice(bytes).into_iter::<Vec<Element>>();
    let elements = match items.next() {
        None => return Ok(None),
        Some(Err(error)) if error.is_eof() => return Ok(None),
        Some(Err(error)) => return Err(format!("the regions are not understood: {error}")),
        Some(Ok(elements)) => elements,
    };
    if !bytes[items.byte_offset()..].iter().all(u8::is_ascii_whitespace) {
        return Err("bytes follow the regions, where nothing was expected".to_owned());
    }
    check(&elements, memory_len).map(Some)
}

fn check(elements: &[Element], memory_len: u64) -> Result<Vec<Region>, String> {
    if elements.is_empty() || elements.len() > REGIONS_MAX {
        let count = elements.len();
        return Err(format!("{count} regions; expected 1 to {REGIONS_MAX}"));
    }
    let mut regions = Vec::with_capacity(elements.len());
    for (index, element) in elements.iter().enumerate() {
        let Element { base_host_virt_addr: base, size, offset, .. } = *element;
        let page_size = element.page_size.or(element.page_size_kib).unwrap_or(PAGE_SIZES[0]);
        if !PAGE_SIZES.contains(&page_size) {
            return Err(format!(
                "region {index}: pages of {page_size} bytes; expected {PAGE_SIZES:?}"
            ));
        }
        let whole = |bytes: u64| bytes.is_multiple_of(page_size);
        if size == 0 || !whole(size) || !whole(base) || base.checked_add(size).is_none() {
            return Err(format!(
                "region {index}: {size:#x} bytes at {base:#x} are not whole pages of {page_size} bytes"
            ));
        }
        if offset.checked_add(size).is_none_or(|end| end > memory_len) {
            return Err(format!(
                "region {index}: {size:#x} bytes at {offset:#x} leave the memory file, which has {memory_len:#x}: is \
                 it the snapshot's own?"
            ));
        }
        regions.push(Region { base, size, offset, page_size });
    }
    regions.sort_unstable_by_key(|region| region.base);
    if let Some([low, high]) = regions.array_windows().find(|[a, b]| a.base + a.size > b.base) {
        return Err(format!("regions at {:#x} and {:#x} overlap", low.base, high.base));
    }
    regions.sort_unstable_by_key(|region| region.offset);
    let mut end = 0;
    for region in &regions {
        if region.offset != end {
            return Err(format!(
                "a region at {:#x} of the memory file, where one at {end:#x} was expected",
                region.offset
            ));
        }
        end += region.size;
    }
    if end != memory_len {
        return Err(format!(
            "regions of {end:#x} bytes in all, but the memory file has {memory_len:#x}: is it the snapshot's own?"
        ));
    }
    Ok(regions)
}

/// A message as it came.
#[derive(Debug)]
pub struct Received {
    /// Its text.
    pub text: Vec<u8>,
    /// Its regions.
    pub regions: Result<Vec<Region>, String>,
    /// Descriptors that came with it.
    pub fds: Vec<OwnedFd>,
    /// Others came that could not be received.
    pub is_truncated: bool,
}

/// Receives the message. `None` when the peer closes before a byte: it was not Firecracker, or has ended.
///
/// # Errors
///
/// When the run ends, or when it does not come whole within the run's patience.
pub fn receive(
    socket: impl AsFd,
    run: &Run,
    memory_len: u64,
) -> Result<Option<Received>, PagerError> {
    let begun = Instant::now();
    let (mut text, mut fds) = (Vec::new(), Vec::new());
    let mut buffer = vec![0; 64 << 10];
    let refused = |what: String, text, fds| {
        Ok(Some(Received { text, regions: Err(what), fds, is_truncated: false }))
    };
    loop {
        if text.is_empty() {
            run.check("the VMM has connected and sent nothing")?;
        } else {
            run.check("the VMM has sent a part of its regions")?;
        }
        if begun.elapsed() >= run.silence() {
            if !fds.is_empty() {
                return refused("the rest of the regions did not come".to_owned(), text, fds);
            }
            let what = "the VMM has connected, and not sent its regions".to_owned();
            return Err(PagerError::TimedOut { what, after: run.silence() });
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut data = [IoSliceMut::new(&mut buffer)];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = match recvmsg(&socket, &mut data, &mut control, flags) {
            Err(Errno::AGAIN | Errno::INTR) => {
                let wait = Timespec { tv_sec: 0, tv_nsec: POLL.subsec_nanos().into() };
                let _ = poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&wait));
                continue;
            }
            Err(Errno::CONNRESET) if text.is_empty() && fds.is_empty() => return Ok(None),
            other => other.map_err(|errno| {
                PagerError::Peer(format!("the VMM's regions cannot be received: {errno}"))
            })?,
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            let what = "not all of its descriptors could be received: more than 8 came, or this process may not open \
                        more files (see ulimit -n)";
            let regions = Err(what.to_owned());
            return Ok(Some(Received { text, regions, fds, is_truncated: true }));
        }
        if fds.len() > 2 {
            let what = "more descriptors than a userfaultfd and a memfd came".to_owned();
            return refused(what, text, fds);
        }
        if received.bytes == 0 {
            if text.is_empty() && fds.is_empty() {
                return Ok(None);
            }
            let what = "the VMM closed the connection inside its regions".to_owned();
            return refused(what, text, fds);
        }
        text.extend_from_slice(&buffer[..received.bytes]);
        if text.len() > MESSAGE_MAX {
            return refused(format!("more than {MESSAGE_MAX} bytes of regions came"), text, fds);
        }
        // What is not an array is known before its end, which may never come.
        let first = text.iter().find(|byte| !byte.is_ascii_whitespace());
        if first.is_some_and(|&byte| byte != b'[') {
            return refused("the regions are not a JSON array".to_owned(), text, fds);
        }
        if text.trim_ascii_end().last() != Some(&b']') {
            continue;
        }
        match parse(&text, memory_len) {
            Ok(None) => {}
            Ok(Some(regions)) => {
                return Ok(Some(Received { text, regions: Ok(regions), fds, is_truncated: false }));
            }
            Err(what) => return refused(what, text, fds),
        }
    }
}
