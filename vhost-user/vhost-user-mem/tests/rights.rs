//! Who may do what through the daemon's sockets, and what is told of it.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use common::{PATIENCE, REGION, options};
use small_vmm::api::ApiClient;

#[test]
fn a_scraper_gets_the_metrics_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("metrics");
    let option = ["--metrics-socket", socket.to_str().unwrap()];
    let mut daemon = common::daemon(option.into_iter().fold(options(), |all, word| all.arg(word)));
    let mode = fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let scraper = ApiClient::new(&socket);
    let answer = scraper.send("GET", "/metrics", None).unwrap();
    assert_eq!(answer.status, 200);
    assert!(answer.text.ends_with("# EOF\n"), "{}", answer.text);
    assert!(answer.text.contains("virtio_mem_requested_size_bytes"), "{}", answer.text);
    for (method, resource) in [
        ("GET", "/v1/device"),
        ("GET", "/v1/events"),
        ("GET", "/openapi.json"),
        ("GET", "/"),
        ("POST", "/v1/device/system-reset"),
        ("PUT", "/v1/device/requested-size"),
        ("PUT", "/v1/migration"),
    ] {
        let answer = scraper.send(method, resource, None).unwrap();
        assert_eq!(answer.status, 404, "{method} {resource}: {}", answer.text);
        assert!(answer.text.contains("This socket serves GET /metrics alone"), "{}", answer.text);
    }
    let answer = scraper.send("POST", "/metrics", None).unwrap();
    assert_eq!(answer.status, 405, "{}", answer.text);
    assert_eq!(daemon.api().device().unwrap()["requested_size"], REGION);
    assert!(daemon.terminate(PATIENCE).unwrap().success());
    assert!(!socket.exists());
}

#[test]
fn each_change_through_the_api_is_told_with_who_asked_for_it() {
    let daemon = common::daemon(options());
    let api = daemon.api();
    let body = |size: u64| Some(format!("{{\"requested_size\":{size}}}"));
    api.send("GET", "/v1/device", None).unwrap();
    for (method, resource, body, status) in [
        ("PUT", "/v1/device/requested-size", body(0), 200),
        ("PUT", "/v1/device/requested-size", body(1), 422),
        ("PUT", "/v1/migration", Some(r#"{"active":false}"#.to_owned()), 200),
        ("POST", "/v1/device/system-reset", None, 200),
        ("DELETE", "/no-such-thing", None, 404),
    ] {
        let answer = api.send(method, resource, body.as_deref()).unwrap();
        assert_eq!(answer.status, status, "{}", answer.text);
    }
    assert!(daemon.wait_logged("no-such-thing", PATIENCE), "{}", daemon.stderr());
    let stderr = daemon.stderr();
    let told: Vec<&str> =
        stderr.lines().filter(|line| line.contains("change by the API")).collect();
    let (pid, uid) = (std::process::id(), rustix::process::getuid().as_raw());
    let expected = [
        "method=PUT path=\"/v1/device/requested-size\" detail=\"requested_size=0\" status=200",
        "method=PUT path=\"/v1/device/requested-size\" detail=\"requested_size=1\" status=422",
        "method=PUT path=\"/v1/migration\" detail=\"active=false\" status=200",
        "method=POST path=\"/v1/device/system-reset\" status=200",
        "method=DELETE path=\"/no-such-thing\" status=404",
    ];
    assert_eq!(told.len(), expected.len(), "{stderr}");
    for (line, expected) in told.iter().zip(expected) {
        assert!(line.contains(&format!("pid={pid} uid={uid} {expected}")), "{line}");
    }
}
