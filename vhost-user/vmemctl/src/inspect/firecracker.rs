//! What the files of a Firecracker snapshot hold: its state file, its memory file, and the diffs above that.

use std::fmt::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use program::size::format_size;
use serde_json::{Value, json};
use vmem_pager::firecracker::memory_files::MemoryFiles;
use vmem_pager::firecracker::state_file::StateFile;

use super::text::safe;
use super::{Console, Failure};

/// Ranges that are shown to people.
const RANGES_SHOWN: usize = 64;
/// What is not known of any snapshot.
const UNKNOWN: &str =
    "unknown: only Firecracker reads its state file; memory that is not plugged is a hole";

/// Prints what is in a snapshot.
pub(super) fn run(
    state: &Path,
    memory: &[PathBuf],
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    let state_file = StateFile::read(state)?;
    let files = MemoryFiles::open(memory)?;
    let mut warnings: Vec<String> = state_file.warning(state).into_iter().collect();
    warnings.extend(files.warnings());
    console.show(&json(state, state_file, &files, &warnings), || {
        text(state, state_file, &files, &warnings)
    })
}

/// Where there is data in any layer, as maximal ranges.
fn resident(files: &MemoryFiles) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for data in files.data(0..files.len()) {
        match ranges.last_mut() {
            Some(last) if last.end == data.start => last.end = data.end,
            _ => ranges.push(data),
        }
    }
    ranges
}

fn json(path: &Path, state: StateFile, files: &MemoryFiles, warnings: &[String]) -> Value {
    let layers: Vec<Value> = files
        .layers()
        .map(|layer| {
            json!({
                "file": layer.path.to_string_lossy(),
                "data_size": layer.data,
                "used_size": layer.used,
            })
        })
        .collect();
    let resident: Vec<Value> = resident(files)
        .iter()
        .map(|range| json!({ "offset": range.start, "size": range.end - range.start }))
        .collect();
    json!({
        "file": path.to_string_lossy(),
        "layout": "firecracker",
        "size": state.len,
        "checksum_matches": state.is_whole,
        "memory_size": files.len(),
        "resident_size": files.data_bytes(),
        "layers": layers,
        "resident": resident,
        "plugged": Value::Null,
        "warnings": warnings,
        "error": Value::Null,
    })
}

