//! What every process can tell, by the names that exporters of Prometheus agree on.
//!
//! Read anew from proc(5) at each scrape. What cannot be read has no sample.

use std::fmt;
use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

/// This process.
#[derive(Debug)]
pub struct Process;

/// Of `/proc/self/stat`, in its units.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    /// In user and kernel mode, clock ticks.
    cpu: u64,
    threads: u64,
    /// After the start of the host, clock ticks.
    start: u64,
    /// Bytes.
    virtual_memory: u64,
    /// Pages.
    resident: u64,
}

impl Stat {
    /// Reads the line. The second field is a name in parentheses, of any characters.
    fn parse(text: &str) -> Option<Self> {
        let (_, fields) = text.rsplit_once(") ")?;
        // The first of them is the third of proc_pid_stat(5).
        let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self {
            cpu: field(14)?.checked_add(field(15)?)?,
            threads: field(20)?,
            start: field(22)?,
            virtual_memory: field(23)?,
            resident: field(24)?,
        })
    }
}

/// The soft limit of this name in `/proc/self/limits`; `None` when there is no limit.
fn limit(text: &str, name: &str) -> Option<u64> {
    let values = text.lines().find_map(|line| line.strip_prefix(name))?;
    values.split_ascii_whitespace().next()?.parse().ok()
}

/// When the host was started, seconds since 1970: a line of `/proc/stat`.
fn boot_time(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

/// Open descriptors, without the one that is needed to count them.
fn open_fds() -> Option<u64> {
    let fds = fs::read_dir("/proc/self/fd").ok()?.filter(Result::is_ok).count();
    Some(fds.saturating_sub(1) as u64)
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let read = |path| fs::read_to_string(path).ok();
        let stat = read("/proc/self/stat").and_then(|text| Stat::parse(&text));
        let limits = read("/proc/self/limits").unwrap_or_default();
        let tick = 1.0 / rustix::param::clock_ticks_per_second() as f64;
        if let Some(stat) = &stat {
            let cpu = ConstCounter::new(stat.cpu as f64 * tick);
            let help = "Time on CPUs, in user and kernel mode";
            let unit = Some(&Unit::Seconds);
            cpu.encode(encoder.encode_descriptor("process_cpu", help, unit, cpu.metric_type())?)?;
        }
        let mut gauge = |name: &str, help: &str, unit: Option<&Unit>, value: Option<f64>| {
            let Some(value) = value else { return Ok(()) };
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, unit, gauge.metric_type())?)
        };
        let bytes = Some(&Unit::Bytes);
        let page = rustix::param::page_size() as f64;
        let of_stat = |value: fn(&Stat) -> u64| stat.as_ref().map(|stat| value(stat) as f64);
        let started = read("/proc/stat")
            .and_then(|text| boot_time(&text))
            .and_then(|boot| Some(boot as f64 + of_stat(|stat| stat.start)? * tick));
        let limit = |name| limit(&limits, name).map(|limit| limit as f64);
        let seconds = Some(&Unit::Seconds);
        gauge("process_start_time", "When the process began, since 1970", seconds, started)?;
        gauge("process_threads", "Threads", None, of_stat(|stat| stat.threads))?;
        let (size, resident) = (of_stat(|stat| stat.virtual_memory), of_stat(|stat| stat.resident));
        gauge("process_virtual_memory", "Address space, with the guest's memory", bytes, size)?;
        let most = limit("Max address space");
        gauge("process_virtual_memory_max", "Limit of the address space", bytes, most)?;
        let resident = resident.map(|pages| pages * page);
        let help = "Resident memory of the process, with what it uses of the guest's";
        gauge("process_resident_memory", help, bytes, resident)?;
        let open = open_fds().map(|fds| fds as f64);
        gauge("process_open_fds", "Open file descriptors", None, open)?;
        gauge("process_max_fds", "Limit of open file descriptors", None, limit("Max open files"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_looks_like_fields_does_not_shift_them() {
        let rest =
            "R 1 2 3 4 5 6 7 8 9 10 100 11 12 13 14 15 7 17 5000 65536 8 18446744073709551615";
        let expected =
            Some(Stat { cpu: 111, threads: 7, start: 5000, virtual_memory: 65536, resident: 8 });
        for name in ["vhost-user-mem", "a) R 0 0", ") ) (", ""] {
            assert_eq!(Stat::parse(&format!("42 ({name}) {rest}\n")), expected, "{name}");
        }
        for text in ["", "42", "42 (name)", "42 (name) R 1 2", "42 (name) R x"] {
            assert_eq!(Stat::parse(text), None, "{text}");
        }
    }

    #[test]
    fn limits_and_the_start_of_the_host_are_found_by_their_names() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max open files            1024                 524288               files     \n\
                      Max address space         unlimited            unlimited            bytes     \n";
        assert_eq!(limit(limits, "Max open files"), Some(1024));
        assert_eq!(limit(limits, "Max address space"), None);
        assert_eq!(limit(limits, "Max"), None);
        assert_eq!(boot_time("cpu 1 2\nbtime 1700000000\nprocesses 3\n"), Some(1_700_000_000));
        assert_eq!(boot_time("cpu 1 2\n"), None);
    }
}
