//! One guest in files of three kinds.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use migration::inspect::inspect;
use serde_json::json;

use super::save::Saver;

/// The run state in a file: a length and so many bytes, behind the head of a section with this name.
const SECTION: &str = "globalstate";
const HEAD: u64 = 1 + 4 + 1 + SECTION.len() as u64 + 4 + 4;
const STATE: usize = 100;

/// Files of a guest, which runs as soon as it is loaded.
pub struct Images {
    /// QEMU's, as a stream.
    pub plain: PathBuf,
    /// QEMU's, mapped-ram.
    pub mapped: PathBuf,
    /// The pager's.
    pub ours: PathBuf,
}

impl Images {
    /// Saves a guest that is paused: under TCG a file of one that runs is not always good.
    pub fn make(saver: &mut Saver<'_>, dir: &Path) -> Result<Self> {
        let images = Self::ours(saver, dir)?;
        for (file, mapped) in [(&images.plain, false), (&images.mapped, true)] {
            saver.again()?;
            saver.vm.qmp.migrate(&format!("file:{}", file.display()), mapped)?;
            saver.vm.qmp.execute("migrate-set-capabilities", &no_mapped_ram())?;
            has_run(file)?;
        }
        Ok(images)
    }

    /// The pager's alone.
    pub fn ours(saver: &mut Saver<'_>, dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let path = |name: &str| dir.join(name);
        let images = Self { plain: path("plain"), mapped: path("mapped"), ours: path("ours") };
        saver.save_by_us(&images.ours)?;
        has_run(&images.ours)?;
        Ok(images)
    }

    /// Removes them.
    pub fn remove(self) -> Result<()> {
        for path in [self.plain, self.mapped, self.ours] {
            if path.exists() {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }
}

fn no_mapped_ram() -> serde_json::Value {
    json!({ "capabilities": [{ "capability": "mapped-ram", "state": false }] })
}

/// Makes a file say that its guest ran, so that it does when it is loaded.
fn has_run(path: &Path) -> Result<()> {
    let inspection = inspect(File::open(path)?);
    let section = inspection.sections.iter().find(|section| section.header.idstr == SECTION);
    let section = section.with_context(|| format!("{} has no {SECTION}", path.display()))?;
    let mut state = [0; 4 + STATE];
    let running = b"running\0";
    state[3] = running.len() as u8;
    state[4..4 + running.len()].copy_from_slice(running);
    let file = OpenOptions::new().write(true).open(path)?;
    Ok(file.write_all_at(&state, section.offset + HEAD)?)
}
