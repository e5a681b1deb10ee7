//! What was measured of the pager, as tables.

use super::restore::{Restored, Way};
use super::save::Who;
use super::{Paged, REGION};
use crate::statistics::{Spread, ratio};
use crate::tables::Table;
use crate::units::{MIB, size, time};

/// What has to be known to read them.
pub const NOTE: &str = "The pager: a Linux guest of a stock QEMU under TCG, one vCPU, memory in memfds, with a program that verifies its \
     memory in scattered order for ever; it finds no wrong page in any of these runs. It is saved while it is paused, \
     and its files then say that it ran, so that it runs when it is loaded. Times are from the command (migrate-incoming, \
     or the start of the pager, which drives QEMU with --qmp) to QEMU's events RESUME and MIGRATION completed; a tick \
     is a line that the program writes to a serial port 50 times a second. Processor time is QEMU's without \
     its vCPUs, and the pager's, to when all memory is there. The bare writer is the limit of a lazy restore: it has the \
     records of all pages ready in memory, sends them as fast as QEMU takes them, and answers requests; its own processor \
     time is left out. An exchange is a request for a page, and its answer, as seen by a client of the socket: \
     of the pager, and of a thread that sends the same bytes without looking. Saves end with all bytes on the disk (fsync, \
     which QEMU leaves to others).";

/// All of them.
pub fn tables(paged: &Paged) -> Vec<Table> {
    vec![restores(paged), regions(paged), exchanges(paged), saves(paged)]
}

fn micros(value: f64) -> String {
    format!("{value:.0} µs")
}

fn bytes(value: f64) -> String {
    size(value as u64)
}

/// With three digits: a tenth of a MiB says nothing here.
fn mebibytes(value: f64) -> String {
    format!("{:.0} MiB", value / MIB as f64)
}

fn text(values: impl Iterator<Item = f64>, words: fn(f64) -> String) -> String {
    Spread::of(values).map_or_else(|| "-".to_owned(), |spread| spread.text(words))
}

fn restores(paged: &Paged) -> Table {
    let title = format!(
        "The same guest of {}, restored by itself and by the pager: {}",
        paged.qemu, paged.guest
    );
    let head = [
        "restored by",
        "guest runs",
        "after connecting",
        "first tick",
        "all data",
        "fault p50",
        "fault p99",
        "QEMU holds",
        "pager holds",
        "CPU",
    ];
    let mut table = Table::new(title, head);
    for way in Way::ALL {
        let of = || paged.restored.iter().filter(move |one| one.way == way);
        table.rows.push(vec![
            way.name().to_owned(),
            text(of().map(|one| one.runs), time),
            text(of().filter_map(|one| one.runs_after_connecting), time),
            text(of().map(|one| one.tick), time),
            text(of().map(|one| one.all), time),
            text(of().filter_map(|one| Some(one.faults?[0])), micros),
            text(of().filter_map(|one| Some(one.faults?[1])), micros),
            text(of().map(|one| one.held as f64), mebibytes),
            text(of().filter_map(|one| Some(one.pager? as f64)), mebibytes),
            text(of().map(|one| one.cpu), time),
        ]);
    }
    table
}

fn regions(paged: &Paged) -> Table {
    let title = "The same with larger regions, by the pager".to_owned();
    let head =
        ["region", "guest runs", "after connecting", "first tick", "all data", "pager holds"];
    let mut table = Table::new(title, head);
    let compared = paged.restored.iter().filter(|one| one.way == Way::Lazy);
    let mut of_sizes: Vec<(u64, Vec<&Restored>)> = vec![(REGION[0].size, compared.collect())];
    for (region, one) in &paged.larger {
        match of_sizes.iter_mut().find(|(size, _)| size == region) {
            Some((_, all)) => all.push(one),
            None => of_sizes.push((*region, vec![one])),
        }
    }
    for (region, all) in of_sizes {
        let of = |figure: fn(&Restored) -> Option<f64>, words| {
            text(all.iter().filter_map(|one| figure(one)), words)
        };
        table.rows.push(vec![
            size(region),
            of(|one| Some(one.runs), time),
            of(|one| one.runs_after_connecting, time),
            of(|one| Some(one.tick), time),
            of(|one| Some(one.all), time),
            of(|one| Some(one.pager? as f64), mebibytes),
        ]);
    }
    table
}

