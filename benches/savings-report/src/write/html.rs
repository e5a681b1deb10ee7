//! One page that holds everything, with nothing to fetch.

use std::fmt::Write as _;

use super::Chart;
use crate::tables::Table;

const HEAD: &str = "<!doctype html>
<html lang=\"en\">
<meta charset=\"utf-8\">
<meta name=\"viewport\" content=\"width=device-width\">
<title>What knowing of discarded memory saves</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .2rem .6rem; text-align: left; white-space: nowrap }
.charts { display: flex; flex-wrap: wrap; gap: 1rem }
svg { max-width: 100%; height: auto }
p { max-width: 50rem }
</style>
<h1>What knowing of discarded memory saves</h1>
";

/// The whole report.
pub fn page(notes: &[String], tables: &[Table], charts: &[Chart]) -> String {
    let mut text = HEAD.to_owned();
    for note in notes {
        let _ = writeln!(text, "<p>{}</p>", escaped(note));
    }
    text.push_str("<div class=\"charts\">\n");
    charts.iter().for_each(|chart| text.push_str(&chart.svg));
    text.push_str("</div>\n");
    for table in tables {
        let _ = writeln!(text, "<h2>{}</h2>\n<table>", escaped(&table.title));
        row(&mut text, "th", &table.head);
        table.rows.iter().for_each(|cells| row(&mut text, "td", cells));
        text.push_str("</table>\n");
    }
    text
}

fn row(text: &mut String, kind: &str, cells: &[String]) {
    text.push_str("<tr>");
    for cell in cells {
        let _ = write!(text, "<{kind}>{}</{kind}>", escaped(cell));
    }
    text.push_str("</tr>\n");
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_markup_does_not_become_it() {
        assert_eq!(escaped("a < b & c"), "a &lt; b &amp; c");
    }
}
