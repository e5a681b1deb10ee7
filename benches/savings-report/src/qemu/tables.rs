//! The comparison as tables.

use super::resize::{LARGE, SMALL};
use super::{Measured, Moved, Resized, Route, Who};
use crate::statistics::{Spread, ratio};
use crate::tables::Table;
use crate::units::{size, time};

/// What has to be known to read them.
pub const NOTES: [&str; 3] = [
    "Against a stock QEMU: a Linux guest under TCG with QEMU's own virtio-mem-pci, its memory in memfds, \
     the larger of which comes first on the command line; stopped before it is moved, and booted afresh for \
     every run. This project moves a copy of those two files with the same block state, hole for hole, in \
     one process; QEMU also moves its devices and firmware (below 1 MiB). As everywhere in this report as much \
     memory as a run takes is touched and freed before it: first touch of memory that the machine's own host has \
     not backed costs a multiple. Figures are medians, with the least and the most where they differ. QEMU's \
     are query-migrate's. Downtime is that of a guest that already stood still, from the \
     end of the rounds on: QEMU's until it has written everything, this project's until the destination has said \
     that it loaded everything.",
    "Counted are, for QEMU and the socket, the bytes that came out of a second migration of the same \
     guest to a thread that does nothing else; for this project and the socket what the kernel saw being read \
     (rchar); for files their length (stream) or their blocks (mapped-ram). To a file this project always uses the \
     mapped-ram layout: the stream to a file is QEMU's alone.",
    "Resizes: the same kernel, initramfs, boot memory, region (8 GiB) and blocks (2 MiB) under the same QEMU, with its \
     virtio-mem-pci and with the daemon behind its generic vhost-user front-end. Both guests live side by side and \
     take turns; between growing and shrinking each writes 1 GiB and frees it. Sizes are asked for every 5 ms, by \
     QMP and by the management API's block map. How long it takes is mostly the guest's doing: nearly all of a shrink goes into \
     taking memory off line, which is slow under TCG; the device answers a request for each 128 MiB in between.",
];

/// All of them.
pub fn tables(measured: &Measured) -> Vec<Table> {
    let mut tables = vec![moves_table(measured), ratios(measured), resizes(measured)];
    tables.extend(super::pager_tables(&measured.paged));
    tables
}

/// One figure of every move by `who` on `route`; `None` where that was not measured.
pub fn moves(
    measured: &Measured,
    who: Who,
    route: Route,
    figure: impl Fn(&Moved) -> f64,
) -> Option<Spread> {
    let those = measured.moved.iter().filter(|moved| moved.who == who && moved.route == route);
    Spread::of(those.map(figure))
}

fn bytes(value: f64) -> String {
    size(value as u64)
}

fn count(value: f64) -> String {
    format!("{value:.0}")
}

fn heading(measured: &Measured) -> String {
    format!("Against {}: {}", measured.qemu, measured.guest)
}

fn moves_table(measured: &Measured) -> Table {
    let head = [
        "route",
        "who",
        "runs",
        "sent",
        "counted",
        "normal pages",
        "zero pages",
        "setup",
        "total",
        "downtime",
        "source, region",
        "source, boot memory",
        "destination, region",
        "destination, boot memory",
    ];
    let mut table = Table::new(heading(measured), head);
    for route in Route::ALL {
        for who in [Who::Qemu, Who::Ours] {
            table.rows.extend(row(measured, who, route));
        }
    }
    table
}

fn row(measured: &Measured, who: Who, route: Route) -> Option<Vec<String>> {
    let those = || measured.moved.iter().filter(|moved| moved.who == who && moved.route == route);
    let text = |figure: fn(&Moved) -> f64, words: fn(f64) -> String| {
        moves(measured, who, route, figure).map(|spread| spread.text(words))
    };
    let both = |before: fn(&Moved) -> f64, after: fn(&Moved) -> f64| {
        Some(format!("{} → {}", text(before, bytes)?, text(after, bytes)?))
    };
    let downtime = Spread::of(those().filter_map(|moved| moved.downtime));
    Some(vec![
        route.name().to_owned(),
        who.name().to_owned(),
        those().count().to_string(),
        text(|moved| moved.sent as f64, bytes)?,
        text(|moved| moved.counted as f64, bytes)?,
        text(|moved| moved.normal as f64, count)?,
        text(|moved| moved.zero as f64, count)?,
        text(|moved| moved.setup, time)?,
        text(|moved| moved.total, time)?,
        downtime.map_or_else(|| "-".to_owned(), |spread| spread.text(time)),
        both(|moved| moved.source[0].region as f64, |moved| moved.source[1].region as f64)?,
        both(|moved| moved.source[0].boot as f64, |moved| moved.source[1].boot as f64)?,
        text(|moved| moved.destination.region as f64, bytes)?,
        text(|moved| moved.destination.boot as f64, bytes)?,
    ])
}

/// What the source took more because it was read.
fn grown(moved: &Moved) -> f64 {
    let all = moved.source.map(|resident| resident.region + resident.boot);
    all[1].saturating_sub(all[0]) as f64
}

fn destination(moved: &Moved) -> f64 {
    (moved.destination.region + moved.destination.boot) as f64
}

/// How many times as much; both, where there is no such number.
fn times(one: Spread, other: Spread, words: fn(f64) -> String) -> String {
    match ratio(one, other) {
        Some(ratio) => format!("{ratio:.2}"),
        None => format!("{} : {}", words(one.median), words(other.median)),
    }
}

