//! A ring that continues: where another VMM's driver has left it, or at another back-end.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd;

use super::event::signal;
use super::{Error, Result, SplitRing};

impl SplitRing {
    /// Whether no chain is on its way.
    pub fn is_idle(&self) -> bool {
        self.chains.is_empty() && self.next_avail == self.next_used
    }

    /// Goes on at `index`, where another driver has left the ring idle. Looks at no memory, which
    /// may have to come yet; [`check_idle`](Self::check_idle) does.
    pub fn resume_at(&mut self, index: u16) {
        (self.next_avail, self.next_used, self.last_kick) = (index, index, index);
        self.free = (0..self.size).collect();
        self.chains.clear();
        self.device_writes.forgotten();
    }

    /// The same ring in memory with the same eventfds, to tell another back-end of it while its
    /// driver waits. It knows of no chain.
    pub fn view(&self) -> Result<Self> {
        let duplicate =
            |fd: &std::os::fd::OwnedFd| Ok::<_, Error>(rustix::io::fcntl_dupfd_cloexec(fd, 0)?);
        Ok(Self {
            ram: self.ram.clone(),
            kick: duplicate(&self.kick)?,
            call: duplicate(&self.call)?,
            err: duplicate(&self.err)?,
            free: VecDeque::new(),
            chains: HashMap::new(),
            device_writes: self.device_writes.clone(),
            ..*self
        })
    }

    /// Has the driver look at the used ring, as an interrupt that means nothing does.
    pub fn force_call(&self) -> Result<()> {
        signal(self.call.as_fd())
    }

    /// Empties the ring, which goes on at index 0 with the same eventfds.
    pub fn clear(&mut self) -> Result<()> {
        self.ram.write(self.base, &vec![0; Self::footprint(self.size) as usize])?;
        self.resume_at(0);
        Ok(())
    }

    /// Whether the ring in memory is idle where this driver stands.
    ///
    /// # Errors
    ///
    /// When memory says otherwise: a page of it is missing, or not as it was last.
    pub fn check_idle(&self) -> Result<()> {
        let index = self.next_avail;
        let avail = u16::from_le(self.ram.load(self.avail_addr() + 2)?);
        let used = self.used_idx()?;
        if (avail, used) != (index, index) {
            return Err(Error::NotIdle { index, avail, used });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::memory::{GuestRam, Layout};
    use crate::split_ring::Segment;

    #[test]
    fn an_idle_ring_goes_on_and_one_that_is_not_is_refused() {
        let ram = || {
            let layout = Layout::new().memfd("ram", 0, 0x10_0000).unwrap();
            Arc::new(GuestRam::new(layout).unwrap())
        };
        let (here, there) = (ram(), ram());
        let mut ring = SplitRing::new(here.clone(), 0x1000, 8, true).unwrap();
        ring.start_at(u16::MAX).unwrap();
        assert!(ring.is_idle());
        let mut other = SplitRing::new(there.clone(), 0x1000, 8, true).unwrap();
        other.resume_at(ring.next_avail());
        assert!(matches!(other.check_idle(), Err(Error::NotIdle { avail: 0, .. })));
        there.write(0x1000, &here.read_vec(0x1000, 0x2000).unwrap()).unwrap();
        other.check_idle().unwrap();
        other.add(&[Segment::readable(0x4000, 8)]).unwrap();
        assert_eq!(other.next_avail(), 0);
        assert!(!other.is_idle());
    }
}
