//! The options that each program has.

use std::fmt;

use clap::ValueEnum;

/// Whether a process confines itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// It does.
    #[default]
    On,
    /// It does not.
    Off,
    /// It has the kernel log which system calls it would have refused itself.
    Log,
}

/// A part of the sandbox that a kernel may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// The files that the process may open, and whom it may signal.
    Landlock,
    /// The system calls that the process may make.
    Seccomp,
}

impl Part {
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Landlock => {
                "Landlock, which keeps the process to its own files (Linux 5.13 with CONFIG_SECURITY_LANDLOCK, and \
                 landlock among the modules of lsm=)"
            }
            Self::Seccomp => {
                "seccomp filters, which keep the process to its own system calls (CONFIG_SECCOMP_FILTER)"
            }
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::On => "on",
            Self::Off => "off",
            Self::Log => "log",
        })
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Landlock => "landlock",
            Self::Seccomp => "seccomp",
        })
    }
}

/// How a process confines itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub struct Options {
    /// Confine this process to its own system calls and files, without privileges; log: only have the
    /// kernel log the system calls that would be refused
    #[arg(long, value_name = "WHETHER", value_enum, default_value_t, ignore_case = true)]
    pub sandbox: Mode,

    /// Start also where the kernel lacks this part of the sandbox
    #[arg(long, value_name = "PART", value_enum, value_delimiter = ',')]
    pub sandbox_optional: Vec<Part>,

    /// Become this user, a name or a number, with its groups, before anything is opened
    #[arg(long, value_name = "USER")]
    pub user: Option<String>,
}
