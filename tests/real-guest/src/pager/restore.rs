//! Restores of a guest from files of QEMU's and of the pager's, with pagers that die.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use super::pages::memory_of;
use super::program::{Ended, Pager};
use super::vm::{Backend, Shape, Start, VERIFIED_MIB, Vm};
use crate::machine::Parts;
use crate::report::Report;
use crate::sizes::{MIB, human};
use crate::wait;

/// What the first device grows to in the end.
const GROWN: u64 = 384 * MIB;
/// So slow that the middle of a restore lasts.
const SLOW: &str = "24M";
/// How long each pager lives that is killed.
const LIFE: Duration = Duration::from_millis(700);

/// A guest that was saved while it was paused, so that its files are right for certain, in all ways.
pub fn run(parts: &Parts<'_>, dir: &Path, report: &mut Report) -> Result<()> {
    let images = Images::make(parts, Shape::TWO, &dir.join("two"))?;
    let mut restores = Restores { parts, shape: Shape::TWO, dir, report, machines: 0 };
    restores.preempt("mapped-ram, preempt", &images.mapped)?;
    restores.one_channel("plain, one channel", &images.plain)?;
    restores.paused("paused, --qmp", &images.ours)?;
    restores.eager("--eager", &images.mapped)?;
    restores.killed("killed three times", &images.ours)?;
    let machines = restores.machines;
    images.remove()?;

    let images = Images::make(parts, Shape::ONE, &dir.join("one"))?;
    let mut restores = Restores { parts, shape: Shape::ONE, dir, report, machines };
    restores.preempt("anonymous, plain, preempt", &images.plain)?;
    restores.replay("anonymous, --replay", &images.ours)?;
    restores.killed("anonymous, killed three times", &images.mapped)?;
    images.remove()
}

/// One guest in files of three kinds.
struct Images {
    plain: PathBuf,
    mapped: PathBuf,
    ours: PathBuf,
}

impl Images {
    fn make(parts: &Parts<'_>, shape: Shape, dir: &Path) -> Result<Self> {
        let mut vm = Vm::boot(parts, shape, VERIFIED_MIB, dir)?;
        let path = |name: &str| dir.join(name);
        let images = Self { plain: path("plain"), mapped: path("mapped"), ours: path("ours") };
        for (file, mapped_ram) in [(&images.plain, false), (&images.mapped, true)] {
            vm.qmp.save(file, mapped_ram)?;
        }
        vm.set_capabilities(&[("mapped-ram", false)])?;
        vm.qmp.execute("stop", &json!({}))?;
        let (socket, qmp) = (dir.join("save.sock"), vm.pager_qmp());
        let mut words: Vec<String> = vec!["save".to_owned()];
        for (option, value) in [("--socket", &socket), ("--image", &images.ours), ("--qmp", &qmp)] {
            words.extend([option.to_owned(), value.display().to_string()]);
        }
        Pager::run(parts, dir, &words)?.expect_success()?;
        vm.stop();
        Ok(images)
    }

    fn remove(self) -> Result<()> {
        let Self { plain, mapped, ours } = self;
        [plain, mapped, ours].into_iter().try_for_each(|path| Ok(fs::remove_file(path)?))
    }
}

struct Restores<'a> {
    parts: &'a Parts<'a>,
    shape: Shape,
    dir: &'a Path,
    report: &'a mut Report,
    machines: u32,
}

