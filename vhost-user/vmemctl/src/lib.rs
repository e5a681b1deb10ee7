//! `vmemctl`, the client of the management API.
//!
//! ```text
//!   a person ───> command line ──> client ────── HTTP on --api-socket ──> vhost-user-mem
//!                     │                                    ^
//!   a browser ──────> ├──> ui: what its guard lets pass ───┘
//!                     │
//!                     └──> inspect: a migration stream or an image in a file, without a daemon
//! ```
//!
//! - [`Args`]: the command line; [`execute`] carries it out.
//! - [`Client`] speaks to the daemon; [`Failure`] is whatever ends a command early.
//! - [`man_pages`] makes manual pages of any clap command.
//!
//! ```
//! use clap::Parser;
//! use vmemctl::{Args, Command};
//!
//! let words = "vmemctl --api-socket api.sock resize 2G --wait --timeout 30s";
//! let args = Args::try_parse_from(words.split(' '))?;
//! assert!(matches!(args.command, Command::Resize { size: 0x8000_0000, wait: true, .. }));
//! # Ok::<(), clap::Error>(())
//! ```

mod args;
mod client;
mod clock;
mod console;
mod doctor;
mod failure;
mod inspect;
mod man;
mod map;
mod progress;
mod range_stream;
mod region_json;
mod resize;
mod sse;
mod status;
#[cfg(test)]
mod tests;
mod ui;

pub use args::{Args, Command};
pub use client::{Client, Events, Take};
pub use console::Console;
pub use failure::{Failure, Obstacle};
pub use man::{ManPage, man_pages};
pub use range_stream::{Item, List};

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use management_api::DeviceInfo;
use program::size::format_size;
use serde_json::json;
use vmstate::printable;

use map::Map;
use region_json::RegionJson;

/// What is written of a long output at a time, bytes.
const WRITTEN_AT_ONCE: usize = 64 << 10;

/// Exit status of wrong usage.
const USAGE: u8 = 2;

/// The program.
pub fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    let (mut out, mut err) = (io::stdout(), io::stderr());
    let mut console = Console::of_process(&mut out, &mut err);
    ExitCode::from(run(&words, &mut console))
}

/// Parses the words of a command line, the program's name first, and carries it out; the exit
/// status.
pub fn run(words: &[OsString], console: &mut Console<'_>) -> u8 {
    let parsed = Args::try_parse_from(words).and_then(|args| {
        if args.api_socket.is_none() && args.command.needs_daemon() {
            let message = "the option --api-socket <PATH> is required\n";
            return Err(Args::command().error(ErrorKind::MissingRequiredArgument, message));
        }
        Ok(args)
    });
    let args = match parsed {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => {
            let shown = console.print(&error.to_string());
            return shown.map_or_else(|failure| failure.exit_status(), |()| 0);
        }
        Err(error) => {
            if words.iter().any(|word| word == "--json") {
                let text = error.to_string();
                let line = text.lines().next().unwrap_or_default();
                let message = line.trim_start_matches("error: ");
                console.complain(&json!({ "error": message }).to_string());
            } else {
                console.complain(error.to_string().trim_end());
            }
            return USAGE;
        }
    };
    console.json = args.json;
    match execute(args, console) {
        Ok(()) => 0,
        Err(failure) => {
            failure.report(console);
            failure.exit_status()
        }
    }
}

/// Carries out a command.
///
/// # Errors
///
/// See [`Failure`].
pub fn execute(args: Args, console: &mut Console<'_>) -> Result<(), Failure> {
    match args.command {
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "vmemctl", &mut script);
            return console.print(&String::from_utf8_lossy(&script));
        }
        Command::Inspect { file, memory_file } => {
            return inspect::run(&file, &memory_file, console);
        }
        Command::Man { dir } => return write_man_pages(dir, console),
        Command::Doctor { .. } if args.api_socket.is_none() => {
            return examine(args.command, None, console);
        }
        _ => {}
    }
    let client = Client::new(args.api_socket.unwrap_or_default());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Failure::Runtime)?;
    runtime.block_on(speak(args.command, &client, console))
}

