//! Lists of system calls, compiled to filters.

use std::collections::BTreeMap;
use std::str::FromStr;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use syscalls::Sysno;

use crate::{SandboxError, arguments};

/// What fails when a list is wrong.
const COMPILE: &str = "compile the list of system calls";

/// What happens to a call that is not listed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Filter {
    /// It is not made, and the process ends by SIGSYS.
    Refuse,
    /// It is made, and logged by the kernel.
    Log,
}

/// What a thread may open by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opens {
    /// Files that Landlock lets it open.
    Files,
    /// None; it is told EACCES.
    Nothing,
}

impl Filter {
    pub(crate) fn action(self) -> u32 {
        match self {
            Self::Refuse => libc::SECCOMP_RET_TRAP,
            Self::Log => libc::SECCOMP_RET_LOG,
        }
    }
}

/// Where calls have numbers.
struct Arch {
    target: TargetArch,
    number: fn(&str) -> Option<i64>,
}

impl Arch {
    fn own() -> Result<Self, SandboxError> {
        let target = TargetArch::try_from(std::env::consts::ARCH)
            .map_err(SandboxError::failed("filter system calls of this architecture"))?;
        Ok(Self { target, number: |name| Sysno::from_str(name).ok().map(|call| call.id().into()) })
    }
}

/// Entries that are no calls of this architecture: of another one, or misspelt.
pub fn unknown(lists: &[&'static [&'static str]]) -> Vec<&'static str> {
    let is_known = |entry: &str| {
        arguments::rules(entry, 0).is_ok_and(|(call, _)| Sysno::from_str(call).is_ok())
    };
    lists.iter().flat_map(|list| *list).copied().filter(|entry| !is_known(entry)).collect()
}

/// The name of a call of this architecture.
pub(crate) fn name(number: usize) -> &'static str {
    Sysno::new(number).map_or("of no known name", |call| call.name())
}

/// Compiles lists, to be installed in this order.
pub(crate) fn compile(
    lists: &[&[&str]],
    filter: Filter,
    opens: Opens,
) -> Result<Vec<BpfProgram>, SandboxError> {
    let pid = std::process::id();
    compile_for(&Arch::own()?, lists, filter, opens, pid)
}

fn compile_for(
    arch: &Arch,
    lists: &[&[&str]],
    filter: Filter,
    opens: Opens,
    pid: u32,
) -> Result<Vec<BpfProgram>, SandboxError> {
    let mut allowed = BTreeMap::new();
    for entry in lists.iter().flat_map(|list| *list) {
        let (call, rules) = arguments::rules(entry, pid).map_err(SandboxError::failed(COMPILE))?;
        let Some(number) = (arch.number)(call) else { continue };
        match rules {
            // All of it, whatever part of it is listed elsewhere.
            None => drop(allowed.insert(number, Vec::new())),
            // Of this architecture or library, none.
            Some(rules) if rules.is_empty() => {}
            Some(rules) => match allowed.get_mut(&number) {
                Some(earlier) if earlier.is_empty() => {}
                Some(earlier) => earlier.extend(rules),
                None => drop(allowed.insert(number, rules)),
            },
        }
    }
    let action = match filter {
        Filter::Refuse => SeccompAction::Trap,
        Filter::Log => SeccompAction::Log,
    };
    let program = |rules, otherwise, matching| -> Result<BpfProgram, SandboxError> {
        SeccompFilter::new(rules, otherwise, matching, arch.target)
            .and_then(BpfProgram::try_from)
            .map_err(SandboxError::failed(COMPILE))
    };
    let mut programs = Vec::new();
    // Of several filters the strictest counts: what is answered with an error is allowed by the list.
    if matches!(filter, Filter::Refuse) {
        let answered = |calls: &[&str], errno: i32| {
            let numbers = calls.iter().filter_map(|call| (arch.number)(call));
            let rules: BTreeMap<_, _> = numbers.map(|number| (number, Vec::new())).collect();
            program(rules, SeccompAction::Allow, SeccompAction::Errno(errno.cast_unsigned()))
        };
        programs.push(answered(&["clone3"], libc::ENOSYS)?);
        if opens == Opens::Nothing {
            programs.push(answered(&["open", "openat"], libc::EACCES)?);
        }
    }
    programs.push(program(allowed, action, SeccompAction::Allow)?);
    Ok(programs)
}

#[cfg(test)]
mod tests {
    use syscalls::aarch64::Sysno as Aarch64;
    use syscalls::x86_64::Sysno as X86_64;

    use super::*;
    use crate::RUNTIME;
    use crate::lists::{EXECUTES_ITSELF, GUEST_MEMORY, UNIX_SOCKETS, WHOLE_FILES};

    fn arches() -> [Arch; 2] {
        fn x86_64(name: &str) -> Option<i64> {
            X86_64::from_str(name).ok().map(|call| call.id().into())
        }
        fn aarch64(name: &str) -> Option<i64> {
            Aarch64::from_str(name).ok().map(|call| call.id().into())
        }
        [
            Arch { target: TargetArch::x86_64, number: x86_64 },
            Arch { target: TargetArch::aarch64, number: aarch64 },
        ]
    }

    #[test]
    fn the_calls_of_the_shared_lists_exist_and_compile_for_each_architecture() {
        let lists = [RUNTIME, UNIX_SOCKETS, GUEST_MEMORY, WHOLE_FILES, EXECUTES_ITSELF];
        for arch in arches() {
            for filter in [Filter::Refuse, Filter::Log] {
                let programs = compile_for(&arch, &lists, filter, Opens::Nothing, 1).unwrap();
                assert!(programs.iter().all(|program| program.len() < 4096), "{:?}", arch.target);
            }
        }
        let known = |entry: &&str| {
            let (call, _) = arguments::rules(entry, 1).unwrap();
            arches().iter().any(|arch| (arch.number)(call).is_some())
        };
        let misspelt: Vec<_> = lists.concat().into_iter().filter(|entry| !known(entry)).collect();
        assert_eq!(misspelt, Vec::<&str>::new());
    }

    #[test]
    fn what_is_not_a_call_or_part_of_one_is_found() {
        assert_eq!(unknown(&[&["read", "raed", "mmap:data", "mmap:code"]]), ["raed", "mmap:code"]);
        let error = compile(&[&["mmap:code"]], Filter::Refuse, Opens::Files).unwrap_err();
        assert!(error.to_string().contains("mmap:code"), "{error}");
    }
}
