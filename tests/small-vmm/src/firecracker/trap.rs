//! What a Firecracker, or what says to be one, sends that a page-fault handler trips over.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::ioctl_fionbio;
use rustix::net::{Shutdown, shutdown};

use super::{Vm, connect, send};

/// How a VMM sends its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// A memfd of the guest's comes as well, after the userfaultfd (a dialect).
    SecondDescriptor,
    /// As that, and before it.
    MemfdFirst,
    /// Regions have keys that are not known, of newer releases.
    NewerKeys,
    /// Regions have `page_size_kib` alone, in bytes, of older releases.
    OlderKeys,
    /// The message comes in pieces, of which the first has the descriptor.
    Pieces,
    /// The connection is closed after the message, as by older releases.
    Closes,
    /// The userfaultfd was set to block.
    Blocks,
    /// A connection is made and closed before this one.
    Probes,
    /// No descriptor comes.
    NoDescriptor,
    /// A memfd comes, and no userfaultfd.
    NoUserfaultfd,
    /// Three descriptors come.
    ThreeDescriptors,
    /// The connection is closed inside the message.
    Cut,
    /// The message ends in its middle, and the connection stays open.
    Silent,
    /// Bytes follow the message.
    Trailing,
    /// Two regions have one place in the memory file.
    SamePlace,
}

impl Trap {
    /// What every handler has to serve.
    pub const SERVED: [Self; 8] = [
        Self::SecondDescriptor,
        Self::MemfdFirst,
        Self::NewerKeys,
        Self::OlderKeys,
        Self::Pieces,
        Self::Closes,
        Self::Blocks,
        Self::Probes,
    ];
    /// What no handler can serve.
    pub const REFUSED: [Self; 7] = [
        Self::NoDescriptor,
        Self::NoUserfaultfd,
        Self::ThreeDescriptors,
        Self::Cut,
        Self::Silent,
        Self::Trailing,
        Self::SamePlace,
    ];

    /// Whether a userfaultfd comes, so that vCPUs wait for what it should serve.
    pub fn brings_userfaultfd(self) -> bool {
        !matches!(self, Self::NoDescriptor | Self::NoUserfaultfd)
    }
}

/// Connects and sends the message of `vm` in this way. The connection, if it stays open.
pub(super) fn load(vm: &Vm, path: &Path, trap: Trap) -> Option<UnixStream> {
    if trap == Trap::Probes {
        drop(connect(path));
    }
    let socket = connect(path);
    let memfd = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
    let (uffd, memfd) = (vm.uffd().as_fd(), memfd.as_fd());
    if trap == Trap::Blocks {
        ioctl_fionbio(uffd, false).expect("the flag is the VMM's to set");
    }
    let fds: Vec<BorrowedFd<'_>> = match trap {
        Trap::SecondDescriptor => vec![uffd, memfd],
        Trap::MemfdFirst => vec![memfd, uffd],
        Trap::NoDescriptor => Vec::new(),
        Trap::NoUserfaultfd => vec![memfd],
        Trap::ThreeDescriptors => vec![uffd, memfd, memfd],
        _ => vec![uffd],
    };
    let text = match trap {
        Trap::NewerKeys => vm.text().replace('{', "{\"newer\": [{\"x\": []}], "),
        Trap::OlderKeys => vm.text().replace("\"page_size\":4096,", ""),
        Trap::Trailing => vm.text() + " []",
        Trap::SamePlace => vm.text().replace("\"offset\":4096", "\"offset\":0"),
        _ => vm.text(),
    };
    let (bytes, half) = (text.as_bytes(), text.len() / 2);
    match trap {
        Trap::Pieces => {
            send(&socket, &bytes[..half], &fds);
            thread::sleep(Duration::from_millis(5));
            send(&socket, &bytes[half..], &[]);
        }
        Trap::Cut | Trap::Silent => send(&socket, &bytes[..half], &fds),
        _ => send(&socket, bytes, &fds),
    }
    if matches!(trap, Trap::Cut | Trap::Closes) {
        shutdown(&socket, Shutdown::Both).expect("it is connected");
        return None;
    }
    Some(socket)
}
