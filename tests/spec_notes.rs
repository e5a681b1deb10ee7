//! The documents name tests, files and folders that exist.

use std::fs;
use std::path::{Path, PathBuf};

/// The top of the repository.
fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The `file::function` names in the last column of a note's table rows.
fn named_tests(note: &str) -> Vec<(String, String)> {
    let rows = note.lines().filter(|line| line.starts_with('|'));
    let words = rows.flat_map(|row| row.split([' ', '|', ',', '<', '>', ';']));
    words
        .filter_map(|word| word.trim_matches('`').split_once(".rs::"))
        .map(|(file, function)| (format!("{file}.rs"), function.to_owned()))
        .collect()
}

fn missing(note: &Path) -> Vec<String> {
    let root = root();
    let text = fs::read_to_string(note).unwrap();
    let exists = |file: &str, function: &str| {
        let code = fs::read_to_string(root.join(file)).unwrap_or_default();
        code.contains(&format!("fn {function}("))
    };
    let tests = named_tests(&text).into_iter();
    tests
        .filter(|(file, function)| !exists(file, function))
        .map(|(file, function)| format!("{}: {file}::{function}", note.display()))
        .collect()
}

/// The notes in a folder and in the folders inside it.
fn notes(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .filter(|path| !path.ends_with("target"))
        .flat_map(|path| if path.is_dir() { notes(&path) } else { vec![path] })
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect()
}

#[test]
fn every_test_that_a_note_names_exists() {
    let mut files = notes(&root().join("spec-notes"));
    files.push(root().join("SECURITY.md"));
    assert!(!files.is_empty());
    let missing: Vec<String> = files.iter().flat_map(|path| missing(path)).collect();
    assert!(missing.is_empty(), "tests that do not exist:\n{}", missing.join("\n"));
}

#[test]
fn every_clause_has_a_row_with_a_test() {
    let note = root().join("spec-notes/virtio-mem.md");
    let text = fs::read_to_string(note).unwrap();
    let clauses = (1..=52).map(|n| format!("D{n}")).chain((1..=14).map(|n| format!("F{n}")));
    let without: Vec<String> = clauses
        .filter(|clause| {
            let row = text.lines().find(|line| line.starts_with(&format!("| {clause} |")));
            // A clause that no test can show says why not.
            !row.is_some_and(|row| row.contains(".rs::") || row.contains("no test:"))
        })
        .collect();
    assert!(without.is_empty(), "clauses without a row or test: {without:?}");
}

/// The folders `sys` in a folder, and in the folders inside it.
fn sys_folders(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .filter(|path| path.is_dir() && !path.ends_with("target"))
        .flat_map(|path| if path.ends_with("sys") { vec![path] } else { sys_folders(&path) })
        .collect()
}

#[test]
fn every_folder_with_unsafe_code_is_named_in_the_architecture() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let row = text.lines().find(|line| line.starts_with("| all `unsafe` |")).unwrap();
    let tops = ["src", "vhost-user", "tests", "benches"].map(|top| root().join(top));
    let mut folders: Vec<_> = tops.iter().flat_map(|top| sys_folders(top)).collect();
    folders.retain(|path| path.parent().is_some_and(|parent| parent.ends_with("src")));
    assert!(!folders.is_empty());
    for folder in folders {
        let name = format!("`{}/`", folder.strip_prefix(root()).unwrap().display());
        assert!(row.contains(&name), "{name} is missing in the row of all `unsafe`");
    }
}

/// The paths of this repository that a document names: in backticks, from a top-level folder on.
fn named_paths(text: &str) -> Vec<&str> {
    let tops = [".ci/", "benches/", "spec-notes/", "src/", "tests/", "vhost-user/"];
    let quoted = text.split('`').skip(1).step_by(2);
    let words = quoted.flat_map(|quote| quote.split_whitespace());
    words
        .filter(|word| tops.iter().any(|top| word.starts_with(top)))
        // Several at once, and tests of a file, are not looked up.
        .filter(|word| !word.contains(['{', '*', '<']) && !word.contains("::"))
        .map(|word| word.trim_end_matches([',', '.', ';', ':', ')']))
        .collect()
}

/// What the links of a document lead to, without those to elsewhere.
fn linked(text: &str) -> Vec<&str> {
    let links = text.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
    let paths = links.map(|(link, _)| link.split('#').next().unwrap_or_default());
    paths.filter(|path| !path.is_empty() && !path.contains("://")).collect()
}

#[test]
fn every_path_that_a_document_names_exists() {
    let root = root();
    let mut files = vec![];
    for name in ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md", "SECURITY.md"] {
        files.push(root.join(name));
    }
    for folder in ["spec-notes", "vhost-user", "benches", "tests"] {
        files.extend(notes(&root.join(folder)));
    }
    let mut missing = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let beside = file.parent().unwrap();
        let is_named = |path: &&str| root.join(path).exists() || beside.join(path).exists();
        let named = named_paths(&text).into_iter().filter(|path| !is_named(path));
        let linked = linked(&text).into_iter().filter(|path| !beside.join(path).exists());
        let shown = file.strip_prefix(root).unwrap_or(&file).display();
        missing.extend(named.chain(linked).map(|path| format!("{shown}: {path}")));
    }
    assert!(missing.is_empty(), "paths that do not exist:\n{}", missing.join("\n"));
}