fn ratios(measured: &Measured) -> Table {
    let title = format!("{}, as a multiple of this project", measured.qemu);
    let head = ["route", "sent", "total", "source grew by", "destination holds"];
    let mut table = Table::new(title, head);
    for route in Route::ALL {
        let cell = |figure: fn(&Moved) -> f64, words: fn(f64) -> String| {
            let one = |who| moves(measured, who, route, figure);
            Some(times(one(Who::Qemu)?, one(Who::Ours)?, words))
        };
        let cells = [
            Some(route.name().to_owned()),
            cell(|moved| moved.sent as f64, bytes),
            cell(|moved| moved.total, time),
            cell(grown, bytes),
            cell(destination, bytes),
        ];
        table.rows.extend(cells.into_iter().collect::<Option<Vec<_>>>());
    }
    table
}

type Figure = fn(&Resized) -> f64;
type Words = fn(f64) -> String;

fn resizes(measured: &Measured) -> Table {
    let title =
        format!("Resizing the same guest with the device of {} and with the daemon", measured.qemu);
    let mut table = Table::new(title, ["device", "runs"]);
    let way = |from, to| format!("{} → {}", size(from), size(to));
    table.head.extend([way(SMALL, LARGE), way(LARGE, SMALL)]);
    table.head.extend(["resident before the shrink", "and after"].map(str::to_owned));
    let those = |who| measured.resized.iter().filter(move |resized| resized.who == who);
    let spread = |who, figure: Figure| Spread::of(those(who).map(figure));
    let figures: [(Figure, Words); 4] = [
        (|resized| resized.grow, time),
        (|resized| resized.shrink, time),
        (|resized| resized.resident[0] as f64, bytes),
        (|resized| resized.resident[1] as f64, bytes),
    ];
    for (who, name) in [(Who::Qemu, "virtio-mem-pci"), (Who::Ours, "the daemon")] {
        let mut row = vec![name.to_owned(), those(who).count().to_string()];
        let cells = figures.map(|(figure, words)| Some(spread(who, figure)?.text(words)));
        row.extend(cells.into_iter().flatten());
        table.rows.push(row);
    }
    let mut row = vec!["virtio-mem-pci, as a multiple".to_owned(), String::new()];
    let ratio = |(figure, words)| {
        Some(times(spread(Who::Qemu, figure)?, spread(Who::Ours, figure)?, words))
    };
    row.extend(figures.map(ratio).into_iter().flatten());
    table.rows.push(row);
    table.rows.iter_mut().for_each(|row| row.resize(table.head.len(), "-".to_owned()));
    table
}

/// What stands in the README.
pub fn summary(measured: &Measured) -> Table {
    let head = ["route", "who", "sends", "in", "source then holds", "destination holds"];
    let mut table = Table::new(heading(measured), head);
    for route in [Route::Socket, Route::MappedRam] {
        for who in [Who::Qemu, Who::Ours] {
            let text = |figure: fn(&Moved) -> f64, words: fn(f64) -> String| {
                moves(measured, who, route, figure).map(|spread| words(spread.median))
            };
            let name = match who {
                Who::Qemu => measured.qemu.clone(),
                Who::Ours => who.name().to_owned(),
            };
            let cells = [
                Some(route.name().to_owned()),
                Some(name),
                text(|moved| moved.sent as f64, bytes),
                text(|moved| moved.total, time),
                text(|moved| (moved.source[1].region + moved.source[1].boot) as f64, bytes),
                text(destination, bytes),
            ];
            table.rows.extend(cells.into_iter().collect::<Option<Vec<_>>>());
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::{Resident, pager};
    use crate::units::MIB;

    fn moved(who: Who, total: f64, after: u64) -> Moved {
        let resident = |region| Resident { region: region * MIB, boot: 0 };
        Moved {
            who,
            route: Route::Socket,
            sent: 8 * MIB,
            counted: 8 * MIB,
            normal: 2048,
            zero: 0,
            setup: 1.0,
            total,
            downtime: None,
            source: [resident(8), resident(after)],
            destination: resident(after),
        }
    }

    fn measured() -> Measured {
        let resized = |who, shrink| Resized { who, grow: 300.0, shrink, resident: [MIB, 0] };
        Measured {
            qemu: "QEMU 1".to_owned(),
            guest: "small".to_owned(),
            moved: vec![
                moved(Who::Qemu, 300.0, 16),
                moved(Who::Ours, 100.0, 8),
                moved(Who::Qemu, 100.0, 16),
                moved(Who::Qemu, 200.0, 16),
            ],
            resized: vec![resized(Who::Qemu, 9000.0), resized(Who::Ours, 9000.0)],
            paged: pager::sample(),
        }
    }

    #[test]
    fn ratios_are_of_medians_and_nothing_is_no_divisor() {
        let rows = ratios(&measured()).rows;
        assert_eq!(rows, [["Unix socket", "1.00", "2.00", "8 MiB : 0", "2.00"]]);
    }

    #[test]
    fn every_row_is_as_long_as_the_head() {
        for table in tables(&measured()).into_iter().chain([summary(&measured())]) {
            assert!(
                !table.rows.is_empty()
                    && table.rows.iter().all(|row| row.len() == table.head.len())
            );
        }
    }

    #[test]
    fn resizes_end_in_a_ratio() {
        let rows = resizes(&measured()).rows;
        assert_eq!(rows[2], ["virtio-mem-pci, as a multiple", "", "1.00", "1.00", "1.00", "0 : 0"]);
    }
}
