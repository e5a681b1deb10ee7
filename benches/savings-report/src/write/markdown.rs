//! Markdown.

use std::fmt::Write as _;

use super::Chart;
use crate::tables::Table;

/// A table; sizes and counts to the right.
pub fn table(table: &Table) -> String {
    let mut text = String::new();
    let row = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    text.push_str(&row(&table.head));
    let rules: Vec<_> = table.head.iter().map(|_| "---".to_owned()).collect();
    text.push_str(&row(&rules));
    table.rows.iter().for_each(|cells| text.push_str(&row(cells)));
    text
}

/// The whole report.
pub fn page(notes: &[String], tables: &[Table], charts: &[Chart]) -> String {
    let mut text = "# What knowing of discarded memory saves\n".to_owned();
    for note in notes {
        let _ = write!(text, "\n{note}\n");
    }
    for chart in charts {
        let _ = write!(text, "\n![{}]({})\n", chart.title, chart.name);
    }
    for part in tables {
        let _ = write!(text, "\n## {}\n\n{}", part.title, table(part));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_head_a_rule_and_rows() {
        let cells = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        let rows = vec![cells(["1", "2"])];
        let text = table(&Table { title: String::new(), head: cells(["a", "b"]), rows });
        assert_eq!(text, "| a | b |\n| --- | --- |\n| 1 | 2 |\n");
    }
}
