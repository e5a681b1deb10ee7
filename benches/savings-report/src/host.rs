//! What this machine has, and what it says of this process.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;

use rustix::fs::MemfdFlags;
use rustix::time::{ClockId, clock_gettime};

use crate::units::{MIB, PAGE};

/// A sparse file in memory.
pub fn memfd(size: u64) -> io::Result<File> {
    let file = File::from(rustix::fs::memfd_create("savings-report", MemfdFlags::CLOEXEC)?);
    file.set_len(size)?;
    Ok(file)
}

/// Bytes that the host holds for a file.
pub fn resident(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.blocks() * 512)
}

/// Touches and frees so much memory. Where the machine is a guest itself whose free memory goes
/// back to its own host, the first touch would otherwise cost a multiple, and not every run would
/// pay it.
pub fn warm(bytes: u64) -> io::Result<()> {
    let file = memfd(bytes)?;
    let piece = vec![1; MIB as usize];
    let mut at = 0;
    while at < bytes {
        let len = (bytes - at).min(MIB);
        file.write_all_at(&piece[..len as usize], at)?;
        at += len;
    }
    Ok(())
}

/// Memory that can be had without pressing others, bytes.
pub fn available_memory() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.map(|kilobytes| kilobytes << 10).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Processor time of all threads of this process.
pub fn cpu_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default()
}

/// Bytes that this process has read with system calls, where the kernel counts them.
pub fn bytes_read() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/io").ok()?;
    text.lines().find_map(|line| line.strip_prefix("rchar: ")?.trim().parse().ok())
}

/// What the report says of the machine: nothing that names it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Machine {
    /// Its processor.
    pub processor: String,
    /// How many there are.
    pub cpus: usize,
    /// Memory, bytes.
    pub memory: u64,
    /// Its kernel.
    pub kernel: String,
    /// Size of its pages, bytes.
    pub page_size: u64,
}

impl Machine {
    /// This one.
    pub fn here() -> io::Result<Self> {
        let text = fs::read_to_string("/proc/cpuinfo")?;
        let processor = text.lines().find(|line| line.starts_with("model name"));
        let processor = processor.and_then(|line| line.split_once(": ")).map(|(_, name)| name);
        let text = fs::read_to_string("/proc/meminfo")?;
        let memory = text.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
        Ok(Self {
            processor: processor.unwrap_or("unknown").to_owned(),
            cpus: std::thread::available_parallelism()?.get(),
            memory: memory.unwrap_or(0) << 10,
            kernel,
            page_size: PAGE,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells_what_a_file_holds_and_what_was_read() {
        let file = memfd(4 * MIB).unwrap();
        file.write_all_at(&[1], MIB).unwrap();
        assert_eq!(resident(&file).unwrap(), PAGE);
        if let Some(before) = bytes_read() {
            file.read_exact_at(&mut vec![0; MIB as usize], 0).unwrap();
            assert!(bytes_read().unwrap() - before >= MIB);
        }
        assert!(available_memory().unwrap() > 0);
    }
}