fn text(path: &Path, state: StateFile, files: &MemoryFiles, warnings: &[String]) -> String {
    let size = |bytes: u64| format!("{} ({bytes} bytes)", format_size(bytes));
    let mut text = String::new();
    let checksum = if state.is_whole { "matches" } else { "does not match" };
    for (name, value) in [
        ("file", safe(&path.display().to_string())),
        ("size", size(state.len)),
        ("layout", "firecracker".to_owned()),
        ("checksum", checksum.to_owned()),
        ("memory", size(files.len())),
        ("resident", size(files.data_bytes())),
        ("plugged", UNKNOWN.to_owned()),
    ] {
        let _ = writeln!(text, "{name:<13}{value}");
    }
    let _ = writeln!(text, "\n{:>12}  {:>12}  memory file, the base first", "data", "of it used");
    for layer in files.layers() {
        let path = safe(&layer.path.display().to_string());
        let (data, used) = (format_size(layer.data), format_size(layer.used));
        let _ = writeln!(text, "{data:>12}  {used:>12}  {path}");
    }
    let resident = resident(files);
    let _ = writeln!(text, "\nResident");
    for range in resident.iter().take(RANGES_SHOWN) {
        let _ = writeln!(text, "  {:#014x}  {}", range.start, size(range.end - range.start));
    }
    if let more @ 1.. = resident.len().saturating_sub(RANGES_SHOWN) {
        let _ = writeln!(text, "  and {more} more ranges, which --json lists");
    }
    text.push_str(if warnings.is_empty() { "\nNo warnings\n" } else { "\nWarnings\n" });
    for warning in warnings {
        let _ = writeln!(text, "  {}", safe(warning));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::super::super::run;

    const PAGE: u64 = 4096;
    /// With its CRC-64 at the end.
    const STATE: &[u8] = b"123456789\xca\xd9\xb8\xc4\x14\xd9\xc6\xe9";

    fn memory(dir: &Path, name: &str, len: u64, data: &[u64]) -> PathBuf {
        let file = File::create(dir.join(name)).unwrap();
        file.set_len(len * PAGE).unwrap();
        for page in data {
            file.write_all_at(&[1; PAGE as usize], page * PAGE).unwrap();
        }
        dir.join(name)
    }

    fn vmemctl(words: &[&str], state: &Path, memory: &[PathBuf]) -> (u8, String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut line: Vec<OsString> = vec!["vmemctl".into(), "inspect".into()];
        line.extend(words.iter().map(OsString::from));
        line.push(state.into());
        for file in memory {
            line.extend(["--memory-file".into(), file.into()]);
        }
        let status = run(&line, &mut Console::plain(&mut out, &mut err));
        (status, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    fn snapshot(dir: &Path) -> (PathBuf, Vec<PathBuf>) {
        std::fs::write(dir.join("state"), STATE).unwrap();
        let base = memory(dir, "base", 64, &[0, 1, 2, 40]);
        let diff = memory(dir, "diff\x1b", 64, &[2, 3, 41]);
        (dir.join("state"), vec![base, diff])
    }

    #[test]
    fn a_snapshot_with_a_diff_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let (state, files) = snapshot(dir.path());
        let (status, out, err) = vmemctl(&["--json"], &state, &files);
        assert_eq!((status, err.as_str()), (0, ""));
        let json: Value = serde_json::from_str(&out).unwrap();
        assert_eq!((&json["size"], &json["checksum_matches"]), (&json!(17), &json!(true)));
        assert_eq!(json["memory_size"], 64 * PAGE);
        assert_eq!(json["resident_size"], 6 * PAGE);
        let ranges = [(0, 4), (40, 2)]
            .map(|(page, len)| json!({ "offset": page * PAGE, "size": len * PAGE }));
        assert_eq!(json["resident"], json!(ranges));
        // A page of the base is covered.
        assert_eq!(json["layers"][0]["data_size"], 4 * PAGE);
        assert_eq!(json["layers"][0]["used_size"], 3 * PAGE);
        assert_eq!(json["layers"][1]["used_size"], 3 * PAGE);
        assert_eq!(json["warnings"], json!([]));

        let (status, out, _) = vmemctl(&[], &state, &files);
        assert_eq!(status, 0);
        for line in [
            "memory       256 KiB (262144 bytes)\n",
            "resident     24 KiB (24576 bytes)\n",
            "checksum     matches\n",
            "      16 KiB        12 KiB  ",
            "  0x000000028000  8 KiB (8192 bytes)\n",
            "\nNo warnings\n",
        ] {
            assert!(out.contains(line), "{line}\n{out}");
        }
        assert!(!out.contains('\x1b'));
    }

    #[test]
    fn what_is_odd_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let (state, mut files) = snapshot(dir.path());
        std::fs::write(&state, &STATE[..16]).unwrap();
        let all: Vec<u64> = (0..64).collect();
        files.push(memory(dir.path(), "copy", 64, &all));
        let (status, out, _) = vmemctl(&[], &state, &files);
        assert_eq!(status, 0);
        assert!(out.contains("checksum     does not match\n"), "{out}");
        assert!(out.contains("state: not a whole state file"), "{out}");
        assert!(out.contains("copy: the diff has no holes"), "{out}");
    }

    #[test]
    fn bad_files_are_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let (state, files) = snapshot(dir.path());
        let short = memory(dir.path(), "short", 8, &[1]);
        let odd = dir.path().join("odd");
        std::fs::write(&odd, b"odd").unwrap();
        for (state, files, what) in [
            (&odd, vec![files[0].clone()], "not a state file of Firecracker"),
            (&state, vec![files[0].clone(), short], "has the length of its base"),
            (&state, vec![odd.clone()], "a multiple of 4096"),
            (&state, vec![dir.path().to_owned()], "not a regular file"),
            (&state, vec![dir.path().join("none")], "No such file"),
        ] {
            let (status, out, err) = vmemctl(&[], state, &files);
            assert_eq!((status, out.as_str()), (1, ""), "{what}");
            assert!(err.contains(what), "{what}: {err}");
        }
        // Without its memory it is taken for a stream, and what is missing is said.
        let (status, _, err) = vmemctl(&[], &state, &[]);
        assert_eq!(status, 1);
        assert!(err.contains("--memory-file"), "{err}");
    }
}
