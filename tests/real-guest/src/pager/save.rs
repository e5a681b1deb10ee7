//! Saves of a running and of a paused guest, and saves that fail.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::json;

use super::pages::{compare, memory_of};
use super::program::{Ended, Pager};
use super::vm::{RAM, Shape, Start, VERIFIED_MIB, Vm};
use crate::machine::Parts;
use crate::report::Report;
use crate::sizes::human;

/// A file of a guest that ran is not always good under TCG, QEMU's own neither (a page that changes while
/// it is sent may be missed); of so many one must be.
const ATTEMPTS: usize = 3;

/// Saves that fail leave the guest running; then saves in all ways, which a QEMU loads without the pager.
pub fn run(parts: &Parts<'_>, dir: &Path, report: &mut Report) -> Result<()> {
    let vm = Vm::boot(parts, Shape::TWO, VERIFIED_MIB, &dir.join("two"))?;
    let mut saves = Saves { parts, vm, shape: Shape::TWO, report, loads: 0 };
    saves.full_disk()?;
    saves.killed()?;
    saves.paused()?;
    saves.running("running, --qmp", Way { qmp: true, capabilities: &[] })?;
    let multifd = Way { qmp: false, capabilities: &[("multifd", true), ("return-path", true)] };
    saves.running("running, multifd", multifd)?;
    saves.postcopy("postcopy, preempt", &["postcopy-ram", "postcopy-preempt"], false)?;
    let Saves { vm, .. } = saves;
    vm.stop();

    let vm = Vm::boot(parts, Shape::ONE, VERIFIED_MIB, &dir.join("one"))?;
    let mut saves = Saves { parts, vm, shape: Shape::ONE, report, loads: 0 };
    saves
        .running("running, one way", Way { qmp: false, capabilities: &[("return-path", false)] })?;
    saves.postcopy("postcopy, killed, --recover", &["postcopy-ram"], true)?;
    let Saves { vm, .. } = saves;
    vm.stop();
    Ok(())
}

/// How QEMU is made to migrate.
#[derive(Clone, Copy)]
struct Way {
    /// By the pager.
    qmp: bool,
    capabilities: &'static [(&'static str, bool)],
}

struct Saves<'a> {
    parts: &'a Parts<'a>,
    vm: Vm,
    shape: Shape,
    report: &'a mut Report,
    loads: u32,
}