fn exchanges(paged: &Paged) -> Table {
    let title = "A page that is asked for, and nothing else meanwhile".to_owned();
    let mut table = Table::new(title, ["answered by", "p50", "p99", "as a multiple"]);
    let of = |pager: bool, at: usize| {
        Spread::of(paged.exchanged.iter().filter(|one| one.pager == pager).map(|one| one.took[at]))
    };
    for (pager, name) in [(false, "a bare exchange"), (true, "the pager")] {
        let cell = |at| of(pager, at).map_or_else(|| "-".to_owned(), |all| all.text(micros));
        let multiple = of(pager, 0).zip(of(false, 0)).and_then(|(one, bare)| ratio(one, bare));
        let multiple = multiple.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
        table.rows.push(vec![name.to_owned(), cell(0), cell(1), multiple]);
    }
    table
}

fn saves(paged: &Paged) -> Table {
    let title = "The same guest, saved".to_owned();
    let head =
        ["saved by", "written", "on the disk", "as a multiple", "file holds", "pager holds", "CPU"];
    let mut table = Table::new(title, head);
    let of = |who: Who| paged.saved.iter().filter(move |one| one.who == who);
    let total = |who| Spread::of(of(who).map(|one| one.total));
    for who in Who::ALL {
        let multiple = total(who).zip(total(Who::Loop)).and_then(|(one, bare)| ratio(one, bare));
        table.rows.push(vec![
            who.name().to_owned(),
            text(of(who).map(|one| one.written), time),
            text(of(who).map(|one| one.total), time),
            multiple.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
            text(of(who).map(|one| one.held as f64), bytes),
            text(of(who).filter_map(|one| Some(one.pager?.0 as f64)), mebibytes),
            text(of(who).filter_map(|one| Some(one.pager?.1)), time),
        ]);
    }
    table
}

/// Some figures, for tests.
#[cfg(test)]
pub fn sample() -> Paged {
    use super::exchange::Exchange;
    use super::save::Saved;
    let restored = |way, faults| Restored {
        way,
        runs: 20.0,
        runs_after_connecting: None,
        tick: 100.0,
        all: 500.0,
        faults,
        requests: None,
        held: 8 * MIB,
        pager: None,
        cpu: 300.0,
    };
    let saved = |who, total| Saved { who, written: 1.0, total, held: MIB, pager: None };
    Paged {
        qemu: "QEMU 1".to_owned(),
        guest: "small".to_owned(),
        restored: vec![
            restored(Way::Plain, None),
            restored(Way::Lazy, Some([10.0, 90.0])),
            restored(Way::Lazy, Some([30.0, 90.0])),
        ],
        larger: vec![(1 << 40, restored(Way::Lazy, None))],
        exchanged: vec![
            Exchange { pager: false, took: [10.0, 20.0] },
            Exchange { pager: true, took: [15.0, 40.0] },
        ],
        saved: vec![saved(Who::Loop, 400.0), saved(Who::Pager, 500.0)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_as_long_as_its_head() {
        for table in tables(&sample()) {
            let full = |row: &Vec<String>| row.len() == table.head.len();
            assert!(!table.rows.is_empty() && table.rows.iter().all(full), "{}", table.title);
        }
    }

    #[test]
    fn figures_are_medians_and_what_was_not_measured_is_a_dash() {
        let rows = restores(&sample()).rows;
        assert_eq!(rows[0][5], "-");
        assert_eq!(rows[2][5], "20 µs (10 µs – 30 µs)");
        assert_eq!(rows[2][7], "8 MiB");
        let regions = regions(&sample()).rows;
        assert_eq!((regions.len(), &regions[1][0][..]), (2, "1 TiB"));
    }

    #[test]
    fn multiples_are_of_the_bare_loop_and_of_the_bare_exchange() {
        assert_eq!(saves(&sample()).rows[2][3], "1.25");
        assert_eq!(exchanges(&sample()).rows[1][3], "1.50");
    }
}
