//! The short version in the README: between two markers, made by the command and by nobody else.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::{Report, charts, markdown};
use crate::tables;

const BEGIN: &str = "<!-- savings-report:begin -->";
const END: &str = "<!-- savings-report:end -->";

/// Where the chart is, seen from the workspace.
const CHART: &str = "benches/report/savings.svg";

/// Puts the small table and its chart into the README of the workspace at `root`.
///
/// # Errors
///
/// When there are no markers, or a file cannot be written.
pub fn update(report: &Report, root: &Path) -> Result<()> {
    let view = report.view();
    let chart = charts::small(&view)?;
    fs::write(root.join(CHART), &chart.svg).with_context(|| format!("cannot write {CHART}"))?;
    let table = tables::small(&view);
    let text =
        format!("\n{}:\n\n{}\n![{}]({CHART})\n", table.title, markdown::table(&table), chart.title);
    let path = root.join("README.md");
    let readme = fs::read_to_string(&path).context("cannot read the README")?;
    let readme = replaced(&readme, &text).context("the README has no markers for the report")?;
    fs::write(&path, readme).context("cannot write the README")
}

/// The text with what is between the markers replaced.
fn replaced(text: &str, between: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{between}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_markers_changes() {
        let text = format!("a\n{BEGIN}\nold\n{END}\nb\n");
        let new = replaced(&text, "new").unwrap();
        assert_eq!(new, format!("a\n{BEGIN}\nnew\n{END}\nb\n"));
        assert_eq!(replaced(&new, "new").unwrap(), new);
        assert_eq!(replaced("none", "new"), None);
    }
}
