//! The daemon: parse, run, exit.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use vhost_user_mem::args::{Args, ArgsError, Config};
use vhost_user_mem::log;

/// Exit status of a wrong option.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    // By the conventions for back-end programs, this option has the others ignored.
    if std::env::args_os().any(|arg| arg == "--print-capabilities") {
        return print(&format!("{}\n", vhost_user_mem::CAPABILITIES));
    }
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error)
            if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) =>
        {
            return print(&error.to_string());
        }
        Err(error) => {
            let text = error.to_string();
            let lines = text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:"));
            let words: Vec<&str> = lines.filter(|line| !line.is_empty()).collect();
            let text = words.join(" ");
            let text = text.split(" For more information").next().unwrap_or_default();
            complain(text.trim_start_matches("error: "));
            return ExitCode::from(USAGE);
        }
    };
    let config = match Config::try_from(args) {
        Ok(config) => config,
        Err(error) => {
            complain(&error.to_string());
            return ExitCode::from(USAGE);
        }
    };
    let done = vhost_user_mem::run(config);
    log::flush();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format!("{error:#}"));
            if error.is::<ArgsError>() { ExitCode::from(USAGE) } else { ExitCode::FAILURE }
        }
    }
}

/// Writes to stdout what was asked for.
fn print(text: &str) -> ExitCode {
    let mut stdout = std::io::stdout();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format!("cannot write to stdout: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn complain(text: &str) {
    log::say(&format!("vhost-user-mem: {text}"));
}