impl Restores<'_> {
    /// A QEMU that waits for a guest.
    fn vm(&mut self) -> Result<Vm> {
        self.machines += 1;
        let dir = self.dir.join(format!("restored-{}", self.machines));
        Vm::start(self.parts, self.shape, Start::Incoming, &dir)
    }

    fn start(&self, vm: &Vm, image: &Path, qmp: bool, more: &[&str]) -> Result<Pager> {
        let mut words: Vec<String> = ["restore", "--json", "--socket"].map(str::to_owned).into();
        words.extend([vm.dir().join("restore.sock").display().to_string(), "--image".to_owned()]);
        words.push(image.display().to_string());
        if qmp {
            words.extend(["--qmp".to_owned(), vm.pager_qmp().display().to_string()]);
        }
        words.extend(more.iter().map(|word| (*word).to_owned()));
        Pager::start(self.parts, vm.dir(), &words)
    }

    /// As a user does who gives QEMU its commands himself.
    fn incoming(&self, vm: &mut Vm, capabilities: &[(&str, bool)]) -> Result<()> {
        vm.set_capabilities(capabilities)?;
        let uri = format!("unix:{}", vm.dir().join("restore.sock").display());
        let arguments = json!({ "uri": uri, "exit-on-error": false });
        vm.qmp.execute("migrate-incoming", &arguments).map(drop)
    }

    /// Postcopy runs a guest that was paused; the pager says so, and complains of nothing else.
    fn expect_started_all_the_same(&self, ended: &Ended) -> Result<()> {
        let lines: Vec<&str> = ended.err.lines().collect();
        let told = matches!(lines[..], [line] if line.contains("saved while it was paused"));
        ensure!(ended.status == Some(0) && told, "the pager ended with {ended:?}");
        Ok(())
    }

    /// The guest is right, through the end, and its memory can change its size.
    fn finish(&mut self, stage: &str, mut vm: Vm, ended: &Ended) -> Result<()> {
        let completed = vm.wait_migration("completed")?;
        ensure!(completed["status"] == "completed", "{completed}");
        let guest = vm.check().with_context(|| format!("{stage}: {ended:?}"))?;
        let resident = self.resident(&vm)?;
        vm.resize(0, GROWN)?;
        vm.wait_plugged(0, GROWN).context("a resize after the restore")?;
        let said = match Summary::of(ended) {
            Ok(summary) => summary.to_string(),
            Err(error) => return Err(error.context(stage.to_owned())),
        };
        self.report.add(stage, guest, said, resident.map(human).unwrap_or_default(), Vec::new());
        vm.stop();
        Ok(())
    }

    /// What the host holds for memory that is files, bytes.
    fn resident(&self, vm: &Vm) -> Result<Option<u64>> {
        if self.shape.backend == Backend::Anonymous {
            return Ok(None);
        }
        let mut resident = 0;
        for region in self.shape.regions {
            resident += memory_of(vm.process(), region.size)?.metadata()?.blocks() * 512;
        }
        Ok(Some(resident))
    }

    /// Commands by hand; the working set is recorded.
    fn preempt(&mut self, stage: &str, image: &Path) -> Result<()> {
        let mut vm = self.vm()?;
        self.incoming(&mut vm, &[("postcopy-ram", true), ("postcopy-preempt", true)])?;
        let record = vm.dir().join("touched");
        let more = ["--record", &record.display().to_string()];
        let ended = self.start(&vm, image, false, &more)?.wait()?;
        self.expect_started_all_the_same(&ended)?;
        ensure!(record.metadata()?.len() > 24, "nothing was recorded");
        if let Some(resident) = self.resident(&vm)? {
            // The verifier's memory; what was plugged and not touched costs nothing.
            let limit = (VERIFIED_MIB + 64) * MIB;
            ensure!(resident <= limit, "{} are resident, of what was plugged", human(resident));
        }
        self.finish(stage, vm, &ended)
    }

    /// A QEMU without postcopy-preempt, and no control socket: holes are sent.
    fn one_channel(&mut self, stage: &str, image: &Path) -> Result<()> {
        let mut vm = self.vm()?;
        self.incoming(&mut vm, &[("postcopy-ram", true)])?;
        let ended = self.start(&vm, image, false, &[])?.wait()?;
        self.expect_started_all_the_same(&ended)?;
        ensure!(Summary::of(&ended)?.pages("hole")? != 0, "no holes were sent: {ended:?}");
        self.finish(stage, vm, &ended)
    }

    /// With the control socket a paused guest stays paused.
    fn paused(&mut self, stage: &str, image: &Path) -> Result<()> {
        let mut vm = self.vm()?;
        let ended = self.start(&vm, image, true, &[])?.wait()?;
        ended.expect_success()?;
        ensure!(vm.qmp.status()? != "running", "the guest was started");
        vm.qmp.execute("cont", &json!({}))?;
        self.finish(stage, vm, &ended)
    }

    fn eager(&mut self, stage: &str, image: &Path) -> Result<()> {
        let mut vm = self.vm()?;
        let ended = self.start(&vm, image, true, &["--eager"])?.wait()?;
        ended.expect_success()?;
        ensure!(vm.qmp.status()? != "running", "the guest was started");
        vm.qmp.execute("cont", &json!({}))?;
        self.finish(stage, vm, &ended)
    }

    /// The order of the first run's touches comes first in the second.
    fn replay(&mut self, stage: &str, image: &Path) -> Result<()> {
        let mut vm = self.vm()?;
        let touched = vm.dir().join("touched").display().to_string();
        self.incoming(&mut vm, &[("postcopy-ram", true), ("postcopy-preempt", true)])?;
        self.start(&vm, image, false, &["--record", &touched, "--bandwidth", SLOW])?.wait()?;
        vm.stop();
        let mut vm = self.vm()?;
        self.incoming(&mut vm, &[("postcopy-ram", true), ("postcopy-preempt", true)])?;
        let ended = self.start(&vm, image, false, &["--replay", &touched])?.wait()?;
        self.expect_started_all_the_same(&ended)?;
        ensure!(Summary::of(&ended)?.pages("replay")? != 0, "nothing was replayed: {ended:?}");
        self.finish(stage, vm, &ended)
    }

    /// Pagers that are killed in the middle of one restore, of a guest that runs, and is asked to grow meanwhile.
    fn killed(&mut self, stage: &str, image: &Path) -> Result<()> {
        let mut vm = self.vm()?;
        for life in 0..3 {
            let recover: &[&str] = if life == 0 { &[] } else { &["--recover"] };
            let more = [&["--bandwidth", SLOW], recover].concat();
            let pager = self.start(&vm, image, true, &more)?;
            if life == 0 {
                self.wait_under_way(&mut vm)?;
                vm.qmp.execute("cont", &json!({}))?;
                // While memory arrives a plug is BUSY.
                vm.resize(0, GROWN)?;
            }
            std::thread::sleep(LIFE);
            pager.kill()?;
        }
        let ended = self.start(&vm, image, true, &["--recover"])?.wait()?;
        ended.expect_success()?;
        let grown = vm.plugged(0)?;
        ensure!(grown == GROWN, "{} are plugged after the restore", human(grown));
        vm.wait_migration("completed")?;
        // As it was saved, which is what is checked.
        vm.resize(0, self.shape.regions[0].requested)?;
        vm.wait_plugged(0, self.shape.regions[0].requested)?;
        self.finish(stage, vm, &ended)
    }

    fn wait_under_way(&self, vm: &mut Vm) -> Result<()> {
        wait::until("the guest to be there", wait::SHORT, || {
            let (migration, status) = (vm.migration()?, vm.qmp.status()?);
            match migration["status"].as_str() {
                Some("postcopy-active") => Ok((status == "paused").then_some(())),
                Some("failed" | "completed") => bail!("it is over: {migration}"),
                _ => Ok(None),
            }
        })
    }
}

/// The last line of a restore's.
struct Summary(serde_json::Value);

impl Summary {
    fn of(ended: &Ended) -> Result<Self> {
        let last = ended.out.lines().last().context("the pager printed nothing")?;
        let summary: serde_json::Value = serde_json::from_str(last)?;
        ensure!(summary["event"] == "completed", "the last line is {summary}");
        Ok(Self(summary))
    }

    /// Pages that were sent for a reason.
    fn pages(&self, source: &str) -> Result<u64> {
        self.0["pages"][source].as_u64().with_context(|| format!("no pages of {source}"))
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let seconds = |name: &str| self.0[name].as_f64().unwrap_or_default();
        write!(
            f,
            "running after {:.0} ms, all after {:.2} s, {} requests",
            seconds("running_seconds") * 1000.0,
            seconds("complete_seconds"),
            self.0["requests"]
        )
    }
}
