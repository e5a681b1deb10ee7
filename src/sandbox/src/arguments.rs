//! Calls that are listed with a part of what they can do: `name:part`.

use seccompiler::{
    BackendError, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition, SeccompRule,
};

/// Arguments in alternatives: any of the rules, each with all of its conditions.
type Alternatives = Vec<Vec<(u8, Len, Op, u64)>>;

/// PR_SET_VMA, by which libraries name their memory.
const PR_SET_VMA: u64 = 0x5356_4d41;
/// PR_GET_AUXV, by which libraries find out about the machine.
const PR_GET_AUXV: u64 = 0x4155_5856;
/// The letter of userfaultfd's ioctls, of both the descriptor and the device, where a request has it.
const UFFD: u64 = 0xaa << 8;
const LETTER: u64 = 0xff << 8;
/// PAGEMAP_SCAN.
const PAGEMAP_SCAN: u64 = 0xc060_6610;
/// TCGETS2, with which newer glibc asks whether something is a terminal.
const TCGETS2: u64 = 0x802c_542a;

fn one_of(argument: u8, values: &[u64]) -> Alternatives {
    values.iter().map(|value| vec![(argument, Len::Dword, Op::Eq, *value)]).collect()
}

fn without(argument: u8, bits: i32) -> Alternatives {
    vec![vec![(argument, Len::Dword, Op::MaskedEq(bits.cast_unsigned().into()), 0)]]
}

/// What is allowed of a call, of a process with the number `pid`; `None` for a part that is not known.
#[allow(
    clippy::unnecessary_cast,
    reason = "requests of ioctl have another type in other libraries"
)]
fn alternatives(call: &str, part: &str, pid: u32) -> Option<Alternatives> {
    let number = |value: i32| u64::from(value.cast_unsigned());
    Some(match (call, part) {
        // No code is made, and none is loaded.
        ("mmap" | "mprotect", "data") => without(2, libc::PROT_EXEC),
        // A thread of this process, not another process.
        ("clone", "thread") => {
            let flags = number(libc::CLONE_VM | libc::CLONE_THREAD);
            vec![vec![(0, Len::Qword, Op::MaskedEq(flags), flags)]]
        }
        ("prctl", "thread") => {
            let options = [
                libc::PR_SET_NAME,
                libc::PR_GET_NAME,
                libc::PR_SET_NO_NEW_PRIVS,
                libc::PR_GET_NO_NEW_PRIVS,
                libc::PR_CAPBSET_READ,
                libc::PR_CAPBSET_DROP,
                libc::PR_CAP_AMBIENT,
            ];
            let options = options.into_iter().map(number).chain([PR_SET_VMA, PR_GET_AUXV]);
            let options: Vec<u64> = options.collect();
            one_of(0, &options)
        }
        ("tgkill" | "kill", "process") => one_of(0, &[pid.into()]),
        // What raise and abort of musl are made of; threads of other processes are Landlock's to refuse.
        ("tkill", "musl") if cfg!(target_env = "musl") => {
            vec![vec![(1, Len::Dword, Op::Le, number(libc::SIGRTMAX()))]]
        }
        ("tkill", "musl") => Vec::new(),
        ("prlimit64", "look") => {
            vec![vec![(0, Len::Dword, Op::Eq, 0), (2, Len::Qword, Op::Eq, 0)]]
        }
        ("socket" | "socketpair", "unix") => one_of(0, &[number(libc::AF_UNIX)]),
        ("socket", "inet") => one_of(0, &[number(libc::AF_INET), number(libc::AF_INET6)]),
        // By which a resolver finds out which addresses this host has.
        ("socket", "netlink") => one_of(0, &[number(libc::AF_NETLINK)]),
        ("ioctl", "descriptor") => one_of(
            1,
            &[
                libc::FIOCLEX as u64,
                libc::FIONBIO as u64,
                libc::FIONREAD as u64,
                // What the other side of a socket has not read.
                libc::TIOCOUTQ as u64,
                libc::TCGETS as u64,
                libc::TIOCGWINSZ as u64,
                TCGETS2,
            ],
        ),
        ("ioctl", "userfaultfd") => vec![vec![(1, Len::Dword, Op::MaskedEq(LETTER), UFFD)]],
        ("ioctl", "pagemap") => one_of(1, &[PAGEMAP_SCAN]),
        _ => return None,
    })
}

/// The call of an entry of a list, and the rules of what is allowed of it; `None` for all of it.
///
/// # Errors
///
/// The entry has a part that is not known.
pub(crate) fn rules(entry: &str, pid: u32) -> Result<(&str, Option<Vec<SeccompRule>>), String> {
    let Some((call, part)) = entry.split_once(':') else { return Ok((entry, None)) };
    let alternatives = alternatives(call, part, pid);
    let alternatives =
        alternatives.ok_or_else(|| format!("{entry} has a part that is not known"))?;
    let rule = |conditions: Vec<_>| -> Result<SeccompRule, BackendError> {
        let made = conditions.into_iter().map(|(argument, len, operator, value)| {
            SeccompCondition::new(argument, len, operator, value)
        });
        SeccompRule::new(made.collect::<Result<_, _>>()?)
    };
    let rules: Result<_, _> = alternatives.into_iter().map(rule).collect();
    Ok((call, Some(rules.map_err(|error| format!("{entry}: {error}"))?)))
}
