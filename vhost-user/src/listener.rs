//! Unix sockets to listen on.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Binds `path`. A socket file that nobody answers at was left by a killed daemon and is
/// replaced; one that somebody answers at is not, nor is anything that is no socket.
pub(crate) fn bind(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let refuse = |kind, reason| Err(io::Error::new(kind, reason));
            if !fs::symlink_metadata(path)?.file_type().is_socket() {
                return refuse(error.kind(), "the path exists and is not a socket");
            }
            match UnixStream::connect(path) {
                Ok(_) => return refuse(error.kind(), "in use: another process is listening there"),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                // Gone since: as good as replaced.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => UnixListener::bind(path)?,
            }
        }
        other => other?,
    };
    let metadata = fs::symlink_metadata(path)?;
    let file = SocketFile { path: path.to_owned(), identity: (metadata.dev(), metadata.ino()) };
    listener.set_nonblocking(true)?;
    Ok((listener, file))
}

/// Removes the file of a socket when dropped, unless another socket has taken its place.
pub(crate) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_left_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (listener, file) = bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop((listener, file));
        assert!(!path.exists());
    }

    #[test]
    fn a_served_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let _other = UnixListener::bind(&path).unwrap();
        let error = bind(&path).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().contains("in use"), "{error}");
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        fs::write(&path, "precious").unwrap();
        let error = bind(&path).err().unwrap();
        assert!(error.to_string().contains("not a socket"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_successor_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let (_listener, file) = bind(&path).unwrap();
        fs::rename(&path, dir.path().join("aside")).unwrap();
        let _successor = UnixListener::bind(&path).unwrap();
        drop(file);
        UnixStream::connect(&path).unwrap();
    }
}
