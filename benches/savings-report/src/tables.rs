//! The tables of the report, as text.

use crate::case::{Case, Mode, Way};
use crate::content::Content;
use crate::link::Link;
use crate::record::{Figures, Outcome, Record};
use crate::units::{GIB, size, time};
use crate::view::{Dimension, View};

/// A table with a heading.
pub struct Table {
    /// What is above it.
    pub title: String,
    /// The columns.
    pub head: Vec<String>,
    /// As many cells as there are columns.
    pub rows: Vec<Vec<String>>,
}

const FIGURES: [&str; 11] = [
    "sent",
    "normal pages",
    "zero pages",
    "holes",
    "discarded",
    "total",
    "downtime",
    "CPU",
    "source resident",
    "destination holds",
    "count checked",
];

impl Table {
    /// Without rows.
    pub fn new(title: String, head: impl IntoIterator<Item = &'static str>) -> Self {
        Self { title, head: head.into_iter().map(str::to_owned).collect(), rows: Vec::new() }
    }

    /// A row whose first cells are `names`; the figures of `record`, or why there are none.
    fn add(&mut self, names: impl IntoIterator<Item = String>, record: &Record) {
        let mut row: Vec<_> = names.into_iter().collect();
        match &record.outcome {
            Outcome::Measured(figures) => row.extend(cells(figures, record.case.way)),
            Outcome::NotRun(reason) | Outcome::Failed(reason) => row.push(reason.clone()),
        }
        row.resize(self.head.len(), String::new());
        self.rows.push(row);
    }
}

fn cells(figures: &Figures, way: Way) -> [String; 11] {
    let to_memory = way != Way::BackgroundSnapshot;
    [
        size(figures.wire),
        figures.normal.to_string(),
        figures.zero.to_string(),
        figures.holes.to_string(),
        figures.discarded.to_string(),
        time(figures.total),
        figures.downtime.map_or_else(|| "-".to_owned(), time),
        time(figures.cpu),
        format!("{} → {}", size(figures.source[0]), size(figures.source[1])),
        if to_memory { size(figures.destination) } else { "-".to_owned() },
        match figures.agrees {
            Some(true) => "yes",
            Some(false) => "DIFFERS",
            None => "-",
        }
        .to_owned(),
    ]
}

/// What the guest at the centre has, in words.
pub fn guest(case: &Case) -> String {
    format!(
        "region of {}, {:.0} % of it plugged ({}), {} % of that touched ({})",
        size(case.region),
        case.plugged_percent(),
        size(case.plugged),
        case.touched_percent,
        size(case.touched()),
    )
}

/// Every way by every mode, at the centre.
pub fn ways(view: &View<'_>, writing: bool) -> Table {
    let centre = view.profile.centre();
    let what = if writing { "a guest that writes 256 MiB/s" } else { "an idle guest" };
    let title = format!("Every way of moving {what}: {}", guest(&centre));
    let mut table = Table::new(title, ["way", "mode"].into_iter().chain(FIGURES));
    for way in Way::ALL {
        for mode in Mode::ALL {
            if let Some(record) = view.centre(way, mode, writing) {
                table.add([way.name().to_owned(), mode.name().to_owned()], record);
            }
        }
    }
    table
}

/// Precopy along one dimension: what was sent and how long it took, by mode.
pub fn sweep(view: &View<'_>, dimension: Dimension, way: Way) -> Table {
    let title = format!("{}: sent, and total time, by {}", way.name(), dimension.name());
    let mut table = Table::new(title, [dimension.name()]);
    table.head.extend(Mode::ALL.map(|mode| mode.name().to_owned()));
    for (column, mode) in Mode::ALL.into_iter().enumerate() {
        for (row, record) in view.sweep(dimension, way, mode).into_iter().enumerate() {
            if table.rows.len() == row {
                let mut cells = vec![String::new(); Mode::ALL.len() + 1];
                cells[0] = dimension.label(&record.case);
                table.rows.push(cells);
            }
            table.rows[row][column + 1] = match &record.outcome {
                Outcome::Measured(figures) => {
                    format!("{}, {}", size(figures.wire), time(figures.total))
                }
                Outcome::NotRun(reason) | Outcome::Failed(reason) => reason.clone(),
            };
        }
    }
    table
}

