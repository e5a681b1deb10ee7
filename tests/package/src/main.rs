//! `package-files DIR`: manual pages and completions of the daemon, its client and the pager, in a folder
//! for each package, as they are installed below `/`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Command, CommandFactory};
use clap_complete::{Shell, generate_to};
use vmemctl::man_pages;

/// Where each shell looks for completions.
const COMPLETIONS: [(Shell, &str); 3] = [
    (Shell::Bash, "usr/share/bash-completion/completions"),
    (Shell::Fish, "usr/share/fish/vendor_completions.d"),
    (Shell::Zsh, "usr/share/zsh/vendor-completions"),
];

const MANUAL: &str = "usr/share/man/man1";

fn main() -> Result<()> {
    let dir = std::env::args_os().nth(1).context("usage: package-files DIR")?;
    write(Path::new(&dir))
}

/// Writes all files.
fn write(dir: &Path) -> Result<()> {
    for (package, command) in [
        ("vhost-user-mem", vhost_user_mem::args::Args::command()),
        ("vhost-user-mem", vmemctl::Args::command()),
        ("vmem-pager", vmem_pager::cli::args::Args::command()),
    ] {
        write_of(&dir.join(package), command)?;
    }
    Ok(())
}

fn write_of(root: &Path, mut command: Command) -> Result<()> {
    let name = command.get_name().to_owned();
    let folder = |place: &str| -> Result<PathBuf> {
        let folder = root.join(place);
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(folder)
    };
    for (shell, place) in COMPLETIONS {
        let script = generate_to(shell, &mut command, &name, folder(place)?)?;
        if shell == Shell::Bash {
            // bash-completion loads a file by the name of the command alone.
            fs::rename(&script, script.with_file_name(&name))?;
        }
    }
    let manual = folder(MANUAL)?;
    for page in man_pages(command)? {
        let path = manual.join(page.file_name);
        fs::write(&path, page.roff).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_has_its_pages_and_completions() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path()).unwrap();
        for file in [
            "vhost-user-mem/usr/share/man/man1/vhost-user-mem.1",
            "vhost-user-mem/usr/share/man/man1/vmemctl.1",
            "vhost-user-mem/usr/share/man/man1/vmemctl-ui.1",
            "vhost-user-mem/usr/share/bash-completion/completions/vmemctl",
            "vhost-user-mem/usr/share/fish/vendor_completions.d/vhost-user-mem.fish",
            "vhost-user-mem/usr/share/zsh/vendor-completions/_vmemctl",
            "vmem-pager/usr/share/man/man1/vmem-pager-restore.1",
            "vmem-pager/usr/share/bash-completion/completions/vmem-pager",
        ] {
            assert!(dir.path().join(file).exists(), "{file}");
        }
        let pages = dir.path().join("vhost-user-mem/usr/share/man/man1");
        let page = fs::read_to_string(pages.join("vhost-user-mem.1")).unwrap();
        assert!(page.contains(".TH vhost-user-mem") && page.contains("region"), "{page}");
    }
}
