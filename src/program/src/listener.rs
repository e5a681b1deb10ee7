//! Unix sockets to listen on, and their files.
//!
//! Beside each socket is a file `PATH.lock`, which is locked while the socket is served: of two
//! daemons that are started on one path, the second is refused, and neither removes what the other
//! has bound. A file that was left by a killed daemon is replaced; it is removed by identity, since
//! another program may have put something else there.
//!
//! A process has one table of what it has bound, for an end that cannot wait and for a start anew. A
//! socket that came with the start ([`adopt`]) is found there instead of being bound: one that the
//! service manager listens on for this program is not this program's to remove, and has no lock.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, chmodat, fchmod, flock};
use rustix::io::Errno;
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, getsockname, socket_with,
};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Who may connect to the sockets of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Permission bits, whatever the umask.
    pub mode: u32,
    /// The group of the files, if it is not the process's.
    pub group: Option<u32>,
}

/// Unless it is said otherwise: the user who runs the daemon.
const OWNER_ONLY: Access = Access { mode: 0o600, group: None };

static ACCESS: OnceLock<Access> = OnceLock::new();
static NEXT: AtomicU64 = AtomicU64::new(0);
static BOUND: Mutex<Vec<(u64, Bound)>> = Mutex::new(Vec::new());
/// What came with the start, until it is bound here.
static LEFT: Mutex<Vec<Bound>> = Mutex::new(Vec::new());
/// Whether the files stay when the process ends.
static KEPT: AtomicBool = AtomicBool::new(false);

/// A socket of this process.
#[derive(Debug)]
pub struct Bound {
    /// Where clients connect.
    pub path: PathBuf,
    /// What is listened on.
    pub listener: UnixListener,
    /// What is removed at the end; `None` for a socket that another process has bound.
    pub file: Option<BoundFile>,
}

/// The file of a socket that this process has bound, or one before it that it continues.
#[derive(Debug)]
pub struct BoundFile {
    /// Device and inode of the socket's file.
    pub identity: (u64, u64),
    /// The file beside the socket, locked.
    pub lock: File,
}

/// Says who may connect to the sockets that are bound from now on. The first call counts.
pub fn allow(access: Access) {
    let _ = ACCESS.set(access);
}

/// Who may connect to the sockets of this process.
pub fn access() -> Access {
    *ACCESS.get().unwrap_or(&OWNER_ONLY)
}

/// Binds `path`. A socket file that no process answers at was left by a killed daemon and is
/// replaced; one that is answered at is not, nor is anything that is not a socket.
///
/// # Errors
///
/// When the path is in use, is not a socket, or cannot be bound.
pub fn bind(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    let bound = match take(&LEFT, |bound| bound.path == path) {
        Some(left) => left,
        None => {
            let lock = lock(path)?;
            remove_left(path)?;
            create(path, lock)?
        }
    };
    let listener = match bound.listener.try_clone() {
        Ok(listener) => listener,
        Err(error) => {
            remove(bound);
            return Err(error);
        }
    };
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    BOUND.lock().push((number, bound));
    Ok((listener, SocketFile { number }))
}

/// Takes over what the process before this one had bound, to be found by [`bind`].
pub fn continue_with(left: Vec<Bound>) {
    LEFT.lock().extend(left);
}

/// Takes over a listening socket that came with the start, to be found by [`bind`] under `path`, or
/// under its own address where that is `None`; that path is the answer. With its `lock`, it is one
/// that an earlier process of this service had bound; without, the service manager's own.
///
/// # Errors
///
/// When it is not a listening Unix stream socket, is at another path, or is not to be found there
/// any more.
pub fn adopt(socket: OwnedFd, lock: Option<OwnedFd>, path: Option<&Path>) -> io::Result<PathBuf> {
    let refuse = |reason: String| Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    let is_unix = socket_domain(&socket) == Ok(AddressFamily::UNIX);
    if !is_unix || socket_type(&socket) != Ok(SocketType::STREAM) || !socket_acceptconn(&socket)? {
        return refuse("not a Unix stream socket that is listened on".to_owned());
    }
    let address = address_of(&socket)?;
    let path = match path {
        Some(path) if path == address || is_same(path, &address) => path.to_owned(),
        Some(_) => return refuse(format!("it is bound to {}", address.display())),
        None => address,
    };
    let file = match lock {
        None => None,
        Some(lock) => {
            let metadata = fs::symlink_metadata(&path)?;
            if !metadata.file_type().is_socket() {
                return refuse(format!("{} is not a socket any more", path.display()));
            }
            Some(BoundFile { identity: (metadata.dev(), metadata.ino()), lock: lock.into() })
        }
    };
    let listener = UnixListener::from(socket);
    listener.set_nonblocking(true)?;
    LEFT.lock().push(Bound { path: path.clone(), listener, file });
    Ok(path)
}

