//! Confines a process to what it needs.
//!
//! - [`Options`]: the command line, the same for each program.
//! - [`Policy`]: which system calls the process and each of its threads may make. The tables are the programs';
//!   [`UNIX_SOCKETS`] and others are what several of them need.
//! - [`Reach`]: which files and ports it may reach, and whom it may signal.
//!
//! There are two steps. [`begin`] comes first, while there is one thread: it becomes the user that is asked
//! for, gives up gaining privileges, and looks for what the kernel has. [`Sandbox::enter`] comes when all that
//! the program opens by name is open: it drops the capabilities, and confines the calling thread and all that
//! it starts from then on. Threads that were started in between confine themselves with
//! [`confine_thread`], by a list of their own; later ones may do so, too, to have less than the process has.
//!
//! A system call that is not listed ends the process by SIGSYS, after a line on stderr that names the call and
//! the thread. What is listed has no other effect than without the sandbox.
//!
//! ```text
//!   start ──> begin ──> open sockets, files, devices ──> enter ──> serve
//!               │                 │                        │
//!               │                 └─ threads that start    └─ capabilities gone, files by Landlock,
//!               │                    here confine               system calls by seccomp
//!               └─ another user,     themselves
//!                  no new privileges
//! ```
//!
//! ```no_run
//! use sandbox::{Options, Policy, Reach};
//!
//! let policy = Policy { program: "summer", process: vec![&["openat", "unlink"]], threads: &[] };
//! let sandbox = sandbox::begin(&Options::default(), &policy, false)?;
//! // Here the program opens its sockets.
//! for note in sandbox.enter(&Reach::new().read("/etc/summer".as_ref()))? {
//!     eprintln!("{note}");
//! }
//! // From here on it reads below /etc/summer, and nothing else by name.
//! # Ok::<(), sandbox::SandboxError>(())
//! ```

mod arguments;
mod calls;
mod lists;
mod options;
mod own_code;
mod privileges;
mod reach;
mod runtime;
mod sys;

use std::collections::HashMap;
use std::sync::OnceLock;

use seccompiler::BpfProgram;
use thiserror::Error;

pub use calls::unknown;
pub use lists::{EXECUTES_ITSELF, GUEST_MEMORY, UNIX_SOCKETS, WHOLE_FILES};
pub use options::{Mode, Options, Part};
pub use reach::Reach;
pub use runtime::RUNTIME;

use calls::{Filter, Opens};

/// Which system calls a program may make.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The program's name, for the line that names a refused call.
    pub program: &'static str,
    /// The lists of the process, which hold for each thread without one of its own.
    pub process: Vec<&'static [&'static str]>,
    /// Threads with less.
    pub threads: &'static [Thread],
}

/// A thread that may do less than the process.
#[derive(Clone, Copy, Debug)]
pub struct Thread {
    /// What it calls itself in [`confine_thread`].
    pub name: &'static str,
    /// Its calls, beside those of the [`RUNTIME`].
    pub calls: &'static [&'static str],
    /// Whether it opens files by name, within the [`Reach`].
    pub opens_files: bool,
}

/// Why a process cannot be confined.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// The kernel has not got a part of it.
    #[error(
        "--sandbox {mode}: this kernel has no {}; use one that has, or add --sandbox-optional {part} to \
         start without", part.describe()
    )]
    Missing {
        /// What was asked for.
        mode: Mode,
        /// What is missing.
        part: Part,
    },
    /// The user is not to be had.
    #[error("--user {user}: {reason}")]
    User {
        /// As it was given.
        user: String,
        /// Why not.
        reason: String,
    },
    /// A step failed.
    #[error("--sandbox: cannot {what}: {reason}")]
    Failed {
        /// The step.
        what: &'static str,
        /// Why.
        reason: String,
    },
}

impl SandboxError {
    fn failed<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::Failed { what, reason: error.to_string() }
    }
}

/// What threads confine themselves with; not set without a sandbox.
static THREADS: OnceLock<Threads> = OnceLock::new();

struct Threads {
    filters: HashMap<&'static str, Vec<BpfProgram>>,
    drops_capabilities: bool,
}

/// A process that is about to confine itself.
#[derive(Debug)]
pub struct Sandbox {
    mode: Mode,
    process: Vec<BpfProgram>,
    landlock: bool,
    notes: Vec<String>,
}

