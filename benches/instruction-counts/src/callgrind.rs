//! Running a path under callgrind.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::counted::TOGGLE;

/// Copies and fills by vectors: a string instruction, of which libc decides from which size on it
/// is used, counts once for each byte.
const TUNABLES: &str = "glibc.cpu.hwcaps=-ERMS";

/// What one run of a path came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Instructions of the counted part.
    pub instructions: u64,
    /// Units of work done in it.
    pub units: u64,
}

/// Whether there is a valgrind to run.
///
/// # Errors
///
/// When there is none; says what to install.
pub fn check() -> Result<()> {
    let version = Command::new("valgrind").arg("--version").stdout(Stdio::null()).status();
    match version {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => bail!("valgrind --version failed: {status}"),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!(
                "valgrind counts the instructions and is not there: install it (on Debian, `apt-get install valgrind`)"
            )
        }
        Err(error) => Err(error).context("cannot run valgrind"),
    }
}

/// Runs this program again under callgrind, for one path; the profile goes to `out`.
pub fn run(path: &str, out: &Path) -> Result<Counted> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--quiet", "--collect-atstart=no"]);
    command.args(TOGGLE.map(|pattern| format!("--toggle-collect={pattern}")));
    command.arg(format!("--callgrind-out-file={}", out.display()));
    command.arg(program).arg("--run").arg(path).stdin(Stdio::null());
    command.env("GLIBC_TUNABLES", TUNABLES);
    let output = command.output().context("cannot run valgrind")?;
    ensure!(
        output.status.success(),
        "under valgrind it ended with {}:\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    let units = String::from_utf8_lossy(&output.stdout);
    let units = units.trim().parse().with_context(|| format!("{units:?} is no number of units"))?;
    let profile =
        fs::read_to_string(out).with_context(|| format!("cannot read {}", out.display()))?;
    let instructions = total(&profile)?;
    ensure!(units != 0, "it did nothing");
    Ok(Counted { instructions, units })
}

/// The instructions of a profile.
fn total(profile: &str) -> Result<u64> {
    let value = |key| profile.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
    let events = value("events:").context("the profile does not say what it counts")?;
    ensure!(events == "Ir", "the profile counts {events:?}, not only instructions");
    let total =
        value("totals:").context("the profile has no total: it was not written to its end")?;
    let total = total.parse().with_context(|| format!("{total:?} is no number of instructions"))?;
    ensure!(total != 0, "nothing was counted: callgrind did not find the function to count");
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROFILE: &str = "# callgrind format\n\
        version: 1\n\
        creator: callgrind-3.19.0\n\
        cmd: instruction-counts --run zero-scan/zeros\n\
        part: 1\n\n\
        desc: Trigger: Program termination\n\n\
        positions: line\n\
        events: Ir\n\
        summary: 1234567\n\n\
        ob=(1) instruction-counts\n\
        fl=(1) ???\n\
        fn=(1) counted\n\
        0 1234567\n\n\
        totals: 1234567\n";

    fn refusal(profile: &str) -> String {
        format!("{:#}", total(profile).unwrap_err())
    }

    #[test]
    fn the_total_is_read() {
        assert_eq!(total(PROFILE).unwrap(), 1_234_567);
    }

    #[test]
    fn a_count_of_nothing_is_an_error() {
        let profile = PROFILE.replace("1234567", "0");
        assert!(refusal(&profile).contains("did not find the function"));
    }

    #[test]
    fn a_profile_that_is_cut_off_is_an_error() {
        let profile = PROFILE.split("totals:").next().unwrap();
        assert!(refusal(profile).contains("not written to its end"));
        assert!(refusal("").contains("what it counts"));
    }

    #[test]
    fn a_profile_of_other_events_is_an_error() {
        let profile = PROFILE.replace("events: Ir", "events: Ir Dr Dw");
        assert!(refusal(&profile).contains("Ir Dr Dw"));
        let profile = PROFILE.replace("totals: 1234567", "totals: 12 34");
        assert!(refusal(&profile).contains("12 34"));
    }
}
