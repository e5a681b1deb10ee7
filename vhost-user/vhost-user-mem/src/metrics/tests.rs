//! What is told, by which names, and that rules and dashboard use no others.

use std::collections::BTreeSet;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use virtio_mem::controller::InitialState;
use virtio_mem::device::{Geometry, VirtioMem};

use super::*;

const RULES: &str = include_str!("../../dist/prometheus/rules.yml");
const RULE_TESTS: &str = include_str!("../../dist/prometheus/rules-test.yml");
const DASHBOARD: &str = include_str!("../../dist/prometheus/dashboard.json");

fn controller() -> MemController {
    let geometry = Geometry::new(1 << 32, 1 << 30, 2 << 20, None).unwrap();
    MemController::new(InitialState::volatile(VirtioMem::new(geometry, 4 << 20).unwrap()))
}

/// Everything that is ever served: by a daemon that has answered a request, with memory mapped.
fn served() -> String {
    let metrics = Metrics::new();
    metrics.request(Request::UnplugAll, Response::Ack, Duration::from_millis(1));
    let text = metrics.encode(&controller(), Watched::default());
    *metrics.resident.0.lock() = Some(4096);
    let mut whole = String::new();
    text::encode(&mut whole, &metrics.registry).unwrap();
    assert!(whole.len() > text.len(), "{whole}");
    whole
}

/// The names of the samples.
fn names(text: &str) -> BTreeSet<&str> {
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples.filter_map(|line| line.split(['{', ' ']).next()).collect()
}

/// Words that are names of metrics of this daemon.
fn used(text: &str) -> BTreeSet<&str> {
    let words = text.split(|char: char| !char.is_ascii_alphanumeric() && char != '_');
    words.filter(|word| word.starts_with("virtio_mem_") || word.starts_with("process_")).collect()
}

/// The one sample of this name.
fn sample(text: &str, name: &str) -> f64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("{name}: {text}")).parse().unwrap()
}

#[test]
fn scrapes_at_once_do_not_count_twice() {
    const TOTAL: u64 = 20_000;
    let copied = CopiedCounter::new(Counter::default());
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| (0..=TOTAL).for_each(|total| copied.copy(total)));
        }
    });
    assert_eq!(copied.counter.get(), TOTAL);
}

#[test]
fn rules_and_dashboard_use_only_what_is_served() {
    let text = served();
    let served = names(&text);
    for (file, text) in [("rules", RULES), ("tests", RULE_TESTS), ("dashboard", DASHBOARD)] {
        let used = used(text);
        assert!(used.len() >= 8, "{file}: {used:?}");
        let unknown: Vec<_> = used.difference(&served).collect();
        assert!(unknown.is_empty(), "{file}: {unknown:?} of {served:?}");
    }
}

#[test]
fn every_panel_of_the_dashboard_asks_something_of_its_own() {
    let dashboard: serde_json::Value = serde_json::from_str(DASHBOARD).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len());
    let mut places = BTreeSet::new();
    for panel in panels {
        let place = &panel["gridPos"];
        let (x, y) = (place["x"].as_u64().unwrap(), place["y"].as_u64().unwrap());
        assert!(x + place["w"].as_u64().unwrap() <= 24 && places.insert((x, y)), "{panel}");
        for target in panel["targets"].as_array().unwrap() {
            let asked = target["expr"].as_str().unwrap();
            assert!(
                !used(asked).is_empty() && asked.contains("instance=~\"$instance\""),
                "{asked}"
            );
        }
    }
}

#[test]
fn every_rule_is_tested() {
    let alerts = RULES.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    let alerts: Vec<&str> = alerts.collect();
    assert!(alerts.len() >= 8, "{alerts:?}");
    for alert in alerts {
        assert!(RULE_TESTS.contains(&format!("alertname: {alert}\n")), "{alert} is not tested");
    }
}

#[test]
fn the_process_and_the_build_are_told() {
    let text = Metrics::new().encode(&controller(), Watched::default());
    let version = env!("CARGO_PKG_VERSION");
    let build = format!("virtio_mem_build_info{{version=\"{version}\"}} 1\n");
    assert!(text.contains(&build), "{text}");
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    let started = sample(&text, "process_start_time_seconds");
    let counting = sample(&text, "virtio_mem_start_time_seconds");
    assert!((unix - 86400.0..=unix + 2.0).contains(&started), "{started} {unix}");
    assert!((started - 2.0..=unix).contains(&counting), "{started} {counting} {unix}");
    let resident = sample(&text, "process_resident_memory_bytes");
    let size = sample(&text, "process_virtual_memory_bytes");
    assert!(resident >= 65536.0 && resident < size, "{resident} {size}");
    assert!(sample(&text, "process_cpu_seconds_total") < 86400.0);
    assert!(sample(&text, "process_threads") >= 1.0);
    assert!(sample(&text, "process_open_fds") >= 3.0);
    assert!(sample(&text, "process_max_fds") >= sample(&text, "process_open_fds"));
}

#[test]
fn what_is_not_known_has_no_sample() {
    let metrics = Metrics::new();
    let text = metrics.encode(&controller(), Watched::default());
    assert!(!text.contains("resident_size"), "{text}");
    assert!(!text.lines().any(|line| line.ends_with(" -1")), "{text}");
    *metrics.resident.0.lock() = Some(0);
    let mut text = String::new();
    text::encode(&mut text, &metrics.registry).unwrap();
    assert_eq!(sample(&text, "virtio_mem_resident_size_bytes"), 0.0);
}

#[test]
fn requests_are_counted_from_0_by_type_and_response() {
    let metrics = Metrics::new();
    let value = |kind, response| {
        let text = metrics.encode(&controller(), Watched::default());
        let labels = format!("{{type=\"{kind}\",response=\"{response}\"}}");
        sample(&text, &format!("virtio_mem_requests_total{labels}"))
    };
    for kind in ["plug", "unplug", "unplug_all", "state", "unsupported"] {
        for response in ["ack", "nack", "busy", "error"] {
            assert_eq!(value(kind, response), 0.0, "{kind} {response}");
        }
    }
    metrics.request(Request::UnplugAll, Response::Error, Duration::from_millis(1));
    metrics.request(Request::UnplugAll, Response::Error, Duration::from_millis(1));
    assert_eq!((value("unplug_all", "error"), value("unplug_all", "ack")), (2.0, 0.0));
}

#[test]
fn what_the_watchers_see_is_told() {
    let (metrics, controller) = (Metrics::new(), controller());
    for seen in [true, false, true] {
        let watched = Watched { connected: seen, resize_stalled: !seen };
        let text = metrics.encode(&controller, watched);
        assert_eq!(sample(&text, "virtio_mem_connected"), f64::from(u8::from(seen)));
        assert_eq!(sample(&text, "virtio_mem_resize_stalled"), f64::from(u8::from(!seen)));
    }
}
