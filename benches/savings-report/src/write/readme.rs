//! The short version in the README: between two markers, written by the command alone.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::{Report, charts, markdown};
use crate::qemu::{self, Paged};
use crate::tables::{self, Table};

/// What is measured by every report.
const SAVINGS: &str = "savings-report";
/// What is measured by those that compare with QEMU.
const QEMU: &str = "savings-report-qemu";
/// The pager beside what QEMU does itself.
const PAGER: &str = "savings-report-pager";

/// Where the chart is, seen from the workspace.
const CHART: &str = "benches/savings-report/savings.svg";

/// Puts the small tables and the chart into the README of the workspace at `root`. What was not
/// compared with QEMU leaves the older comparison where it is.
///
/// # Errors
///
/// When there are no markers, or a file cannot be written.
pub fn update(report: &Report, root: &Path) -> Result<()> {
    let view = report.view();
    let chart = charts::small(&view)?;
    fs::write(root.join(CHART), &chart.svg).with_context(|| format!("cannot write {CHART}"))?;
    let path = root.join("README.md");
    let readme = fs::read_to_string(&path).context("cannot read the README")?;
    let (small, links) = (titled(&tables::small(&view)), titled(&tables::links(&view)));
    let compression = titled(&tables::compression(&view));
    let text = format!("{small}\n![{}]({CHART})\n\n{links}\n{compression}", chart.title);
    let mut readme = replaced(&readme, SAVINGS, &text)?;
    if let Some(measured) = report.qemu.measured() {
        readme = replaced(&readme, QEMU, &titled(&qemu::summary(measured)))?;
        readme = with_pager(&readme, &measured.paged)?;
    }
    fs::write(&path, readme).context("cannot write the README")
}

/// The same for what the pager does alone.
///
/// # Errors
///
/// When there are no markers, or the file cannot be written.
pub fn update_pager(paged: &Paged, root: &Path) -> Result<()> {
    let path = root.join("README.md");
    let readme = fs::read_to_string(&path).context("cannot read the README")?;
    fs::write(&path, with_pager(&readme, paged)?).context("cannot write the README")
}

fn with_pager(readme: &str, paged: &Paged) -> Result<String> {
    let tables: Vec<String> = qemu::pager_tables(paged).iter().map(titled).collect();
    replaced(readme, PAGER, &tables.join("\n"))
}

fn titled(table: &Table) -> String {
    format!("{}:\n\n{}", table.title, markdown::table(table))
}

/// The text with what is between the markers of this name replaced.
fn replaced(text: &str, name: &str, between: &str) -> Result<String> {
    let (begin, end) = (format!("<!-- {name}:begin -->"), format!("<!-- {name}:end -->"));
    let parts = text.split_once(&begin).and_then(|(before, rest)| {
        let (_, after) = rest.split_once(&end)?;
        Some((before, after))
    });
    let (before, after) =
        parts.with_context(|| format!("the README has no markers {begin} {end}"))?;
    Ok(format!("{before}{begin}\n\n{between}\n{end}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_markers_changes() {
        let text =
            "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n<!-- x-y:begin --><!-- x-y:end -->\n";
        let new = replaced(text, "x", "new\n").unwrap();
        assert_eq!(new, text.replace("old\n", "\nnew\n\n"));
        assert_eq!(replaced(&new, "x", "new\n").unwrap(), new);
        assert!(replaced("none", "x", "new").is_err());
    }
}
