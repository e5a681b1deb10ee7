//! The pager as a service: who may connect, and what becomes of what it tells.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::process::{Saving, hear, send};
use common::source::{Source, content, state};
use migration::stream::{ReturnMessage, SectionKind};
use rustix::fs::{OFlags, fcntl_setfl};

fn stream() -> Vec<u8> {
    let begun = Source::new().return_path().ram(&[("ram", 4 << 20)]).section(SectionKind::Part);
    begun.page("ram", 0, Some(&content(1))).end_section().end(&state()).bytes
}

fn saves(saving: &mut Saving) {
    let mut source = saving.connect();
    send(&mut source, &stream());
    assert_eq!(hear(&mut source), Some(ReturnMessage::Pong(1)));
    assert_eq!(hear(&mut source), Some(ReturnMessage::Shut(0)));
}

fn scrape(path: &Path) -> String {
    let mut scraper = UnixStream::connect(path).unwrap();
    scraper.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = String::new();
    scraper.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn sockets_have_the_mode_and_the_group_that_were_asked_for() {
    let gid = rustix::process::getgid().as_raw();
    // Only root may give files to any group.
    let group = if rustix::process::geteuid().is_root() { 12345 } else { gid };
    let group_text = group.to_string();
    let asked = ["--socket-mode", "0660", "--socket-group", &group_text];
    for (more, mode, group) in [(&[][..], 0o600, gid), (&asked, 0o660, group)] {
        let mut saving = Saving::in_folder(tempfile::tempdir().unwrap());
        let metrics = saving.path("metrics");
        saving.launch(&[&["--metrics-socket", metrics.to_str().unwrap()], more].concat());
        saving.wait_listening();
        for path in [saving.socket(), metrics] {
            let metadata = fs::metadata(&path).unwrap();
            let found = (metadata.permissions().mode() & 0o777, metadata.gid());
            assert_eq!(found, (mode, group), "{}", path.display());
        }
        saves(&mut saving);
        assert_eq!(saving.wait().0, Some(0));
    }
}

#[test]
fn a_group_that_is_not_there_is_a_wrong_use() {
    let mut saving = Saving::in_folder(tempfile::tempdir().unwrap());
    saving.launch(&["--socket-group", "no-such-group"]);
    let (status, _, err) = saving.wait();
    assert_eq!(status, Some(2));
    assert_eq!(err, "vmem-pager: --socket-group no-such-group: there is no such group\n");
}

/// The writing end of a pipe that has no room, and the reading end.
fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&writer, &[b'.'; 4096]).is_ok() {}
    fcntl_setfl(&writer, OFlags::empty()).unwrap();
    (writer, reader)
}

#[test]
fn what_is_told_and_not_read_holds_no_save_up() {
    let mut saving = Saving::in_folder(tempfile::tempdir().unwrap());
    let [(out, _out), (err, _err)] = [full_pipe(), full_pipe()];
    saving.launch_into(&["--json"], Stdio::from(out), Stdio::from(err));
    saving.wait_listening();
    for _ in 0..3 {
        let mut other = saving.connect();
        send(&mut other, b"GET / HTTP/1.1\r\n\r\n");
        assert_eq!(hear(&mut other), None);
    }
    saves(&mut saving);
    assert_eq!(saving.wait().0, Some(0));
}

#[test]
fn a_flood_of_one_kind_is_counted_in_the_log_and_for_scrapers() {
    let mut saving = Saving::in_folder(tempfile::tempdir().unwrap());
    let metrics = saving.path("metrics");
    let words = ["--metrics-socket", metrics.to_str().unwrap(), "--log-format", "json"];
    saving.launch(&words);
    saving.wait_listening();
    for _ in 0..40 {
        let mut other = saving.connect();
        send(&mut other, b"GET / HTTP/1.1\r\n\r\n");
        assert_eq!(hear(&mut other), None);
    }
    // A connection is closed before that is told.
    let deadline = Instant::now() + Duration::from_secs(60);
    let scraped = loop {
        let scraped = scrape(&metrics);
        if scraped.contains("vmem_pager_log_lines_suppressed_total 10\n") {
            break scraped;
        }
        assert!(Instant::now() < deadline, "{scraped}");
    };
    assert!(scraped.contains("vmem_pager_build_info{version="), "{scraped}");
    assert!(scraped.contains("process_cpu_seconds_total"), "{scraped}");
    saves(&mut saving);
    let (status, _, err) = saving.wait();
    assert_eq!(status, Some(0));
    let lines: Vec<serde_json::Value> =
        err.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().all(|line| line["level"] == "WARN" && line["target"] == "vmem_pager"));
    assert_eq!(lines.len(), 31, "{err}");
    let counted = &lines[30]["fields"];
    assert!(
        counted["message"].as_str().unwrap().contains("more like this: a connection that is not")
    );
    assert_eq!(counted["count"], 10, "{err}");
}
