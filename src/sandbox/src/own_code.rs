//! What this process is made of: its program, the loader, libraries.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What a new start of this program executes and loads: the program itself, and the folders of its libraries, which may
/// be replaced by newer ones while it runs.
///
/// # Errors
///
/// When `/proc` does not tell.
pub(crate) fn paths() -> io::Result<Vec<PathBuf>> {
    let program = fs::read_link("/proc/self/exe")?;
    let libraries = executable(&fs::read_to_string("/proc/self/maps")?);
    let mut paths: Vec<PathBuf> = libraries
        .into_iter()
        .filter(|path| *path != program)
        .filter_map(|path| path.parent().map(Path::to_owned))
        .collect();
    paths.sort_unstable();
    paths.dedup();
    // By what is executed, also where its name is another file's by now.
    paths.push("/proc/self/exe".into());
    Ok(paths)
}

/// The files of which code is mapped, in the format of `/proc/self/maps`.
fn executable(maps: &str) -> Vec<PathBuf> {
    let path = |line: &str| {
        let mut fields = line.splitn(6, ' ');
        let is_code = fields.nth(1).is_some_and(|permissions| permissions.contains('x'));
        let path = fields.nth(3)?.trim_start();
        (is_code && path.starts_with('/')).then(|| PathBuf::from(path))
    };
    maps.lines().filter_map(path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_told_from_other_mappings() {
        let maps = "\
55d0-55d1 r--p 00000000 08:02 17                         /usr/bin/a b
55d1-55d2 r-xp 00001000 08:02 17                         /usr/bin/a b
7f00-7f01 r-xp 00000000 08:02 18                         /usr/lib/libc.so.6
7f02-7f03 rw-s 00000000 00:01 19                         /memfd:guest (deleted)
7ffc-7ffd r-xp 00000000 00:00 0                          [vdso]
7ffe-7fff rwxp 00000000 00:00 0
";
        let paths = ["/usr/bin/a b", "/usr/lib/libc.so.6"].map(PathBuf::from);
        assert_eq!(executable(maps), paths);
    }

    #[test]
    fn this_program_is_its_file_and_folders_of_libraries() {
        let paths = paths().unwrap();
        assert_eq!(paths.last(), Some(&PathBuf::from("/proc/self/exe")));
        assert!(paths[..paths.len() - 1].iter().all(|path| path.is_dir()), "{paths:?}");
    }
}