/// What stands in the README: precopy at the centre, and what it leaves behind.
pub fn small(view: &View<'_>) -> Table {
    let title = format!("Precopy of an idle guest: {}", guest(&view.profile.centre()));
    let head =
        ["a VMM that is", "sends", "in", "using CPU", "source then holds", "destination holds"];
    let mut table = Table::new(title, head);
    for mode in Mode::ALL {
        if let Some(record) = view.centre(Way::Precopy, mode, false) {
            let mut row = vec![mode.name().to_owned()];
            match &record.outcome {
                Outcome::Measured(figures) => row.extend([
                    size(figures.wire),
                    time(figures.total),
                    time(figures.cpu),
                    size(figures.source[1]),
                    size(figures.destination),
                ]),
                Outcome::NotRun(reason) | Outcome::Failed(reason) => row.push(reason.clone()),
            }
            row.resize(table.head.len(), String::new());
            table.rows.push(row);
        }
    }
    table
}

/// The same guest over each link. Processor time of a GiB tells what a link costs also on a machine with other
/// work.
pub fn links(view: &View<'_>) -> Table {
    let guest = guest(&view.profile.linked(Link::default()));
    let title = format!("Precopy of an idle guest over different channels: {guest}");
    let head = ["pages go over", "sends", "in", "downtime", "using CPU", "CPU a GiB"];
    let mut table = Table::new(title, head);
    for link in Link::ALL {
        if let Some(record) = view.linked(link) {
            let mut row = vec![link.name()];
            match &record.outcome {
                Outcome::Measured(figures) => row.extend([
                    size(figures.wire),
                    time(figures.total),
                    figures.downtime.map_or_else(|| "-".to_owned(), time),
                    time(figures.cpu),
                    time(figures.cpu * GIB as f64 / figures.wire as f64),
                ]),
                Outcome::NotRun(reason) | Outcome::Failed(reason) => row.push(reason.clone()),
            }
            row.resize(table.head.len(), String::new());
            table.rows.push(row);
        }
    }
    table
}

/// The same guest with each content, plain and compressed. Processor time is told by the GiB of memory, of which fewer
/// bytes are sent.
pub fn compression(view: &View<'_>) -> Table {
    let case = view.profile.linked(Link::default());
    let title = format!("Precopy of an idle guest, plain and by zstd at level 1: {}", guest(&case));
    let head = [
        "memory of",
        "pages go over",
        "sends",
        "of what was touched",
        "in",
        "using CPU",
        "CPU a GiB of memory",
    ];
    let mut table = Table::new(title, head);
    for content in Content::ALL {
        for link in Link::COMPRESSED {
            let Some(record) = view.compressed(link, content) else { continue };
            let mut row = vec![content.name().to_owned(), link.name()];
            match &record.outcome {
                Outcome::Measured(figures) => {
                    let touched = record.case.touched() as f64;
                    row.extend([
                        size(figures.wire),
                        format!("{:.0} %", figures.wire as f64 * 100.0 / touched),
                        time(figures.total),
                        time(figures.cpu),
                        time(figures.cpu * GIB as f64 / touched),
                    ]);
                }
                Outcome::NotRun(reason) | Outcome::Failed(reason) => row.push(reason.clone()),
            }
            row.resize(table.head.len(), String::new());
            table.rows.push(row);
        }
    }
    table
}

/// Title of the last table.
pub const ALL: &str = "All cases";

/// Everything, one row a case.
pub fn all(view: &View<'_>) -> Table {
    let names =
        ["way", "mode", "pages go over", "region", "plugged", "touched", "dirtied", "memory of"];
    let head = names.into_iter().chain(FIGURES);
    let mut table = Table::new(ALL.to_owned(), head);
    for record in view.records {
        let case = &record.case;
        let names = [
            case.way.name().to_owned(),
            case.mode.name().to_owned(),
            link(case),
            size(case.region),
            size(case.plugged),
            format!("{} %", case.touched_percent),
            format!("{}/s", size(case.dirty_rate)),
            case.content.name().to_owned(),
        ];
        table.add(names, record);
    }
    table
}

/// By what a case moves pages: a file has no channels.
fn link(case: &Case) -> String {
    match case.way {
        Way::Precopy | Way::Hybrid | Way::Postcopy => case.link.name(),
        Way::BackgroundSnapshot | Way::Restore => "-".to_owned(),
    }
}

/// All tables of the report, in order.
pub fn report(view: &View<'_>) -> Vec<Table> {
    let mut tables = vec![ways(view, false), ways(view, true), links(view), compression(view)];
    for dimension in Dimension::ALL {
        tables.push(sweep(view, dimension, Way::Precopy));
    }
    for way in [Way::Hybrid, Way::Postcopy, Way::BackgroundSnapshot, Way::Restore] {
        tables.push(sweep(view, Dimension::Region, way));
    }
    tables.push(all(view));
    tables.retain(|table| !table.rows.is_empty());
    tables
}
