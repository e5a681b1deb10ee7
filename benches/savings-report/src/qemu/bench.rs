//! What is compared, and how often.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use real_guest::options::cache_dir;
use real_guest::provision::{self, Kit};

use super::theirs::{self, Source};
use super::{Measured, Moved, Paged, Route, pager, resize};
use crate::units::{size, time};

/// How often a guest is moved by each route.
const RUNS: usize = 3;

/// What a comparison is made with.
pub struct Bench {
    kit: Kit,
    dir: PathBuf,
}

impl Bench {
    /// With a QEMU that is found or brought, and files in `dir`.
    ///
    /// # Errors
    ///
    /// When there is no QEMU to be had.
    pub fn new(dir: &Path) -> Result<Self> {
        let kit = provision::provide(&cache_dir()?, None)?;
        Ok(Self { kit, dir: fs::canonicalize(dir)?.join("qemu") })
    }

    /// All of it.
    ///
    /// # Errors
    ///
    /// When something does not come to its end.
    pub fn measure(&self) -> Result<Measured> {
        self.forget()?;
        let resized = resize::compare(&self.kit, &self.dir.join("resize"))?;
        let mut qemu = String::new();
        let mut moved = Vec::new();
        // Taking turns: a machine that gets slower does so for all.
        for run in 1..=RUNS {
            for route in Route::ALL {
                let (version, both) = self.compare(route)?;
                for one in &both {
                    let (who, sent, took) = (one.who.name(), size(one.sent), time(one.total));
                    eprintln!("{} ({run} of {RUNS}), {who}: {sent} in {took}", route.name());
                }
                moved.extend(both);
                qemu = version;
            }
        }
        let paged = self.measure_pager()?;
        Ok(Measured { qemu, guest: theirs::guest(), moved, resized, paged })
    }

    /// What the pager does, beside what QEMU does itself.
    ///
    /// # Errors
    ///
    /// When something does not come to its end.
    pub fn measure_pager(&self) -> Result<Paged> {
        self.forget()?;
        let paged = pager::measure(&self.kit, &self.dir.join("pager"))?;
        self.forget()?;
        Ok(paged)
    }

    /// Moves a fresh guest by QEMU, and a copy of its memory by this project.
    fn compare(&self, route: Route) -> Result<(String, Vec<Moved>)> {
        self.forget()?;
        let mut source = Source::boot(&self.kit, &self.dir)?;
        let copy = source.copy()?;
        let mut moved = vec![source.move_by_qemu(route)?];
        let version = source.stop();
        // This project has one layout for files.
        if route != Route::File {
            moved.push(copy.move_by_us(route, &self.dir)?);
        }
        Ok((version, moved))
    }

    /// Begins with an empty folder.
    fn forget(&self) -> Result<()> {
        if self.dir.exists() {
            fs::remove_dir_all(&self.dir)?;
        }
        Ok(())
    }
}
