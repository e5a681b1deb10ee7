//! Restores of a guest, by QEMU itself and by the pager.

use std::path::Path;
use std::thread;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use real_guest::machine::Parts;
use real_guest::pager::vm::{Shape, Start, Vm};
use serde::{Deserialize, Serialize};

use super::bare::Bare;
use super::images::Images;
use super::process::{Pager, cpu_without_vcpus};
use crate::host;
use crate::units::{GIB, millis};

/// So slow that what is touched first is asked for, and seen.
const SLOW: &str = "24M";

/// By whom, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// QEMU, of a stream.
    Plain,
    /// QEMU, of a mapped-ram file.
    Mapped,
    /// The pager; the guest runs while memory arrives.
    Lazy,
    /// The same, what was touched first last time first.
    Replay,
    /// The pager; all memory before the guest runs.
    Eager,
    /// As the second, by a writer that has the records of all pages ready.
    Bare,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Plain, Self::Mapped, Self::Lazy, Self::Replay, Self::Eager, Self::Bare];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "QEMU, stream",
            Self::Mapped => "QEMU, mapped-ram",
            Self::Lazy => "`vmem-pager restore`",
            Self::Replay => "the same, `--replay`",
            Self::Eager => "the same, `--eager`",
            Self::Bare => "a bare writer, lazily",
        }
    }
}

/// One guest, restored once. Times are milliseconds from when the command was given; sizes are bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Restored {
    /// How.
    pub way: Way,
    /// Until the guest ran (QEMU's event RESUME).
    pub runs: f64,
    /// The same, from when the pager had connected: without its start, reading the image, and QMP.
    pub runs_after_connecting: Option<f64>,
    /// Until a program in the guest had said something.
    pub tick: f64,
    /// Until QEMU said that the migration is completed.
    pub all: f64,
    /// From a request's being read to its answer's being written, median and 99th percentile, microseconds.
    pub faults: Option<[f64; 2]>,
    /// Pages that were asked for.
    pub requests: Option<u64>,
    /// What the host then holds for the guest's memory.
    pub held: u64,
    /// The most that the pager held.
    pub pager: Option<u64>,
    /// Processor time of QEMU without its vCPUs, and of the pager.
    pub cpu: f64,
}

/// Writes down what is touched first.
pub fn record(parts: &Parts<'_>, shape: Shape, images: &Images, dir: &Path) -> Result<()> {
    let vm = Vm::start(parts, shape, Start::Incoming, &dir.join("destination"))?;
    let more = ["--record".to_owned(), touched(dir), "--bandwidth".to_owned(), SLOW.to_owned()];
    Pager::start(parts, &words(&vm, &images.ours, &more))?.wait()?;
    vm.stop();
    Ok(())
}

fn touched(dir: &Path) -> String {
    dir.join("touched").display().to_string()
}

fn words(vm: &Vm, image: &Path, more: &[String]) -> Vec<String> {
    let mut words = vec!["restore".to_owned()];
    let socket = vm.dir().join("restore.sock");
    for (option, path) in
        [("--socket", socket.as_path()), ("--image", image), ("--qmp", &vm.pager_qmp())]
    {
        words.extend([option.to_owned(), path.display().to_string()]);
    }
    words.extend_from_slice(more);
    words
}

/// Restores a guest to a fresh QEMU, and looks at it there.
pub fn restore(
    parts: &Parts<'_>,
    shape: Shape,
    images: &Images,
    way: Way,
    dir: &Path,
) -> Result<Restored> {
    let mut vm = Vm::start(parts, shape, Start::Incoming, &dir.join("destination"))?;
    vm.set_capabilities(&[("events", true)])?;
    let mut verifier = vm.verifier()?;
    let bare = (way == Way::Bare).then(|| Bare::read(&images.ours)).transpose()?;
    host::warm(2 * GIB)?;
    let ticking = thread::spawn(move || verifier.tick().map(|_| SystemTime::now()));
    let before = cpu_without_vcpus(vm.process())?;
    let begun = SystemTime::now();
    let (mut pager, mut writing) = (None, None);
    match way {
        Way::Plain | Way::Mapped => {
            let mapped = way == Way::Mapped;
            let file = if mapped { &images.mapped } else { &images.plain };
            vm.qmp.migrate_incoming(&format!("file:{}", file.display()), mapped)?;
        }
        Way::Lazy | Way::Replay | Way::Eager => {
            let more = match way {
                Way::Replay => vec!["--replay".to_owned(), touched(dir)],
                Way::Eager => vec!["--eager".to_owned()],
                _ => Vec::new(),
            };
            pager = Some(Pager::start(parts, &words(&vm, &images.ours, &more))?);
        }
        Way::Bare => {
            let socket = vm.dir().join("restore.sock");
            Bare::prepare(&mut vm, &socket)?;
            writing = bare.map(|bare| thread::spawn(move || bare.send(&socket)));
        }
    }
    let since = |at: SystemTime| Ok::<_, anyhow::Error>(millis(at.duration_since(begun)?));
    // The pager says at its end what it has seen.
    let waiting = pager.map(|pager| thread::spawn(move || pager.wait()));
    let runs = vm.qmp.wait_event(|event| event["event"] == "RESUME")?;
    let all = vm.qmp.wait_event(|event| {
        event["event"] == "MIGRATION" && event["data"]["status"] == "completed"
    })?;
    let mut cpu = cpu_without_vcpus(vm.process())? - before;
    let held = vm.resident()?;
    let tick = ticking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    let took = waiting
        .map(|waiting| waiting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
    let took = took.transpose()?;
    if let Some(writing) = writing {
        let written = writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        written.context("the bare writer")?;
    }
    cpu += took.as_ref().map_or(0.0, |took| took.cpu);
    let summary = took.as_ref().map(|took| &took.summary);
    let number = |name: &str| summary.and_then(|summary| summary[name].as_f64());
    if let Some(summary) = summary {
        ensure!(summary["event"] == "completed", "the pager's last word is {summary}");
    }
    vm.check().with_context(|| format!("{}: the guest", way.name()))?;
    vm.stop();
    Ok(Restored {
        way,
        runs: since(runs)?,
        runs_after_connecting: number("running_seconds").map(|seconds| seconds * 1e3),
        tick: since(tick)?,
        all: since(all)?,
        faults: number("service_p50_us").zip(number("service_p99_us")).map(|two| two.into()),
        requests: number("requests").map(|requests| requests as u64),
        held,
        pager: took.map(|took| took.held),
        cpu,
    })
}
