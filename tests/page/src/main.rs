//! `page`: looks at the daemon's page in a real browser, and keeps pictures of it.

mod chromium;
mod device;
mod looks;
mod ui;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use small_vmm::process::find_program;

use chromium::Chromium;
use looks::Looks;

/// Looks at the daemon's page in a real browser.
#[derive(Parser)]
struct Args {
    /// The browser.
    #[arg(long, value_name = "PATH", default_value = "chromium")]
    chromium: String,
    /// Where pictures go.
    #[arg(long, value_name = "DIR", default_value = "target/page")]
    out: PathBuf,
    /// Only the parts with this in their names.
    #[arg(value_name = "PART")]
    only: Option<String>,
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("page: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    fs::create_dir_all(&args.out)
        .with_context(|| format!("cannot create {}", args.out.display()))?;
    let beside = std::env::current_exe()?;
    let programs = Programs {
        daemon: find_program(&beside, "vhost-user-mem").context("build vhost-user-mem first")?,
        vmemctl: find_program(&beside, "vmemctl").context("build vmemctl first")?,
    };
    let browser = Chromium::start(&args.chromium)?;
    let mut looks = Looks::new(browser, programs, args.out.clone());
    let parts: [(&str, Part); 4] = [
        ("a guest grows, uses its memory and shrinks", Looks::a_guest),
        ("strangers", Looks::strangers),
        ("the daemon goes and comes back", Looks::the_daemon_away),
        ("1 TiB in tatters", Looks::tatters),
    ];
    for (name, part) in parts {
        if args.only.as_ref().is_some_and(|only| !name.contains(only.as_str())) {
            continue;
        }
        part(&mut looks).with_context(|| name.to_owned())?;
        println!("ok  {name}");
    }
    println!("pictures: {}", args.out.display());
    Ok(())
}

/// A part of what is looked at.
type Part = fn(&mut Looks) -> Result<()>;

/// The programs that are looked at.
struct Programs {
    daemon: PathBuf,
    vmemctl: PathBuf,
}

/// A picture's file.
fn picture(out: &Path, name: &str) -> PathBuf {
    out.join(format!("{name}.png"))
}
