//! The command: words in, an exit status out.

pub mod args;
pub mod report;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use program::access::{find_group, group_number};
use program::listener::{self, Access};
use program::signals::Signals;

use crate::confinement;
use crate::error::PagerError;
use crate::metrics::MetricsServer;
use crate::run::Run;
use args::{Args, Command, Common, ServiceArgs, Vmm};
use report::Report;

/// Exit status of a wrong use.
const USAGE: u8 = 2;

/// Runs the command of this process.
pub fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    // Before there is a second thread, which would not know what is blocked.
    let signals = Signals::watch();
    let args = match Args::try_parse_from(&words) {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => return print(&error.to_string()),
        Err(error) => {
            let json = words.iter().any(|word| word == "--json");
            let report = Report::of_process(json, None);
            report.fail(&one_line(&error.to_string()));
            report.flush();
            return ExitCode::from(USAGE);
        }
    };
    let report = Report::of_process(args.command.json(), args.command.service().log_format);
    let code = run(&args.command, signals, &report);
    report.flush();
    code
}

fn run(command: &Command, signals: io::Result<Signals>, report: &Report) -> ExitCode {
    let done = signals.map_err(PagerError::system("watch signals")).and_then(|signals| {
        let access = access(command)?;
        listener::allow(access);
        for note in confinement::confine(command, access.group)? {
            report.warn(&note);
        }
        let run = Run::new(command.timeout());
        run.watch(signals)?;
        execute(command, &run, report)
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if let Some(hint) = confinement::hint(command.sandbox(), &error) {
                report.warn(hint);
            }
            report.fail(&error.to_string());
            ExitCode::from(error.exit_status())
        }
    }
}

/// Who may connect to the sockets of a command.
fn access(command: &Command) -> Result<Access, PagerError> {
    let ServiceArgs { socket_mode, socket_group, .. } = command.service();
    let group = socket_group.as_ref().map(|text| {
        // Where groups are listed is out of reach of a second process, which is given a number.
        let found = if command.is_worker() {
            group_number(text).ok_or_else(String::new)
        } else {
            find_group(text)
        };
        found.map_err(|rule| PagerError::Usage(format!("--socket-group {text}: {rule}")))
    });
    Ok(Access { mode: *socket_mode, group: group.transpose()? })
}

/// Carries out a command.
///
/// # Errors
///
/// See [`PagerError`].
pub fn execute(
    command: &Command,
    run: &std::sync::Arc<Run>,
    report: &Report,
) -> Result<(), PagerError> {
    match command {
        Command::Save(options) => {
            let metrics = crate::qemu::save::SaveMetrics::new();
            let _server = serve_metrics(&options.common, report, || metrics.registry())?;
            match options.common.vmm {
                Vmm::Qemu => crate::qemu::save::run(options, run, report, &metrics),
                Vmm::CloudHypervisor => {
                    crate::cloud_hypervisor::save::run(options, run, report, &metrics)
                }
                Vmm::Firecracker => Err(PagerError::Usage(
                    "save --vmm firecracker: Firecracker writes its snapshots itself, by PUT /snapshot/create"
                        .to_owned(),
                )),
            }
        }
        Command::Restore(options) if options.common.vmm == Vmm::Firecracker => {
            let metrics = crate::firecracker::RestoreMetrics::new();
            // Of two processes, the one that serves the guest has the figures.
            let served = !crate::firecracker::is_supervisor(options);
            let server =
                served.then(|| serve_metrics(&options.common, report, || metrics.registry()));
            let _server = server.transpose()?;
            crate::firecracker::run(options, run, report, &metrics)
        }
        Command::Restore(options) if options.common.vmm == Vmm::CloudHypervisor => {
            let metrics = crate::cloud_hypervisor::metrics::RestoreMetrics::new();
            let _server = serve_metrics(&options.common, report, || metrics.registry())?;
            crate::cloud_hypervisor::restore::run(options, run, report, &metrics)
        }
        Command::Restore(options) => {
            let metrics = crate::qemu::restore::RestoreMetrics::new();
            let _server = serve_metrics(&options.common, report, || metrics.registry())?;
            crate::qemu::restore::run(options, run, report, &metrics)
        }
        Command::Handover(options) => crate::cloud_hypervisor::handover::run(options, run, report),
    }
}

fn serve_metrics(
    common: &Common,
    report: &Report,
    registry: impl FnOnce() -> crate::metrics::SharedRegistry,
) -> Result<Option<MetricsServer>, PagerError> {
    let socket = common.metrics_socket.as_deref();
    socket.map(|path| MetricsServer::start(path, registry(), report)).transpose()
}

/// The sentence of an error of clap's, without its hints on usage.
fn one_line(text: &str) -> String {
    let lines = text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:"));
    let words: Vec<&str> = lines.filter(|line| !line.is_empty()).collect();
    let text = words.join(" ");
    let text = text.split(" For more information").next().unwrap_or_default();
    text.trim_start_matches("error: ").to_owned()
}

/// Writes to stdout what was asked for.
fn print(text: &str) -> ExitCode {
    let mut stdout = io::stdout();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
