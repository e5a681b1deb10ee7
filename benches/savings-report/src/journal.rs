//! What is finished, a line each, so that a report that was interrupted can go on.

use std::fs::{self, File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::case::Case;
use crate::host::Machine;
use crate::qemu::Comparison;
use crate::record::Record;
use crate::sweep::Profile;

/// The name of the journal in the report's folder.
pub const NAME: &str = "records.jsonl";

/// The first line: what all records have in common. Records of another head are not comparable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// What is covered.
    pub profile: Profile,
    /// The version of the project.
    pub version: String,
    /// Tells programs of one version apart: the engine in them may differ.
    pub program: u64,
    /// Where it runs.
    pub machine: Machine,
}

impl Head {
    /// Of this program on this machine.
    ///
    /// # Errors
    ///
    /// When the program cannot be read.
    pub fn new(profile: Profile, machine: Machine) -> Result<Self> {
        let mut hasher = DefaultHasher::new();
        fs::read("/proc/self/exe").context("cannot read this program")?.hash(&mut hasher);
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(Self { profile, version, program: hasher.finish(), machine })
    }

    /// Why records of `other` do not go with records of this.
    fn check(&self, other: &Self) -> Result<()> {
        let Self { profile, version, program, machine } = other;
        ensure!(*profile == self.profile, "it is of the {profile:?} profile");
        ensure!(*version == self.version, "it is of version {version}");
        ensure!(*program == self.program, "it is of another build of this program");
        ensure!(*machine == self.machine, "it is of another machine or kernel");
        Ok(())
    }
}

/// Every other line.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Line {
    Record(Record),
    Qemu(Comparison),
}

/// An open journal.
pub struct Journal {
    path: PathBuf,
    file: File,
    found: Vec<Line>,
}