async fn speak(
    command: Command,
    client: &Client,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    match command {
        Command::Status => {
            let device = client.device().await?;
            console.show(&device, || status::table(&device))
        }
        Command::Resize { size, wait, timeout, step, max_rate } => {
            let device = if wait {
                let plan = resize::Plan { target: size, timeout, step, max_rate };
                resize::run(client, plan, console).await?
            } else {
                client.resize(size).await?
            };
            console.show(&device, || status::sizes(&device))
        }
        Command::Blocks => {
            if console.json {
                return blocks_as_json(client, console).await;
            }
            let device = client.device().await?;
            let mut map = Map::new(&device, console.width);
            let mut take = |item| {
                map.take(item);
                Ok(())
            };
            client.blocks(&mut take).await?;
            client.resident(&mut take).await?;
            console.print(&map.draw())
        }
        Command::SystemReset => {
            let device = client.system_reset().await?;
            console.show(&device, || status::sizes(&device))
        }
        Command::Sweep => {
            let swept = client.sweep().await?;
            console.show(&swept, || format!("discarded {}\n", format_size(swept.swept_size)))
        }
        Command::LogLevel { level } => {
            let set = client.set_log_level(level).await?;
            console.show(&set, || format!("log level {}\n", printable(&set.level)))
        }
        Command::Watch => watch(client, console).await,
        Command::Ui { listen } => ui::run(client, listen, console).await,
        Command::Doctor { .. } => {
            let device = client.device().await?;
            examine(command, Some(&device), console)
        }
        Command::Inspect { .. } | Command::Completions { .. } | Command::Man { .. } => Ok(()),
    }
}

fn examine(
    command: Command,
    daemon: Option<&DeviceInfo>,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    let Command::Doctor {
        addr,
        region_size,
        block_size,
        guest_phys_bits,
        guest_memory_block,
        memory_file,
        root,
    } = command
    else {
        return Ok(());
    };
    let region = addr.zip(region_size);
    let region = region.map(|(addr, size)| doctor::Region { addr, size, block_size });
    let plan = doctor::Plan { region, guest_phys_bits, guest_memory_block, memory_file };
    doctor::run(plan, daemon, root.as_deref(), console)
}

/// Writes the lists as they come: a region may have more of them than fit into memory.
async fn blocks_as_json(client: &Client, console: &mut Console<'_>) -> Result<(), Failure> {
    let (mut json, mut text) = (RegionJson::new(), String::new());
    let mut take = |item| {
        json.write(item, &mut text);
        if text.len() < WRITTEN_AT_ONCE {
            return Ok(());
        }
        let written = console.print(&text);
        text.clear();
        written
    };
    client.blocks(&mut take).await?;
    client.resident(&mut take).await?;
    json.end(&mut text);
    console.print(&text)
}

async fn watch(client: &Client, console: &mut Console<'_>) -> Result<(), Failure> {
    let mut events = client.events().await?;
    loop {
        let Some(event) = events.next().await? else {
            return Err(Failure::Protocol("the daemon ended the stream of events".to_owned()));
        };
        let time = clock::now();
        let line = if console.json {
            let mut line = json!({ "time": time, "event": event.name() });
            if let (Some(line), Some(data)) = (line.as_object_mut(), event.data().as_object()) {
                line.extend(data.clone());
            }
            format!("{line}\n")
        } else {
            format!("{time}  {}\n", status::event(&event))
        };
        console.print(&line)?;
    }
}

fn write_man_pages(dir: Option<PathBuf>, console: &mut Console<'_>) -> Result<(), Failure> {
    let pages = man_pages(Args::command()).map_err(Failure::Runtime)?;
    let Some(dir) = dir else {
        let roff: String = pages.into_iter().map(|page| page.roff).collect();
        return console.print(&roff);
    };
    let failed = |path: PathBuf| move |source| Failure::File { path, source };
    fs::create_dir_all(&dir).map_err(failed(dir.clone()))?;
    for page in pages {
        let path = dir.join(page.file_name);
        fs::write(&path, page.roff).map_err(failed(path))?;
    }
    Ok(())
}
