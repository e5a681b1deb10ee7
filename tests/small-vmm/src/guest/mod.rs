//! The VMM process: a guest that is told what to do, one JSON line for each command and each
//! answer.
//!
//! It has boot memory for the ring, the device's region, two vCPUs and a driver. It never decides
//! how much memory it has: that is between the device and the driver. A command that fails is
//! answered with the reason; the guest goes on.

mod command;
mod map;

use std::io::{BufRead, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};

use crate::driver::{BlockState, ResponseType};
use crate::machine::{Machine, MachineOptions, TIMEOUT};
use crate::memory::PAGE_SIZE;
use crate::migration::{Expected, Links, Migration};
pub use command::{Command, Report, State};
pub use map::Cell;

fn yes() -> bool {
    true
}

/// What the process is started with.
#[derive(Clone, Debug)]
pub struct GuestOptions {
    /// What the machine is made of.
    pub machine: MachineOptions,
    /// Where its guest comes from, when that is known at the start.
    pub incoming: Option<String>,
    /// What it comes over then.
    pub links: Links,
}

/// Makes a machine, and does what it is told until it is told to quit, or its commands end.
///
/// # Errors
///
/// When the machine cannot be made, a command is none, or a vCPU has found a wrong page.
pub fn run(
    options: GuestOptions,
    commands: impl BufRead,
    mut answers: impl Write,
) -> anyhow::Result<()> {
    let machine = Machine::start(options.machine)?;
    let mut session = Session { machine, migration: None };
    if let Some(from) = options.incoming {
        session.incoming(
            &from,
            Expected { discard_aware: true, postcopy: false, links: options.links },
        )?;
    }
    for line in commands.lines() {
        let command = serde_json::from_str(&line?).context("command")?;
        if command == Command::Quit {
            let Session { machine, .. } = session;
            // Threads that wait for what never comes end with the process only.
            ensure!(!machine.vcpus().is_halted(), "the guest's memory was lost");
            let work = machine.vcpus().clone().stop()?;
            let (verified, written) = (work.verified, work.written);
            return answer(&mut answers, &Report { verified, written, ..Report::default() });
        }
        let report = session.execute(&command).unwrap_or_else(|error| Report {
            error: Some(format!("{error:#}")),
            ..Report::default()
        });
        answer(&mut answers, &report)?;
    }
    Ok(())
}

fn answer(answers: &mut impl Write, report: &Report) -> anyhow::Result<()> {
    serde_json::to_writer(&mut *answers, report)?;
    writeln!(answers)?;
    Ok(answers.flush()?)
}

fn ask_state(machine: &Machine, offset: u64, size: u64) -> anyhow::Result<State> {
    ensure!(machine.is_running(), "the guest does not run here");
    let block_size = machine.frontend().config()?.block_size;
    let blocks = u16::try_from(size / block_size).context("more blocks than a request has")?;
    let addr = machine.options().addr + offset;
    let answered =
        machine.with_driver(|driver| driver.driver_mut().state(addr, blocks)).context("STATE")?;
    match (answered.kind(), answered.state()) {
        (ResponseType::Ack, BlockState::Plugged) => Ok(State::Plugged),
        (ResponseType::Ack, BlockState::Unplugged) => Ok(State::Unplugged),
        (ResponseType::Ack, BlockState::Mixed) => Ok(State::Mixed),
        (kind, state) => bail!("the device answered STATE with {kind:?}, {state:?}"),
    }
}

struct Session {
    machine: Arc<Machine>,
    migration: Option<Migration>,
}