/// Becomes the user that is asked for, and prepares for [`Sandbox::enter`]. To be called once, before there is a second
/// thread.
///
/// `continues` says that the process was confined before it replaced itself: what the kernel holds then is not
/// laid upon it once more.
///
/// # Errors
///
/// When the user is not to be had, or the kernel lacks a part that is not optional.
pub fn begin(options: &Options, policy: &Policy, continues: bool) -> Result<Sandbox, SandboxError> {
    if let Some(user) = options.user.as_ref().filter(|_| !continues) {
        privileges::become_user(user)?;
    }
    let mode = options.sandbox;
    let mut sandbox = Sandbox { mode, process: Vec::new(), landlock: false, notes: Vec::new() };
    if mode == Mode::Off {
        return Ok(sandbox);
    }
    privileges::give_up_gains()?;
    let filter = match mode {
        Mode::Log => Filter::Log,
        Mode::On | Mode::Off => Filter::Refuse,
    };
    let has_seccomp = sys::has_action(filter.action());
    if has_seccomp {
        let mut filters = HashMap::new();
        for thread in policy.threads {
            let lists = [RUNTIME, thread.calls];
            let opens = if thread.opens_files { Opens::Files } else { Opens::Nothing };
            let compiled = calls::compile(&lists, filter, opens)?;
            filters.insert(thread.name, compiled);
        }
        let _ = THREADS.set(Threads { filters, drops_capabilities: mode == Mode::On });
        if !continues {
            let lists = [RUNTIME].into_iter();
            let lists: Vec<_> = lists.chain(policy.process.iter().copied()).collect();
            sandbox.process = calls::compile(&lists, filter, Opens::Files)?;
        }
    } else {
        sandbox.lack(options, Part::Seccomp)?;
    }
    match mode {
        Mode::Log => sandbox.notes.push(format!(
            "--sandbox log: system calls that are not listed are made, and logged by the kernel: look for type=1326 in \
             dmesg, or ausearch -m SECCOMP{}; files and capabilities are not restricted",
            if sys::logs_actions() { "" } else { ", once kernel.seccomp.actions_logged has log in it" }
        )),
        Mode::On | Mode::Off => {
            if has_seccomp {
                sys::name_refused(policy.program)
                    .map_err(SandboxError::failed("handle SIGSYS"))?;
            }
            if !continues {
                if reach::is_supported() {
                    sandbox.landlock = true;
                } else {
                    sandbox.lack(options, Part::Landlock)?;
                }
            }
        }
    }
    Ok(sandbox)
}

impl Sandbox {
    fn lack(&mut self, options: &Options, part: Part) -> Result<(), SandboxError> {
        if !options.sandbox_optional.contains(&part) {
            return Err(SandboxError::Missing { mode: self.mode, part });
        }
        self.notes.push(format!(
            "--sandbox-optional {part}: running without it, since this kernel has no {}",
            part.describe()
        ));
        Ok(())
    }

    /// Confines the calling thread and all that it starts. Returns what is to be told to the operator.
    ///
    /// # Errors
    ///
    /// When a path is not there, or the kernel refuses. The process may be confined in part then, and is
    /// to end.
    pub fn enter(mut self, reach: &Reach) -> Result<Vec<String>, SandboxError> {
        if self.mode == Mode::On {
            privileges::drop_capabilities().map_err(SandboxError::failed("drop capabilities"))?;
            self.notes.extend(reach.out_of_permissions());
        }
        if self.landlock {
            reach.restrict()?;
        }
        apply(&self.process).map_err(SandboxError::failed("install the filter of system calls"))?;
        Ok(self.notes)
    }
}

/// Confines the calling thread to the list of this name in the [`Policy`]. Nothing happens without a
/// sandbox, or without such a list.
///
/// A thread that cannot be confined ends the process: it would go on with more than it may have.
pub fn confine_thread(name: &str) {
    let Some(threads) = THREADS.get() else { return };
    let confine = || -> Result<(), String> {
        if threads.drops_capabilities {
            privileges::drop_capabilities().map_err(|error| error.to_string())?;
        }
        let filters = threads.filters.get(name).map(Vec::as_slice).unwrap_or_default();
        apply(filters).map_err(|error| error.to_string())
    };
    if let Err(reason) = confine() {
        sys::say(&format!("cannot confine the thread {name}: {reason}; ending\n"));
        std::process::exit(1);
    }
}

fn apply(filters: &[BpfProgram]) -> Result<(), seccompiler::Error> {
    filters.iter().try_for_each(|filter| seccompiler::apply_filter(filter))
}
