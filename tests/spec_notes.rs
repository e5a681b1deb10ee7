//! The tables of `spec-notes/` name tests that exist.

use std::fs;
use std::path::{Path, PathBuf};

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
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
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
        .flat_map(|path| if path.is_dir() { notes(&path) } else { vec![path] })
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect()
}

#[test]
fn every_test_that_a_note_names_exists() {
    let files = notes(&Path::new(env!("CARGO_MANIFEST_DIR")).join("spec-notes"));
    assert!(!files.is_empty());
    let missing: Vec<String> = files.iter().flat_map(|path| missing(path)).collect();
    assert!(missing.is_empty(), "tests that do not exist:\n{}", missing.join("\n"));
}

#[test]
fn every_clause_has_a_row_with_a_test() {
    let note = Path::new(env!("CARGO_MANIFEST_DIR")).join("spec-notes/virtio-mem.md");
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
