//! What is measured of a path, and the file with what it was before.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// What a path costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figure {
    /// Instructions for each unit of work.
    pub instructions: f64,
    /// What a unit is.
    pub per: String,
}

/// Figures by name of the path.
pub type Figures = BTreeMap<String, Figure>;

impl Figure {
    /// `instructions` in all, for `units`.
    pub fn new(instructions: u64, units: u64, per: &str) -> Self {
        // So many digits that the smallest figures differ by less than a percent.
        let instructions = (instructions as f64 / units as f64 * 100.0).round() / 100.0;
        Self { instructions, per: per.to_owned() }
    }
}

/// Where the baseline is kept.
pub fn baseline_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("baseline.json")
}

/// Reads figures.
pub fn read(path: &Path) -> Result<Figures> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is no baseline", path.display()))
}

/// Writes figures, sorted, one change a line.
pub fn write(path: &Path, figures: &Figures) -> Result<()> {
    let text = serde_json::to_string_pretty(figures)? + "\n";
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_baseline_reads_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("baseline.json");
        let figures = Figures::from([
            ("b".to_owned(), Figure::new(1000, 3, "page")),
            ("a".to_owned(), Figure::new(12, 1, "range")),
        ]);
        write(&path, &figures).unwrap();
        assert_eq!(read(&path).unwrap(), figures);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.find("\"a\"") < text.find("\"b\""), "{text}");
        assert!(text.contains("333.33") && text.ends_with("}\n"), "{text}");
    }
}