impl Session {
    fn execute(&mut self, command: &Command) -> anyhow::Result<Report> {
        let machine = &self.machine;
        let (mut cells, mut state) = (0, None);
        match command {
            Command::Settle { requested } => {
                machine.settle(*requested)?;
            }
            Command::Touch { offset, size } => {
                let start = machine.options().addr + offset;
                machine.vcpus().give(start..start + size);
                let written = machine.vcpus().wait_written(start, TIMEOUT);
                ensure!(written, "vCPUs stopped, or are too slow");
            }
            Command::Pace { pages } => machine.vcpus().limit(*pages),
            Command::ReadOnly { on } => machine.vcpus().read_only(*on),
            Command::Look { offset, size } => {
                let start = machine.options().addr + offset;
                for page in (start..start + size).step_by(PAGE_SIZE as usize) {
                    let found: u64 = machine.ram().load(page)?;
                    ensure!(found == 0, "the page at {page:#x} was never written, and is not zero");
                }
            }
            Command::Report { cells: wanted } => cells = *wanted,
            Command::Migrate(options) => {
                let migration = Migration::outgoing(self.free_for_another()?, options.clone())?;
                self.migration = Some(migration);
            }
            Command::Incoming { from, discard_aware, postcopy, links } => {
                let (discard_aware, postcopy) = (*discard_aware, *postcopy);
                let expected = Expected { discard_aware, postcopy, links: links.clone() };
                self.incoming(from, expected)?;
            }
            Command::Snapshot { file, background } => {
                let machine = self.free_for_another()?;
                self.migration = Some(Migration::snapshot(machine, file, *background)?);
            }
            Command::Restore { file, lazy } => {
                let machine = self.free_for_another()?;
                self.migration = Some(Migration::restore(machine, file, *lazy)?);
            }
            Command::StartPostcopy => self.begun()?.start_postcopy(),
            Command::Bandwidth { max } => self.begun()?.set_bandwidth(*max)?,
            Command::Status => {
                ensure!(self.migration.is_some(), "no migration was begun");
            }
            Command::Cancel => self.begun()?.cancel(),
            Command::Cont => machine.cont()?,
            Command::AskState { offset, size } => state = Some(ask_state(machine, *offset, *size)?),
            Command::Detach => machine.detach(),
            Command::Reconnect => machine.reconnect()?,
            Command::Quit => bail!("the end comes elsewhere"),
        }
        Ok(Report { state, ..self.report(cells)? })
    }

    fn incoming(&mut self, from: &str, expected: Expected) -> anyhow::Result<()> {
        self.migration = Some(Migration::incoming(self.free_for_another()?, from, expected)?);
        Ok(())
    }

    fn begun(&self) -> anyhow::Result<&Migration> {
        self.migration.as_ref().context("no migration was begun")
    }

    fn free_for_another(&self) -> anyhow::Result<&Arc<Machine>> {
        let over = self.migration.as_ref().is_none_or(Migration::is_over);
        ensure!(over, "another migration is under way");
        Ok(&self.machine)
    }

    fn report(&self, cells: u64) -> anyhow::Result<Report> {
        let machine = &self.machine;
        let region = machine.options().addr..machine.options().addr + machine.options().region_size;
        let map = match cells {
            0 => Vec::new(),
            cells => {
                let plugged = machine.with_driver(|driver| driver.plugged_ranges())?;
                map::draw(machine.ram(), &region, &plugged, cells)?
            }
        };
        let work = machine.vcpus().work();
        let answers = machine.with_driver(|driver| driver.answers());
        let fd = |gpa| machine.ram().region(gpa).map(|region| region.file.as_raw_fd());
        Ok(Report {
            plugged: machine.frontend().config().map_or(0, |config| config.plugged_size),
            resident: machine.ram().allocated_bytes(region.clone())?,
            map,
            verified: work.verified,
            written: work.written,
            running: machine.is_running(),
            healthy: machine.vcpus().is_healthy() && !machine.vcpus().is_halted(),
            state: None,
            served: answers.ack,
            busy: answers.busy,
            lost: machine.lost(),
            blocks_stay: machine.blocks_stay(),
            memory: Some([fd(0)?, fd(region.start)?]),
            listening: self.migration.as_ref().and_then(Migration::listening).map(str::to_owned),
            migration: self.migration.as_ref().map(Migration::report),
            error: None,
        })
    }
}