impl Saves<'_> {
    fn socket(&self) -> PathBuf {
        self.vm.dir().join("pager.sock")
    }

    fn words(&self, image: &Path) -> Vec<String> {
        let words = ["save", "--socket", &self.socket().display().to_string(), "--image"];
        let mut words: Vec<String> = words.map(str::to_owned).into();
        words.push(image.display().to_string());
        words
    }

    /// Starts a save; by the way that QEMU is made to migrate it is under way when this returns.
    fn begin(&mut self, way: Way, image: &Path) -> Result<Pager> {
        // As fast as it goes: what the guest dirties meanwhile must not outrun it.
        self.vm.qmp.execute("migrate-set-parameters", &json!({ "max-bandwidth": 0 }))?;
        self.vm.set_capabilities(way.capabilities)?;
        let mut words = self.words(image);
        if way.qmp {
            words.extend(["--qmp".to_owned(), self.vm.pager_qmp().display().to_string()]);
        }
        let mut pager = Pager::start(self.parts, self.vm.dir(), &words)?;
        if !way.qmp {
            pager.wait_listening(&self.socket())?;
            let uri = format!("unix:{}", self.socket().display());
            self.vm.qmp.execute("migrate", &json!({ "uri": uri }))?;
        }
        Ok(pager)
    }

    fn save(&mut self, way: Way, image: &Path) -> Result<Ended> {
        let ended = self.begin(way, image)?.wait()?;
        let off: Vec<(&str, bool)> =
            way.capabilities.iter().map(|(name, _)| (*name, false)).collect();
        self.vm.set_capabilities(&off)?;
        Ok(ended)
    }

    /// A disk that is full: the guest runs on, QEMU says that the migration failed, nothing is left.
    fn full_disk(&mut self) -> Result<()> {
        let small = Small::mount(&self.vm.dir().join("small"))?;
        let image = small.path.join("image");
        fs::write(&image, "precious")?;
        let ended =
            self.save(Way { qmp: false, capabilities: &[("return-path", true)] }, &image)?;
        let mut problems = Vec::new();
        let mut claim = |claim: &str, holds: bool| {
            if !holds {
                problems.push(format!("not so: {claim} ({}, {ended:?})", self.vm.dir().display()));
            }
        };
        claim("the pager ends with 1", ended.status == Some(1));
        claim("it says that the disk is full", ended.err.contains("No space left on device"));
        claim("what had the name has it still", fs::read(&image)? == b"precious");
        claim("nothing else is left", fs::read_dir(&small.path)?.count() == 1);
        let failed = self.vm.wait_migration("failed")?;
        let guest = self.vm.check()?;
        self.report.add(
            "full disk",
            guest,
            failed["error-desc"].to_string(),
            String::new(),
            problems,
        );
        Ok(())
    }

    /// A pager that is killed in the middle: the same, and the source learns it from the channel.
    fn killed(&mut self) -> Result<()> {
        let image = self.vm.dir().join("killed");
        // Slow enough to be in the middle of it.
        let pager =
            self.begin(Way { qmp: false, capabilities: &[("return-path", true)] }, &image)?;
        let slow = json!({ "max-bandwidth": 8 << 20 });
        self.vm.qmp.execute("migrate-set-parameters", &slow)?;
        std::thread::sleep(Duration::from_millis(300));
        pager.kill()?;
        let failed = self.vm.wait_migration("failed")?;
        let names = fs::read_dir(self.vm.dir())?.map(|entry| Ok(entry?.file_name()));
        let names = names.collect::<std::io::Result<Vec<_>>>()?;
        let left = names.iter().any(|name| name.to_string_lossy().starts_with("killed"));
        let problems = if left { vec!["a killed save left a file".to_owned()] } else { Vec::new() };
        let guest = self.vm.check()?;
        self.report.add("killed", guest, failed["error-desc"].to_string(), String::new(), problems);
        Ok(())
    }

    /// A guest that is paused: the image has every page of its memory.
    fn paused(&mut self) -> Result<()> {
        let image = self.vm.dir().join("paused");
        self.vm.qmp.execute("stop", &json!({}))?;
        self.save(Way { qmp: true, capabilities: &[] }, &image)?.expect_success()?;
        let mut memory = vec![("ram", memory_of(self.vm.process(), RAM)?)];
        for (name, region) in ["vmem0", "vmem1"].into_iter().zip(self.shape.regions) {
            memory.push((name, memory_of(self.vm.process(), region.size)?));
        }
        let pages = compare(&image, &memory)?;
        self.vm.qmp.execute("cont", &json!({}))?;
        let guest = self.vm.check()?;
        let held = held(&image)?;
        self.report.add(
            "paused",
            guest,
            format!("{pages} pages as in memory"),
            human(held),
            Vec::new(),
        );
        fs::remove_file(&image)?;
        Ok(())
    }

    /// A guest that runs: QEMU loads the image without the pager, and the guest continues there. It continues here,
    /// too, after that, for the next.
    fn running(&mut self, stage: &str, way: Way) -> Result<()> {
        for attempt in 1..=ATTEMPTS {
            let image = self.vm.dir().join(format!("running-{attempt}"));
            self.save(way, &image)?.expect_success().context(stage.to_owned())?;
            let held = held(&image)?;
            let loaded = self.load(&image);
            fs::remove_file(&image)?;
            self.vm.wait_migration("completed")?;
            self.vm.qmp.execute("cont", &json!({}))?;
            self.vm.check().context("the source, which continues after the save")?;
            match loaded {
                Ok(guest) => {
                    let said = format!("loaded by QEMU, attempt {attempt}");
                    self.report.add(stage, guest, said, human(held), Vec::new());
                    return Ok(());
                }
                Err(error) if attempt == ATTEMPTS => return Err(error.context(stage.to_owned())),
                Err(error) => eprintln!("real-guest: {stage}: {error:#}; trying once more"),
            }
        }
        Ok(())
    }

    /// The source gives the guest away in the middle of its memory; the pager may be killed after that, and another
    /// one finishes the image.
    fn postcopy(&mut self, stage: &str, capabilities: &[&str], killed: bool) -> Result<()> {
        let image = self.vm.dir().join("postcopy");
        let on: Vec<(&str, bool)> = capabilities.iter().map(|name| (*name, true)).collect();
        self.vm.set_capabilities(&on)?;
        // Pages after the guest was given away: as fast as it goes, or so slow that its middle lasts.
        let bandwidth = if killed { 16 << 20 } else { 0 };
        let parameters = json!({ "max-postcopy-bandwidth": bandwidth });
        self.vm.qmp.execute("migrate-set-parameters", &parameters)?;
        let pager = self.begin(Way { qmp: false, capabilities: &[] }, &image)?;
        self.vm.qmp.execute("migrate-start-postcopy", &json!({}))?;
        let mut said = "loaded by QEMU".to_owned();
        let ended = match killed {
            false => pager.wait()?,
            true => {
                self.vm.wait_migration("postcopy-active")?;
                std::thread::sleep(Duration::from_millis(500));
                pager.kill()?;
                self.vm.wait_migration("postcopy-paused")?;
                // Half of the guest is elsewhere: QEMU keeps its half, and does not run it.
                for command in ["cont", "migrate_cancel"] {
                    let refused = self.vm.qmp.execute(command, &json!({}));
                    ensure!(
                        refused.is_err(),
                        "QEMU takes {command} of a guest that was given away"
                    );
                }
                self.vm.wait_migration("postcopy-paused")?;
                ensure!(!image.exists(), "a killed save left an image");
                // The image waits to be finished: another guest is not saved there.
                let other = Pager::run(self.parts, self.vm.dir(), &self.words(&image))?;
                ensure!(other.status == Some(2), "another save to it ended with {other:?}");
                self.vm
                    .qmp
                    .execute("migrate-set-parameters", &json!({ "max-postcopy-bandwidth": 0 }))?;
                let mut words = self.words(&image);
                words.extend(["--recover".to_owned(), "--qmp".to_owned()]);
                words.push(self.vm.pager_qmp().display().to_string());
                said.push_str(", after a recovery");
                Pager::run(self.parts, self.vm.dir(), &words)?
            }
        };
        ended.expect_success().context(stage.to_owned())?;
        self.vm.wait_migration("completed")?;
        let names = fs::read_dir(self.vm.dir())?.map(|entry| Ok(entry?.file_name()));
        let names = names.collect::<std::io::Result<Vec<_>>>()?;
        let left = names.iter().any(|name| name.to_string_lossy().ends_with(".recover"));
        ensure!(!left, "what was kept for a recovery is still there");
        let guest = self.load(&image).context(stage.to_owned())?;
        self.report.add(stage, guest, said, human(held(&image)?), Vec::new());
        fs::remove_file(&image)?;
        Ok(())
    }

    fn load(&mut self, image: &Path) -> Result<String> {
        self.loads += 1;
        let dir = self.vm.dir().join(format!("load-{}", self.loads));
        let mut vm = Vm::start(self.parts, self.shape, Start::Incoming, &dir)?;
        vm.load(image, true)?;
        let seen = vm.check()?;
        vm.stop();
        Ok(seen)
    }
}

fn held(file: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(fs::metadata(file)?.blocks() * 512)
}

/// A file system that is soon full.
struct Small {
    path: PathBuf,
}

impl Small {
    fn mount(path: &Path) -> Result<Self> {
        fs::create_dir_all(path)?;
        let mounted = mount("small", path, "tmpfs", MountFlags::empty(), Some(c"size=32m"));
        mounted.context("cannot mount a small file system; this step needs root")?;
        let small = Self { path: path.to_owned() };
        ensure!(small.path.is_dir());
        Ok(small)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = unmount(&self.path, UnmountFlags::DETACH);
    }
}