/// The path that a socket is bound to; with `@` for one without a file, as service managers write it.
fn address_of(socket: &impl AsFd) -> io::Result<PathBuf> {
    let address = SocketAddrUnix::try_from(getsockname(socket)?)?;
    let bytes = match address.path_bytes() {
        Some(path) => path.to_vec(),
        None => [b"@", address.abstract_name().unwrap_or_default()].concat(),
    };
    Ok(OsString::from_vec(bytes).into())
}

fn is_same(one: &Path, other: &Path) -> bool {
    matches!((identity_of(one), identity_of(other)), (Ok(one), Ok(other)) if one == other)
}

/// Leaves the files of all sockets when the process ends, since what listens on them is kept for the
/// next one.
pub fn keep_files() {
    KEPT.store(true, Ordering::Relaxed);
}

/// Calls `look` with everything that is bound.
pub fn with_bound<T>(look: impl FnOnce(&mut dyn Iterator<Item = &Bound>) -> T) -> T {
    look(&mut BOUND.lock().iter().map(|(_, bound)| bound))
}

/// Paths of the sockets whose files go when this process ends: it has bound them, and they are not kept.
pub fn removed_at_the_end() -> Vec<PathBuf> {
    if KEPT.load(Ordering::Relaxed) {
        return Vec::new();
    }
    with_bound(|bound| {
        bound.filter(|bound| bound.file.is_some()).map(|bound| bound.path.clone()).collect()
    })
}

/// Removes all sockets of this process, for an end that cannot wait.
pub fn remove_all() {
    let bound = std::mem::take(&mut *BOUND.lock());
    bound.into_iter().for_each(|(_, bound)| remove(bound));
}

/// Removes the file of a socket when dropped, unless another socket has taken its place.
#[derive(Debug)]
pub struct SocketFile {
    number: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Some((_, bound)) = take(&BOUND, |(number, _)| *number == self.number) {
            remove(bound);
        }
    }
}

fn take<T>(table: &Mutex<Vec<T>>, is: impl Fn(&T) -> bool) -> Option<T> {
    let mut table = table.lock();
    let at = table.iter().position(is)?;
    Some(table.swap_remove(at))
}

fn remove(bound: Bound) {
    let Bound { path, listener, file } = bound;
    let Some(BoundFile { identity, lock }) = file else { return };
    if KEPT.load(Ordering::Relaxed) {
        return;
    }
    remove_same(&path, identity);
    drop(listener);
    // Before the lock is released: who waits for it looks whether the file is still there.
    if let Ok(metadata) = lock.metadata() {
        remove_same(&lock_path(&path), (metadata.dev(), metadata.ino()));
    }
}

/// Removes a file if it is still the one that is meant.
fn remove_same(path: &Path, identity: (u64, u64)) {
    if identity_of(path).is_ok_and(|found| found == identity) {
        let _ = fs::remove_file(path);
    }
}

fn identity_of(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

fn refuse<T>(reason: String) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::AddrInUse, reason))
}

fn lock_path(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".lock");
    name.into()
}

