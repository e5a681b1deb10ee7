//! Dirty logging, with what the crate forgets.

use std::os::fd::AsFd;

use super::super::RelayError;
use super::super::message::{FrontendRequest as R, Header};
use super::harness::{Bench, OFFERED, log_body, memfd, region};

const LOGGING: u64 = 1 << 30 | 1 << 26;

fn set_log(bench: &Bench) {
    let log = memfd(4096);
    let header = Header::request(R::SET_LOG_BASE as u32, 16);
    assert!(bench.front.send(header, &log_body(4096), &[log.as_fd()]));
    assert_eq!(bench.reply(R::SET_LOG_BASE), log_body(4096));
}

fn add(bench: &Bench) -> u64 {
    bench.ask(R::ADD_MEM_REG, &region(0, 4096), &[memfd(4096).as_fd()])
}

#[test]
fn the_flag_is_followed() {
    let mut bench = Bench::negotiated();
    for features in [LOGGING, LOGGING, 1 << 30, LOGGING] {
        assert_eq!(bench.ask(R::SET_FEATURES, &features.to_le_bytes(), &[]), 0);
    }
    assert_eq!(bench.ask(R::RESET_DEVICE, &[], &[]), 0);
    assert_eq!(bench.ask(R::SET_FEATURES, &LOGGING.to_le_bytes(), &[]), 0);
    bench.handle.shutdown();
    bench.outcome().unwrap();
    let calls: Vec<_> =
        bench.take_journal().into_iter().filter(|line| line.starts_with("log_all")).collect();
    let expected = ["true", "false", "true", "false", "true", "false"];
    assert_eq!(calls, expected.map(|active| format!("log_all {active}")));
}

#[test]
fn memory_added_while_logging_gets_the_log() {
    let bench = Bench::negotiated();
    set_log(&bench);
    assert_eq!(bench.ask(R::SET_FEATURES, &LOGGING.to_le_bytes(), &[]), 0);
    bench.take_journal();
    assert_eq!(add(&bench), 0);
    let expected = ["quiesce", "crate ADD_MEM_REG", "crate SET_LOG_BASE", "release"];
    assert_eq!(bench.take_journal(), expected);
}

#[test]
fn memory_added_before_logging_gets_the_log_when_it_starts() {
    let bench = Bench::negotiated();
    set_log(&bench);
    assert_eq!(add(&bench), 0);
    bench.take_journal();
    assert_eq!(bench.ask(R::SET_FEATURES, &LOGGING.to_le_bytes(), &[]), 0);
    let expected =
        ["quiesce", "crate SET_LOG_BASE", "release", "crate SET_FEATURES", "log_all true"];
    assert_eq!(bench.take_journal(), expected);
}

#[test]
fn a_log_that_is_too_small_ends_the_connection() {
    let mut bench = Bench::sour(Some((R::SET_LOG_BASE, 2, false)));
    bench.negotiate(OFFERED);
    set_log(&bench);
    assert_eq!(bench.ask(R::SET_FEATURES, &LOGGING.to_le_bytes(), &[]), 0);
    bench.take_journal();
    assert_eq!(add(&bench), 1);
    assert!(matches!(bench.outcome(), Err(RelayError::Log(R::ADD_MEM_REG))));
    let journal = bench.take_journal();
    assert!(journal.contains(&"release".into()) && journal.contains(&"log_all false".into()));
}

#[test]
fn a_log_past_the_end_of_its_file_is_refused() {
    let mut bench = Bench::negotiated();
    let header = Header::request(R::SET_LOG_BASE as u32, 16);
    assert!(bench.front.send(header, &log_body(8192), &[memfd(4096).as_fd()]));
    assert!(matches!(bench.outcome(), Err(RelayError::Value { .. })));
    assert_eq!(bench.take_journal(), [""; 0]);
}
