//! What the pager may do: which system calls, and which files, sockets and processes it may reach.
//!
//! It confines itself before it opens anything that the command line names. A call that is needed and not listed
//! ends it with a line that names it; `CONTRIBUTING.md` says how to find such calls before that.

use sandbox::{
    EXECUTES_ITSELF, GUEST_MEMORY, Options, Policy, Reach, SandboxError, UNIX_SOCKETS, WHOLE_FILES,
};

use crate::cli::args::{Command, Common, RestoreArgs, Vmm};
use crate::error::PagerError;
use crate::firecracker::is_supervisor;
use crate::socket::{self, Address};

/// What only the pager does of it.
const PROCESS: &[&str] = &[
    // Guest memory, of VMMs and of its own.
    "ioctl:pagemap",
    "mincore",
    // Images and working sets.
    "chmod",
    "fadvise64",
    "fchmodat",
    "fchownat",
    "lchown",
    "sync_file_range",
];

/// Images, guest memory, channels to VMMs.
const ALWAYS: [&[&str]; 4] = [UNIX_SOCKETS, GUEST_MEMORY, WHOLE_FILES, PROCESS];

/// Page faults of Firecracker, which sends the descriptor that they come by.
const FAULTS: &[&str] = &["ioctl:userfaultfd"];

/// With a TCP socket. Names of hosts were looked up before.
const TCP: &[&str] = &["socket:inet"];

/// Where a VMM is ended whose guest cannot have its memory, or runs elsewhere: Firecracker, a handover.
const ENDS_VMM: &[&str] = &["pidfd_open", "pidfd_send_signal"];

/// With --supervise: a worker is started, which executes this program, and confines itself once more, without these lists.
const SUPERVISE: &[&str] = &[
    "clone",
    "dup2",
    "dup3",
    "kill",
    "landlock_add_rule",
    "landlock_create_ruleset",
    "landlock_restrict_self",
    // Of the worker, which has another number.
    "tgkill",
    "vfork",
    "wait4",
    "waitid",
];

/// Confines this process to what a command needs. Returns what is to be told. `group` is one that sockets are given
/// later: without capabilities, only to a member of it they can be.
///
/// # Errors
///
/// When the kernel cannot, or a name of a host is not known.
pub fn confine(command: &Command, group: Option<u32>) -> Result<Vec<String>, PagerError> {
    let failed = |error| match error {
        SandboxError::User { .. } => PagerError::Usage(error.to_string()),
        error => PagerError::Sandbox(error),
    };
    for address in addresses(command) {
        socket::resolve_ahead(address)?;
    }
    let sandbox = sandbox::begin(command.sandbox(), &policy(command), false).map_err(failed)?;
    if let Some(group) = group.filter(|_| rustix::process::geteuid().is_root()) {
        let group = rustix::process::Gid::from_raw(group);
        let mut groups = rustix::process::getgroups().unwrap_or_default();
        groups.push(group);
        // Where it cannot be one, that is told with the socket.
        let _ = rustix::thread::set_thread_groups(&groups);
    }
    sandbox.enter(&reach(command)?).map_err(failed)
}

/// Where VMMs are met.
fn addresses(command: &Command) -> Vec<&Address> {
    match command {
        Command::Save(save) => vec![&save.common.socket],
        Command::Restore(restore) => vec![&restore.common.socket],
        Command::Handover(handover) => vec![&handover.socket, &handover.to],
    }
}

/// The command, if it is a restore of Firecracker.
fn firecracker(command: &Command) -> Option<&RestoreArgs> {
    match command {
        Command::Restore(args) if args.common.vmm == Vmm::Firecracker => Some(args),
        _ => None,
    }
}

fn ends_vmm(command: &Command) -> bool {
    firecracker(command).is_some() || matches!(command, Command::Handover(_))
}

/// Which system calls are made.
fn policy(command: &Command) -> Policy {
    let mut process = ALWAYS.to_vec();
    if addresses(command).iter().any(|address| matches!(address, Address::Tcp(_))) {
        process.push(TCP);
    }
    if ends_vmm(command) {
        process.push(ENDS_VMM);
    }
    if firecracker(command).is_some() {
        process.push(FAULTS);
    }
    if firecracker(command).is_some_and(is_supervisor) {
        process.extend([EXECUTES_ITSELF, SUPERVISE]);
    }
    Policy { program: "vmem-pager", process, threads: &[] }
}