/// Excludes other daemons from `path`.
fn lock(path: &Path) -> io::Result<File> {
    let beside = lock_path(path);
    let failed = |error: io::Error| {
        io::Error::new(error.kind(), format!("cannot lock {}: {error}", beside.display()))
    };
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(&beside)
            .map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let beside = beside.display();
                return refuse(format!("in use: another process holds {beside}"));
            }
            Err(error) => return Err(failed(error.into())),
        }
        let metadata = file.metadata().map_err(failed)?;
        // Its holder may have removed it before it was locked here.
        match identity_of(&beside) {
            Ok(found) if found == (metadata.dev(), metadata.ino()) => return Ok(file),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Removes what a killed daemon has left at `path`.
fn remove_left(path: &Path) -> io::Result<()> {
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    if !metadata.file_type().is_socket() {
        return refuse("the path exists and is not a socket".to_owned());
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&probe, &SocketAddrUnix::new(path)?) {
        // With a queue of connections that is full, it is listened to as well.
        Ok(()) | Err(Errno::AGAIN) => {
            refuse("in use: another process is listening there".to_owned())
        }
        Err(Errno::CONNREFUSED) => {
            remove_same(path, (metadata.dev(), metadata.ino()));
            Ok(())
        }
        Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn create(path: &Path, lock: File) -> io::Result<Bound> {
    let Access { mode, group } = access();
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // The file gets the bits of the socket, less the umask: never more than is wanted.
    fchmod(&socket, Mode::from_raw_mode(mode & OWNER_ONLY.mode))?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    let bound = Bound {
        path: path.to_owned(),
        listener: socket.into(),
        file: Some(BoundFile { identity: identity_of(path)?, lock }),
    };
    let opened = || -> io::Result<()> {
        if group.is_some() {
            std::os::unix::fs::lchown(path, None, group)?;
        }
        chmodat(CWD, path, Mode::from_raw_mode(mode), AtFlags::empty())?;
        Ok(rustix::net::listen(&bound.listener, BACKLOG)?)
    };
    match opened() {
        Ok(()) => Ok(bound),
        Err(error) => {
            remove(bound);
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    fn place() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        (dir, path)
    }

    #[test]
    fn a_left_socket_is_replaced() {
        let (dir, path) = place();
        drop(UnixListener::bind(&path).unwrap());
        fs::write(lock_path(&path), "").unwrap();
        assert!(path.exists());
        let (listener, file) = bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop((listener, file));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_served_socket_is_left_alone() {
        let (_dir, path) = place();
        let _other = UnixListener::bind(&path).unwrap();
        let error = bind(&path).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().contains("in use"), "{error}");
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_socket_whose_queue_is_full_is_in_use() {
        let (_dir, path) = place();
        let flags = SocketFlags::CLOEXEC;
        let other = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        rustix::net::bind(&other, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&other, 0).unwrap();
        let _waiting = UnixStream::connect(&path).unwrap();
        let error = bind(&path).err().unwrap();
        assert!(error.to_string().contains("in use: another process is listening"), "{error}");
        assert!(path.exists());
    }

    #[test]
    fn a_second_daemon_is_refused_before_it_looks_at_the_socket() {
        let (_dir, path) = place();
        let (listener, file) = bind(&path).unwrap();
        // As between the two steps of a start: the file is there, and does not answer.
        drop(listener);
        let (number, Bound { listener, file: bound, .. }) =
            take(&BOUND, |(_, bound)| bound.path == path).unwrap();
        drop(listener);
        let error = bind(&path).err().unwrap();
        assert!(error.to_string().contains("another process holds"), "{error}");
        assert!(error.to_string().contains("api.lock"), "{error}");
        assert!(path.exists() && number == file.number);
        drop(bound);
        bind(&path).unwrap();
    }

    #[test]
    fn a_socket_that_came_with_the_start_is_served_and_left() {
        let (dir, path) = place();
        let came = UnixListener::bind(&path).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        let by_another_name = link.join("api");
        assert_eq!(adopt(came.into(), None, Some(&by_another_name)).unwrap(), by_another_name);
        let _waiting = UnixStream::connect(&path).unwrap();
        let (listener, file) = bind(&by_another_name).unwrap();
        listener.accept().unwrap();
        drop((listener, file));
        assert!(path.exists() && !lock_path(&path).exists());
    }

    #[test]
    fn a_socket_that_was_stored_is_locked_still_and_removed_at_the_end() {
        let (dir, path) = place();
        let (listener, file) = bind(&path).unwrap();
        let stored = with_bound(|mut bound| {
            let bound = Iterator::find(&mut bound, |bound| bound.path == path).unwrap();
            let lock = bound.file.as_ref().unwrap().lock.try_clone().unwrap();
            (bound.listener.try_clone().unwrap(), lock)
        });
        // As at an end that leaves the files.
        drop(take(&BOUND, |(number, _)| *number == file.number).unwrap());
        drop((listener, file));
        let _waiting = UnixStream::connect(&path).unwrap();
        assert!(bind(&path).err().unwrap().to_string().contains("another process holds"));
        let (socket, lock) = stored;
        assert_eq!(adopt(socket.into(), Some(lock.into()), None).unwrap(), path);
        let (listener, file) = bind(&path).unwrap();
        listener.accept().unwrap();
        drop((listener, file));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_not_listened_on_or_elsewhere_is_refused() {
        let (dir, path) = place();
        let refused = |socket: OwnedFd, path: Option<&Path>| {
            adopt(socket, None, path).unwrap_err().to_string()
        };
        let (connected, _other) = UnixStream::pair().unwrap();
        assert!(refused(connected.into(), None).contains("listened on"));
        assert!(refused(File::open("/dev/null").unwrap().into(), None).contains("listened on"));
        let listener = UnixListener::bind(&path).unwrap();
        let elsewhere = dir.path().join("elsewhere");
        assert!(refused(listener.into(), Some(&elsewhere)).contains(path.to_str().unwrap()));
        let left = UnixListener::bind(&elsewhere).unwrap();
        fs::remove_file(&elsewhere).unwrap();
        let lock = File::open("/dev/null").unwrap();
        adopt(left.into(), Some(lock.into()), None).unwrap_err();
    }

    #[test]
    fn a_lock_that_cannot_be_had_is_told_from_one_that_is_held() {
        let (_dir, path) = place();
        std::os::unix::fs::symlink("elsewhere", lock_path(&path)).unwrap();
        let error = bind(&path).err().unwrap();
        assert!(error.to_string().contains("cannot lock"), "{error}");
        assert!(error.to_string().contains("api.lock"), "{error}");
    }

    #[test]
    fn a_file_is_left_alone() {
        let (_dir, path) = place();
        fs::write(&path, "precious").unwrap();
        let error = bind(&path).err().unwrap();
        assert!(error.to_string().contains("not a socket"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_successor_is_left_alone() {
        let (dir, path) = place();
        let (_listener, file) = bind(&path).unwrap();
        fs::rename(&path, dir.path().join("aside")).unwrap();
        let _successor = UnixListener::bind(&path).unwrap();
        drop(file);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn only_the_owner_may_connect_unless_it_is_said() {
        let (_dir, path) = place();
        let _bound = bind(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::metadata(lock_path(&path)).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
