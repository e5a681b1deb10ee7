//! Runs the steps, each on a machine that suits it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::guest::Guest;
use crate::machine::{self, Machine, Parts, Setup};
use crate::options::Options;
use crate::provision::Kit;
use crate::qemu::{Accelerator, Device, Qemu};
use crate::report::Report;
use crate::steps::{self, Proof, Step};
use crate::wait;

/// Runs the chosen steps.
pub fn all(kit: &Kit, daemon: &Path, options: &Options, dir: &Path) -> Result<Report> {
    let accelerator = if options.kvm { probe_kvm(kit, dir)? } else { Accelerator::Tcg };
    let parts = Parts { kit, accelerator, daemon };
    let mut bench = Bench { parts, dir, boots: 0, machine: None, report: Report::default() };
    let chosen = |step: &&Step| {
        options.steps.is_empty() || options.steps.iter().any(|name| name == step.name)
    };
    for step in steps::ALL.iter().filter(chosen) {
        bench.run(step);
    }
    bench.stop();
    Ok(bench.report)
}

/// Opening /dev/kvm proves little: only a kernel that boots does.
fn probe_kvm(kit: &Kit, dir: &Path) -> Result<Accelerator> {
    let dir = dir.join("kvm-probe");
    fs::create_dir_all(&dir)?;
    let boots = Qemu::start(kit, Accelerator::Kvm, &Device::None, &dir).and_then(|mut qemu| {
        let mut guest = Guest::connect(&dir.join("guest.sock"))?;
        let ready = guest.wait_ready_within(wait::SHORT);
        qemu.stop();
        ready
    });
    match boots {
        Ok(()) => Ok(Accelerator::Kvm),
        Err(error) => {
            eprintln!("real-guest: no guest boots with KVM ({error:#}); going on without");
            Ok(Accelerator::Tcg)
        }
    }
}

/// The machine at hand and the report so far.
struct Bench<'a> {
    parts: Parts<'a>,
    dir: &'a Path,
    boots: u32,
    machine: Option<Machine>,
    report: Report,
}

impl Bench<'_> {
    fn run(&mut self, step: &Step) {
        match &step.proof {
            Proof::Machine(setup, run) => self.run_on_machine(step, setup, *run),
            Proof::Own(run) => self.run_alone(step, *run),
        }
    }

    fn run_alone(&mut self, step: &Step, run: fn(&Parts<'_>, &Path, &mut Report) -> Result<()>) {
        self.stop();
        self.report.begin(step.name);
        let failures = self.report.failures();
        let dir = self.next_dir();
        let outcome = fs::create_dir_all(&dir)
            .map_err(Into::into)
            .and_then(|()| run(&self.parts, &dir, &mut self.report));
        match outcome {
            Err(error) => {
                self.fail(step, "given up", &format!("{error:#}"), &machine::logs(&dir));
            }
            Ok(()) if self.report.failures() != failures => eprintln!("{}", machine::logs(&dir)),
            Ok(()) => {}
        }
    }

    fn run_on_machine(
        &mut self,
        step: &Step,
        setup: &Setup,
        run: fn(&mut Machine, &mut Report) -> Result<()>,
    ) {
        let mut machine = match self.machine_for(setup) {
            Ok(machine) => machine,
            Err((reason, words)) => return self.fail(step, "boot", &reason, &words),
        };
        self.report.begin(step.name);
        let failures = self.report.failures();
        let outcome = run(&mut machine, &mut self.report);
        match outcome {
            Ok(()) if self.report.failures() == failures => self.machine = Some(machine),
            // The next step deserves a machine without a past.
            Ok(()) => eprintln!("{}", machine.last_words()),
            Err(error) => {
                let words = machine.last_words();
                self.fail(step, "given up", &format!("{error:#}"), &words);
            }
        }
    }

    fn machine_for(&mut self, setup: &Setup) -> Result<Machine, (String, String)> {
        if let Some(mut machine) = self.machine.take_if(|machine| machine.setup == *setup) {
            match machine.empty() {
                Ok(()) => return Ok(machine),
                Err(error) => {
                    return Err((format!("emptying: {error:#}"), machine.last_words()));
                }
            }
        }
        self.stop();
        let dir = self.next_dir();
        let boot = fs::create_dir_all(&dir)
            .map_err(Into::into)
            .and_then(|()| Machine::boot(&self.parts, setup, &dir));
        boot.map_err(|error| (format!("{error:#}"), machine::logs(&dir)))
    }

    fn next_dir(&mut self) -> PathBuf {
        self.boots += 1;
        self.dir.join(format!("boot-{}", self.boots))
    }

    fn stop(&mut self) {
        if let Some(machine) = self.machine.take()
            && let Err(error) = machine.stop()
        {
            self.report.failed("end", format!("{error:#}"));
        }
    }

    fn fail(&mut self, step: &Step, stage: &str, reason: &str, words: &str) {
        self.report.begin(step.name);
        self.report.failed(stage, reason.to_owned());
        eprintln!("{words}");
    }
}
