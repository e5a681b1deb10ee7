//! What is told of a call that was refused.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;

use libc::{c_int, c_void, siginfo_t};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::stdio::stderr;

use crate::calls;

/// The program, for the line.
static PROGRAM: OnceLock<&'static str> = OnceLock::new();

/// The kernel's siginfo of SIGSYS, which libc does not show: what stands before the address of the call, and the
/// call's number after it.
#[repr(C)]
struct Refused {
    signo: c_int,
    errno: c_int,
    code: c_int,
    _align: c_int,
    call_addr: *mut c_void,
    syscall: c_int,
    arch: u32,
}

/// Has a refused call named on stderr before it ends the process.
///
/// # Errors
///
/// When the kernel refuses.
pub(crate) fn name_refused(program: &'static str) -> io::Result<()> {
    let _ = PROGRAM.set(program);
    // SAFETY: a structure of numbers, a set and pointers, for which zeros are valid.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = on_refused as *const () as usize;
    // Handled once: the second, raised by the handler, ends the process.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_RESETHAND;
    // SAFETY: the action is initialised, with a handler of the signature that SA_SIGINFO asks for, which makes only
    // calls that are async-signal-safe. The signal is unblocked for the case that a parent blocked it: a set
    // that sigemptyset has made is a valid one.
    let done = unsafe {
        let mut set: libc::sigset_t = MaybeUninit::zeroed().assume_init();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGSYS);
        libc::sigprocmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut());
        libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut())
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A text of bounded length, without an allocation: the signal may have come within the allocator.
struct Line {
    bytes: [u8; 512],
    len: usize,
}

impl Line {
    fn put(&mut self, text: &[u8]) {
        let text = &text[..text.len().min(self.bytes.len() - self.len)];
        self.bytes[self.len..self.len + text.len()].copy_from_slice(text);
        self.len += text.len();
    }

    fn put_number(&mut self, mut number: u32) {
        let mut digits = [0; 10];
        let mut at = digits.len();
        loop {
            at -= 1;
            digits[at] = b'0' + u8::try_from(number % 10).unwrap_or(0);
            number /= 10;
            if number == 0 {
                break;
            }
        }
        self.put(&digits[at..]);
    }
}

/// Makes only system calls that each list of calls has.
extern "C" fn on_refused(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid structure, which is larger than the part of it that is read
    // here; any bytes are valid numbers.
    let (code, number) = unsafe {
        let refused = info.cast::<Refused>();
        ((*refused).code, (*refused).syscall.cast_unsigned())
    };
    let mut line = Line { bytes: [0; 512], len: 0 };
    line.put(PROGRAM.get().unwrap_or(&"sandbox").as_bytes());
    // SYS_SECCOMP; otherwise another process has sent the signal.
    if code == 1 {
        let mut name = [0u8; 16];
        // SAFETY: PR_GET_NAME writes at most 16 bytes, with a zero at the end.
        unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
        line.put(b": the sandbox refused the system call ");
        line.put(calls::name(number as usize).as_bytes());
        line.put(b" (");
        line.put_number(number);
        line.put(b") of the thread ");
        line.put(&name[..end]);
        line.put(
            b", which is not in its list: a fault of this program, or an attack; --sandbox log finds more of them, \
              --sandbox off goes on without\n",
        );
    } else {
        line.put(b": ended by SIGSYS of another process\n");
    }
    write_at_once(&line.bytes[..line.len]);
    // SAFETY: raise is async-signal-safe; the signal has its default action by now, and is not blocked.
    unsafe { libc::raise(libc::SIGSYS) };
}

/// Writes to stderr if that takes it at once.
fn write_at_once(text: &[u8]) {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let stderr = stderr();
    if matches!(poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(&now)), Ok(1..)) {
        let _ = rustix::io::write(stderr, text);
    }
}

/// Writes to stderr what cannot be told in another way, if that takes it at once.
pub(crate) fn say(text: &str) {
    write_at_once(text.as_bytes());
}

/// Whether the kernel has filters of system calls, with this action.
pub(crate) fn has_action(action: u32) -> bool {
    const GET_ACTION_AVAIL: libc::c_uint = 2;
    // SAFETY: the call reads one number from the pointer, which is one of a live variable.
    let done = unsafe { libc::syscall(libc::SYS_seccomp, GET_ACTION_AVAIL, 0, &raw const action) };
    done == 0
}

/// Whether the kernel logs calls that a filter says are to be logged.
pub(crate) fn logs_actions() -> bool {
    std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_logged")
        .is_ok_and(|actions| actions.split_whitespace().any(|action| action == "log"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use crate::{Mode, Options, Policy, Reach, begin};

    const TRY: &str = "SANDBOX_TRY";

    #[test]
    fn a_process_that_traces_another_is_ended_by_name() {
        if std::env::var_os(TRY).is_some() {
            let policy = Policy { program: "tracer", process: Vec::new(), threads: &[] };
            begin(&Options::default(), &policy, false).unwrap().enter(&Reach::new()).unwrap();
            // SAFETY: reads nothing and writes nothing: a process may ask to be traced by its parent.
            unsafe { libc::ptrace(libc::PTRACE_TRACEME) };
            return;
        }
        let test = "sys::refusal::tests::a_process_that_traces_another_is_ended_by_name";
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(TRY, "1")
            .output()
            .unwrap();
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("tracer: the sandbox refused the system call ptrace ("), "{said}");
    }

    #[test]
    fn a_process_without_a_sandbox_does_as_before() {
        let options = Options { sandbox: Mode::Off, ..Options::default() };
        let policy = Policy { program: "free", process: Vec::new(), threads: &[] };
        let notes = begin(&options, &policy, false).unwrap().enter(&Reach::new()).unwrap();
        assert_eq!(notes, Vec::<String>::new());
        crate::confine_thread("any");
        assert!(std::fs::read("/proc/self/status").is_ok());
    }
}
