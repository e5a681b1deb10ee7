//! The guest's first and only file system: busybox, the driver, and a command loop on a serial port.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// Serves commands on the second serial port, each answer framed by the command's number.
///
/// `online_movable` keeps the kernel's own allocations out of hotplugged memory, so that a shrink
/// does not depend on luck.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o size=16g fill /fill
echo online_movable > /sys/devices/system/memory/auto_online_blocks
stty -F /dev/ttyS1 raw -echo
exec < /dev/ttyS1 > /dev/ttyS1 2>&1
echo "<<ready>>"
grep -qw no_virtio_mem /proc/cmdline || insmod /virtio_mem.ko dyndbg=+p
while read -r number command; do
    ( eval "$command" ) < /dev/null
    echo "<<end $number $?>>"
done
"#;

/// On the kernel's command line, has the driver wait for a command that loads it.
pub const NO_DRIVER: &str = "no_virtio_mem";

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

/// Writes the archive to `target`, with more programs, each with its path in the guest.
pub fn write(
    target: &Path,
    busybox: &Path,
    module: &Path,
    programs: &[(&str, &[u8])],
) -> Result<()> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("no {}", path.display()));
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "proc", "sys", "fill"] {
        archive.add(folder, DIRECTORY, &[]);
    }
    archive.add("init", PROGRAM, INIT.as_bytes());
    archive.add("bin/busybox", PROGRAM, &read(busybox)?);
    archive.add("virtio_mem.ko", PROGRAM, &read(module)?);
    for (path, program) in programs {
        archive.add(path, PROGRAM, program);
    }
    fs::write(target, archive.finish())
        .with_context(|| format!("cannot write {}", target.display()))
}

/// A cpio archive in the "newc" format, the one that the kernel unpacks.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let links = 1;
        let size = u32::try_from(content.len()).expect("initramfs files are small");
        let name_size = u32::try_from(name.len() + 1).expect("names are short");
        // inode, mode, uid, gid, links, mtime, size, four device numbers, name size, checksum
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::{Archive, PROGRAM};

    #[test]
    fn entries_are_aligned_and_end_with_a_trailer() {
        let mut archive = Archive::default();
        archive.add("init", PROGRAM, b"hello");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[54..62], b"00000005");
        assert_eq!(&bytes[110..115], b"init\0");
        assert_eq!(&bytes[116..121], b"hello");
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
    }
}