/// What is reached.
fn reach(command: &Command) -> Result<Reach, PagerError> {
    let mut reach = Reach::new().service_manager().runtime();
    let listens = |reach: Reach, address: &Address| -> Result<Reach, PagerError> {
        Ok(match address {
            Address::Unix(path) => reach.listen(path),
            Address::Tcp(_) => socket::ports(address)?.into_iter().fold(reach, Reach::listen_tcp),
        })
    };
    let connects = |reach: Reach, address: &Address| -> Result<Reach, PagerError> {
        Ok(socket::ports(address)?.into_iter().fold(reach, Reach::connect_tcp))
    };
    let metrics = |reach: Reach, common: &Common| match &common.metrics_socket {
        Some(path) => reach.listen(path),
        None => reach,
    };
    match command {
        Command::Save(args) => {
            reach = metrics(listens(reach, &args.common.socket)?, &args.common);
            reach = reach.replace(&args.common.image);
        }
        Command::Restore(args) => {
            reach = metrics(reach, &args.common).read(&args.common.image);
            reach = args.memory_file.iter().fold(reach, |reach, path| reach.read(path));
            reach = args.replay.iter().fold(reach, |reach, path| reach.read(path));
            reach = args.record.iter().fold(reach, |reach, path| reach.replace(path));
            reach = if firecracker(command).is_some() {
                listens(reach, &args.common.socket)?
            } else {
                connects(reach, &args.common.socket)?
            };
            if is_supervisor(args) {
                let failed = PagerError::system("find out what this program is made of");
                reach = reach.execute_itself().map_err(failed)?;
            }
        }
        Command::Handover(args) => {
            reach = connects(listens(reach, &args.socket)?, &args.to)?;
        }
    }
    Ok(if ends_vmm(command) { reach.signal() } else { reach })
}

/// What is added to an error of a confined process that is about permissions.
pub fn hint(options: &Options, error: &PagerError) -> Option<&'static str> {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    let is_permission = std::iter::from_fn(|| {
        let this = source?;
        source = this.source();
        Some(this)
    })
    .filter_map(|error| error.downcast_ref::<std::io::Error>())
    .any(|error| error.kind() == std::io::ErrorKind::PermissionDenied);
    let confined = options.sandbox == sandbox::Mode::On && rustix::process::geteuid().is_root();
    (confined && is_permission).then_some(
        "--sandbox on: root passes over no permissions here; with --user and the VMM's user it is that user",
    )
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::args::Args;

    #[test]
    fn each_call_of_the_lists_exists() {
        let mut lists = ALWAYS.to_vec();
        lists.extend([TCP, FAULTS, ENDS_VMM, EXECUTES_ITSELF, SUPERVISE]);
        assert_eq!(sandbox::unknown(&lists), Vec::<&str>::new());
    }

    #[test]
    fn only_what_needs_it_may_start_processes_or_use_the_network() {
        let has = |words: &str, call: &str| {
            let args = Args::try_parse_from(format!("vmem-pager {words}").split(' ')).unwrap();
            policy(&args.command).process.concat().contains(&call)
        };
        let save = "save --vmm qemu --socket s --image i";
        let firecracker = "restore --vmm firecracker --socket s --image i --memory-file m";
        let supervise = format!("{firecracker} --supervise");
        let worker = format!("{supervise} --worker");
        assert!(!has(save, "execve") && !has(save, "socket:inet") && !has(save, "pidfd_open"));
        assert!(has("save --vmm qemu --socket tcp:127.0.0.1:1 --image i", "socket:inet"));
        assert!(!has(save, "ioctl:userfaultfd") && has(firecracker, "ioctl:userfaultfd"));
        assert!(!has(firecracker, "execve") && has(firecracker, "pidfd_send_signal"));
        assert!(has("handover --socket s --to t", "pidfd_send_signal"));
        assert!(has(&supervise, "execve") && !has(&worker, "execve"));
    }
}
