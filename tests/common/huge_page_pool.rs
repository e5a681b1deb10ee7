//! The machine's pool of huge pages, for tests that need one of a known size.

#![allow(dead_code, reason = "each test needs a part of it")]

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::FlockOperation;

/// The pool of one size of huge pages. It is the machine's, so one test at a time has it; dropping
/// it restores the machine's setting.
pub struct Pool {
    folder: String,
    setting: File,
    before: u64,
}

impl Pool {
    /// The pool of pages of `page_size` bytes, of which `pages` are free; the reason when they
    /// cannot be had.
    pub fn with_free(page_size: u64, pages: u64) -> io::Result<Self> {
        let folder = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page_size >> 10);
        let setting =
            File::options().read(true).write(true).open(format!("{folder}/nr_hugepages"))?;
        rustix::fs::flock(&setting, FlockOperation::LockExclusive)?;
        let mut pool = Self { folder, setting, before: 0 };
        pool.before = pool.read("nr_hugepages")?;
        pool.make_free(pages)?;
        Ok(pool)
    }

    /// Changes how many pages are free.
    pub fn make_free(&self, pages: u64) -> io::Result<()> {
        self.set(self.read("nr_hugepages")? - self.read("free_hugepages")? + pages)?;
        match self.free() {
            free if free == pages => Ok(()),
            free => {
                let what = format!("{free} of {pages} pages in {} are to be had", self.folder);
                Err(io::Error::other(what))
            }
        }
    }

    /// How many pages are free.
    pub fn free(&self) -> u64 {
        self.read("free_hugepages").expect("the pool was read before")
    }

    fn read(&self, file: &str) -> io::Result<u64> {
        let text = fs::read_to_string(format!("{}/{file}", self.folder))?;
        text.trim().parse().map_err(io::Error::other)
    }

    fn set(&self, pages: u64) -> io::Result<()> {
        self.setting.write_all_at(pages.to_string().as_bytes(), 0)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = self.set(self.before);
    }
}
