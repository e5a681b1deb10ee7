//! Copies of a guest's memory, moved by this project.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result};
use migration::dirty::{DirtyTracker, NeverWritten};
use migration::ram::{BlockOptions, ListOptions, MigrationBlock, RamBlocks, RamLoad, RamSave};
use migration::snapshot::{FileIo, Restore, StoppedGuest, restore, save};
use migration::stream::Configuration;
use migration::{Channel, Guest, Incoming, NoDevices, Outgoing, Parameters, Progress};
use ram_discard::memory::RamBlock;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::{Moved, Resident, Route, Who};
use crate::host;
use crate::side::manager;
use crate::units::{MIB, millis};

/// The guest is stopped, and stays so.
struct Stopped;

impl Guest for Stopped {
    fn stop(&self) -> Result<(), String> {
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        Ok(())
    }
}

/// Region and boot memory of a guest.
pub struct Copy {
    files: [File; 2],
    blocks: Arc<RamBlocks>,
    region: u64,
    ram: u64,
    plugged: u64,
}

impl Copy {
    /// Copies what the host holds of both; holes stay holes.
    pub fn of(region: &File, ram: &File, plugged: u64) -> Result<Self> {
        let copy = Self::empty(region.metadata()?.len(), ram.metadata()?.len(), plugged)?;
        copy_data(region, &copy.files[0])?;
        copy_data(ram, &copy.files[1])?;
        Ok(copy)
    }

    fn empty(region: u64, ram: u64, plugged: u64) -> Result<Self> {
        let files = [host::memfd(region)?, host::memfd(ram)?];
        let mut blocks = RamBlocks::new();
        let block = |id: &str, start, len, file: &File| -> Result<MigrationBlock> {
            let ram = RamBlock::new(id.to_owned(), start, len, file.try_clone()?, 0)?;
            Ok(MigrationBlock::map(Arc::new(ram), BlockOptions::migratable())?)
        };
        let vmem = block("vmem0", 1 << 40, region, &files[0])?;
        vmem.set_discard_manager(0, manager(region, plugged)?)?;
        blocks.register(Arc::new(vmem))?;
        blocks.register(Arc::new(block("ram", 0, ram, &files[1])?))?;
        Ok(Self { files, blocks: Arc::new(blocks), region, ram, plugged })
    }

    fn resident(&self) -> Result<Resident> {
        let [region, boot] = &self.files;
        Ok(Resident { region: host::resident(region)?, boot: host::resident(boot)? })
    }

    /// Moves it to fresh memory.
    pub fn move_by_us(&self, route: Route, dir: &Path) -> Result<Moved> {
        let to = Self::empty(self.region, self.ram, self.plugged)?;
        host::warm(2 * (self.plugged + self.ram))?;
        let progress = Arc::new(Progress::new());
        let before = self.resident()?;
        let counted = match route {
            Route::Socket => self.over_a_socket(&to, &progress)?,
            Route::File | Route::MappedRam => self.to_a_file(&to, dir, &progress)?,
        };
        let seen = progress.snapshot();
        Ok(Moved {
            who: Who::Ours,
            route,
            sent: seen.transferred,
            counted,
            normal: seen.normal,
            zero: seen.duplicate,
            setup: millis(seen.setup_time),
            total: millis(seen.total_time),
            downtime: seen.downtime.map(millis),
            source: [before, self.resident()?],
            destination: to.resident()?,
        })
    }

    /// Bytes that the kernel saw this process read, which are those of the destination.
    fn over_a_socket(&self, to: &Self, progress: &Arc<Progress>) -> Result<u64> {
        let (near, far) = UnixStream::pair()?;
        let read = host::bytes_read();
        let none = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::new(NeverWritten) };
        let options = ListOptions::default();
        let ram = RamSave::new(&self.blocks, options, Arc::clone(progress), none)?;
        let outgoing = Outgoing {
            parameters: Parameters::new(configuration()),
            guest: &Stopped,
            handlers: vec![Box::new(ram)],
            devices: &mut NoDevices,
            postcopy: None,
            progress: Arc::clone(progress),
        };
        thread::scope(|scope| -> Result<()> {
            let receiving = scope.spawn(|| to.receive(far));
            let sent = outgoing.run(Channel::new(near, Arc::clone(progress))?);
            let received =
                receiving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            received.context("on the destination")?;
            sent.context("on the source")
        })?;
        let read = host::bytes_read().zip(read).map(|(after, before)| after - before);
        read.context("the kernel does not count what is read")
    }

    fn receive(&self, channel: UnixStream) -> Result<()> {
        let progress = Arc::new(Progress::new());
        let options = ListOptions::default();
        let ram = RamLoad::new(Arc::clone(&self.blocks), options, Arc::clone(&progress));
        let incoming = Incoming {
            configuration: configuration(),
            guest: &Stopped,
            handlers: vec![Box::new(ram)],
            devices: &mut NoDevices,
            postcopy: None,
            progress: Arc::clone(&progress),
        };
        Ok(incoming.run(Channel::new(channel, progress)?)?)
    }

    /// Bytes that the host holds for the file.
    fn to_a_file(&self, to: &Self, dir: &Path, progress: &Arc<Progress>) -> Result<u64> {
        let file = tempfile::tempfile_in(dir)?;
        let stopped = StoppedGuest {
            configuration: configuration(),
            blocks: &self.blocks,
            devices: &mut NoDevices,
            io: FileIo { threads: 1, direct: false },
            progress: Arc::clone(progress),
        };
        save(stopped, &file)?;
        let resident = host::resident(&file)?;
        let back = Restore {
            configuration: configuration(),
            blocks: Arc::clone(&to.blocks),
            devices: &mut NoDevices,
            io: FileIo { threads: 1, direct: false },
            progress: Arc::new(Progress::new()),
        };
        restore(back, &file)?;
        Ok(resident)
    }
}

fn configuration() -> Configuration {
    Configuration::new("savings-report")
}

/// Copies data, and leaves holes alone.
fn copy_data(from: &File, to: &File) -> Result<()> {
    let mut at = 0;
    let mut bytes = vec![0; MIB as usize];
    loop {
        let start = match seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        let end = seek(from, SeekFrom::Hole(start))?;
        at = start;
        while at < end {
            let piece = &mut bytes[..(end - at).min(MIB) as usize];
            from.read_exact_at(piece, at)?;
            to.write_all_at(piece, at)?;
            at += piece.len() as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PAGE;

    #[test]
    fn a_copy_has_the_same_data_and_the_same_holes() {
        let (from, to) = (host::memfd(8 * MIB).unwrap(), host::memfd(8 * MIB).unwrap());
        from.write_all_at(&[7; 5000], 3 * MIB).unwrap();
        copy_data(&from, &to).unwrap();
        let mut bytes = [0; 5000];
        to.read_exact_at(&mut bytes, 3 * MIB).unwrap();
        assert_eq!(bytes, [7; 5000]);
        assert_eq!(host::resident(&to).unwrap(), 2 * PAGE);
    }
}
