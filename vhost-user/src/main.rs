//! The daemon: parse, run, exit.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use tracing_subscriber::EnvFilter;
use vhost_user_mem::args::{Args, ArgsError, Config};

/// Exit status of a wrong option.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    // By the conventions for back-end programs, this option has the others ignored.
    if std::env::args_os().any(|arg| arg == "--print-capabilities") {
        println!("{}", vhost_user_mem::CAPABILITIES);
        return ExitCode::SUCCESS;
    }
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error)
            if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) =>
        {
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            let text = error.to_string();
            let lines = text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:"));
            let words: Vec<&str> = lines.filter(|line| !line.is_empty()).collect();
            let text = words.join(" ");
            let text = text.split(" For more information").next().unwrap_or_default();
            eprintln!("vhost-user-mem: {}", text.trim_start_matches("error: "));
            return ExitCode::from(USAGE);
        }
    };
    let config = match Config::try_from(args) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("vhost-user-mem: {error}");
            return ExitCode::from(USAGE);
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| EnvFilter::new(vhost_user_mem::DEFAULT_LOG_FILTER)),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match vhost_user_mem::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost-user-mem: {error:#}");
            if error.is::<ArgsError>() { ExitCode::from(USAGE) } else { ExitCode::FAILURE }
        }
    }
}