impl Journal {
    /// Starts a journal in `dir`. One that is there is replaced.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn create(dir: &Path, head: &Head) -> Result<Self> {
        let path = dir.join(NAME);
        let file = File::create(&path).with_context(|| format!("cannot write {NAME}"))?;
        let mut journal = Self { path, file, found: Vec::new() };
        journal.line(head)?;
        Ok(journal)
    }

    /// Goes on with the journal in `dir`, or starts one if there is none.
    ///
    /// # Errors
    ///
    /// When it is of another head, is damaged anywhere but at its end, or cannot be written.
    pub fn resume(dir: &Path, head: &Head) -> Result<Self> {
        let path = dir.join(NAME);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Self::create(dir, head),
            Err(error) => return Err(error).with_context(|| format!("cannot read {NAME}")),
        };
        // What comes after the last line's end was being written when the program was.
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        if whole == 0 {
            return Self::create(dir, head);
        }
        let mut lines = bytes[..whole - 1].split(|&byte| byte == b'\n');
        let damaged = |number: usize| format!("line {number} of {} is damaged", path.display());
        let first: Head =
            serde_json::from_slice(lines.next().unwrap_or_default()).with_context(|| damaged(1))?;
        head.check(&first).with_context(|| {
            format!("cannot go on with {}; without --resume it is replaced", path.display())
        })?;
        let read = |(index, line)| serde_json::from_slice(line).with_context(|| damaged(index + 2));
        let found = lines.enumerate().map(read).collect::<Result<Vec<Line>>>()?;
        let file = OpenOptions::new().append(true).open(&path)?;
        file.set_len(whole as u64)?;
        Ok(Self { path, file, found })
    }

    /// What came of `case` before this program was started.
    pub fn found(&self, case: &Case) -> Option<&Record> {
        self.records().find(|record| record.case == *case)
    }

    /// The comparison with QEMU that was made before this program was started.
    pub fn found_qemu(&self) -> Option<&Comparison> {
        self.found.iter().find_map(|line| match line {
            Line::Qemu(comparison) => Some(comparison),
            Line::Record(_) => None,
        })
    }

    /// How many cases it had when it was opened.
    pub fn len_found(&self) -> usize {
        self.records().count()
    }

    fn records(&self) -> impl Iterator<Item = &Record> {
        self.found.iter().filter_map(|line| match line {
            Line::Record(record) => Some(record),
            Line::Qemu(_) => None,
        })
    }

    /// Adds what came of a case.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn add(&mut self, record: &Record) -> Result<()> {
        self.line(&Line::Record(record.clone()))
    }

    /// Adds the comparison with QEMU.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn add_qemu(&mut self, comparison: &Comparison) -> Result<()> {
        self.line(&Line::Qemu(comparison.clone()))
    }

    fn line(&mut self, value: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        // One write: a program that is killed leaves whole lines and, at worst, a part of the last.
        if let Err(error) = self.file.write_all(&line) {
            bail!("cannot write {}: {error}", self.path.display());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Figures, Outcome};

    fn head() -> Head {
        Head::new(Profile::Quick, Machine::here().unwrap()).unwrap()
    }

    fn record(percent: u64) -> Record {
        let case = Case { touched_percent: percent, ..Profile::Quick.centre() };
        let figures = Figures { wire: 7, total: 0.1, agrees: Some(true), ..Figures::default() };
        Record { case, outcome: Outcome::Measured(Box::new(figures)) }
    }

    /// A journal with two records; its text.
    fn written(dir: &Path) -> String {
        let mut journal = Journal::create(dir, &head()).unwrap();
        journal.add(&record(1)).unwrap();
        journal.add(&record(2)).unwrap();
        fs::read_to_string(dir.join(NAME)).unwrap()
    }

    #[test]
    fn what_was_measured_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        written(dir.path());
        let journal = Journal::resume(dir.path(), &head()).unwrap();
        assert_eq!(journal.len_found(), 2);
        let figures = journal.found(&record(2).case).and_then(Record::figures).unwrap();
        assert_eq!((figures.wire, figures.total, figures.agrees), (7, 0.1, Some(true)));
        assert!(journal.found(&record(3).case).is_none());
        assert!(journal.found_qemu().is_none());
    }

    #[test]
    fn a_line_from_before_there_was_compression_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let text = written(dir.path());
        let old = text.replace(",\"zstd\":false", "").replace(",\"content\":\"noise\"", "");
        assert!(old.len() < text.len() && !old.contains("zstd") && !old.contains("content"));
        fs::write(dir.path().join(NAME), old).unwrap();
        let journal = Journal::resume(dir.path(), &head()).unwrap();
        assert!(journal.found(&record(2).case).is_some());
    }

    #[test]
    fn the_comparison_is_found_among_the_records() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path(), &head()).unwrap();
        journal.add(&record(1)).unwrap();
        journal.add_qemu(&Comparison::Failed("why".to_owned())).unwrap();
        journal.add(&record(2)).unwrap();
        let journal = Journal::resume(dir.path(), &head()).unwrap();
        assert_eq!(journal.len_found(), 2);
        assert!(
            matches!(journal.found_qemu(), Some(Comparison::Failed(reason)) if reason == "why")
        );
    }

    #[test]
    fn half_a_line_at_the_end_is_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let text = written(dir.path());
        let path = dir.path().join(NAME);
        fs::write(&path, &text[..text.len() - 20]).unwrap();
        let mut journal = Journal::resume(dir.path(), &head()).unwrap();
        assert_eq!(journal.len_found(), 1);
        journal.add(&record(2)).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }

    #[test]
    fn a_journal_of_another_head_is_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        written(dir.path());
        let refused =
            |head: Head| format!("{:#}", Journal::resume(dir.path(), &head).err().unwrap());
        assert!(refused(Head { profile: Profile::Full, ..head() }).contains("Quick profile"));
        assert!(refused(Head { version: "9".to_owned(), ..head() }).contains("of version"));
        assert!(refused(Head { program: 1, ..head() }).contains("another build"));
        let machine = Machine { cpus: 0, ..head().machine };
        assert!(refused(Head { machine, ..head() }).contains("another machine"));
    }

    #[test]
    fn a_damaged_line_is_not_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let text = written(dir.path()).replace("\"wire\":7", "\"wire\":");
        fs::write(dir.path().join(NAME), text).unwrap();
        let error = Journal::resume(dir.path(), &head()).err().unwrap();
        assert!(error.to_string().contains("line 2"), "{error}");
    }

    #[test]
    fn without_a_journal_there_is_nothing_to_resume() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Journal::resume(dir.path(), &head()).unwrap().len_found(), 0);
        written(dir.path());
        Journal::create(dir.path(), &head()).unwrap();
        assert_eq!(Journal::resume(dir.path(), &head()).unwrap().len_found(), 0);
    }
}
