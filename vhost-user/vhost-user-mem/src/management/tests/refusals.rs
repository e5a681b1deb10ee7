//! What the API refuses, and what it says then.

use std::sync::atomic::Ordering;

use serde_json::json;

use super::http::{get, put, raw, send};
use super::{Fake, device};
use crate::management::body::LIMIT;

#[test]
fn sizes_that_are_none() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    for (body, status, said) in [
        ("", 400, "empty"),
        ("{", 400, "EOF"),
        ("{\"requested_size\": 1} x", 400, "trailing"),
        ("{\"requested_size\": 01}", 400, "number"),
        ("{\"requested_size\": 1e400}", 400, "number"),
        ("{'requested_size': 1}", 400, "key"),
        ("[2097152]", 422, "object"),
        ("2097152", 422, "object"),
        ("null", 422, "object"),
        ("{}", 422, "missing field `requested_size`"),
        ("{\"requested_size\": 2097152, \"size\": 1}", 422, "unknown field `size`"),
        ("{\"requested_size\": 0, \"requested_size\": 0}", 422, "duplicate"),
        ("{\"requested_size\": -2097152}", 422, "negative"),
        ("{\"requested_size\": -99999999999999999999}", 422, "negative"),
        ("{\"requested_size\": 2097152.0}", 422, "whole number"),
        ("{\"requested_size\": 2e6}", 422, "whole number"),
        ("{\"requested_size\": 18446744073709551616}", 422, "64 bits"),
        ("{\"requested_size\": \"2M\"}", 422, "whole number"),
        ("{\"requested_size\": null}", 422, "whole number"),
        ("{\"requested_size\": true}", 422, "whole number"),
        ("{\"requested_size\": [1]}", 422, "whole number"),
        ("{\"requested_size\": 1}", 422, "breaks a rule"),
        ("{\"requested_size\": 18446744073709551615}", 422, "breaks a rule"),
    ] {
        let answer = put(dir.path(), "/v1/device/requested-size", body);
        let detail = answer.problem(status);
        assert!(detail.contains(said), "{body}: {detail}");
    }
    assert_eq!(fake.calls.load(Ordering::Relaxed), 0);
    assert_eq!(*fake.device.lock(), device());
}

#[test]
fn bytes_that_are_no_text() {
    let (_server, dir) = Fake::new().serve();
    let body = b"{\"requested_size\": \"\xff\"}";
    send(dir.path(), "PUT", "/v1/device/requested-size", "", body).problem(400);
}

#[test]
fn migration_that_is_neither_on_nor_off() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    for (body, status, said) in [
        ("", 400, "empty"),
        ("{}", 422, "missing field `active`"),
        ("{\"active\": 1}", 422, "true or false"),
        ("{\"active\": \"true\"}", 422, "true or false"),
        ("{\"active\": null}", 422, "true or false"),
        ("{\"active\": true, \"x\": 1}", 422, "unknown field `x`"),
        ("[true]", 422, "object"),
    ] {
        let detail = put(dir.path(), "/v1/migration", body).problem(status);
        assert!(detail.contains(said), "{body}: {detail}");
    }
    assert_eq!(fake.calls.load(Ordering::Relaxed), 0);
}

#[test]
fn log_levels_that_are_none() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    for (body, status, said) in [
        ("", 400, "empty"),
        ("{}", 422, "missing field `level`"),
        ("{\"level\": 3}", 422, "string"),
        ("{\"level\": \"debug\", \"x\": 1}", 422, "unknown field `x`"),
        ("{\"level\": \"inof\"}", 422, "\"inof\" is not"),
    ] {
        let detail = put(dir.path(), "/v1/log-level", body).problem(status);
        assert!(detail.contains(said), "{body}: {detail}");
    }
    assert_eq!(fake.calls.load(Ordering::Relaxed), 0);
}

#[test]
fn a_reset_with_something_to_say() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let post = |body: &[u8]| send(dir.path(), "POST", "/v1/device/system-reset", "", body);
    assert!(post(br#"{"force": true}"#).problem(422).contains("`force`"));
    post(b"[]").problem(422);
    post(b"x").problem(400);
    assert_eq!(fake.calls.load(Ordering::Relaxed), 0);
}

#[test]
fn what_there_is_not() {
    let (_server, dir) = Fake::new().serve();
    for resource in
        ["/page", "/v1", "/v1/device/", "/v2/device", "/v1/device/blocks/0", "//v1/device"]
    {
        assert!(get(dir.path(), resource).problem(404).contains(resource));
    }
}

#[test]
fn methods_that_do_not_fit() {
    let (_server, dir) = Fake::new().serve();
    for (method, resource, allowed) in [
        ("POST", "/v1/device", "GET,HEAD"),
        ("GET", "/v1/device/requested-size", "PUT"),
        ("DELETE", "/v1/device/blocks", "GET,HEAD"),
        ("GET", "/v1/device/system-reset", "POST"),
        ("PATCH", "/v1/migration", "PUT"),
        ("GET", "/v1/log-level", "PUT"),
        ("PUT", "/v1/events", "GET,HEAD"),
        ("OPTIONS", "/metrics", "GET,HEAD"),
        ("BREW", "/openapi.json", "GET,HEAD"),
    ] {
        let answer = send(dir.path(), method, resource, "", b"");
        assert!(answer.problem(405).contains(method));
        assert_eq!(answer.header("allow"), Some(allowed), "{resource}");
    }
}

#[test]
fn content_of_another_type() {
    let (_server, dir) = Fake::new().serve();
    let body = br#"{"requested_size": 0}"#;
    for content_type in ["text/plain", "multipart/form-data", "application/jsonx", ""] {
        let headers = format!("Content-Type: {content_type}\r\n");
        let answer = send(dir.path(), "PUT", "/v1/device/requested-size", &headers, body);
        assert!(answer.problem(415).contains("application/json"));
    }
}

#[test]
fn bodies_that_are_too_large() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let resource = "/v1/device/requested-size";
    let padded = |size: usize| {
        let body = json!({ "requested_size": 0 }).to_string();
        let padding = " ".repeat(size - body.len());
        body + &padding
    };
    assert_eq!(put(dir.path(), resource, &padded(LIMIT)).status, 200);
    put(dir.path(), resource, &padded(LIMIT + 1)).problem(413);
    let chunk = format!("8000\r\n{}\r\n", " ".repeat(0x8000));
    let head = format!("PUT {resource} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
    let endless = [head.as_bytes(), chunk.repeat(4).as_bytes()].concat();
    raw(dir.path(), &endless).problem(413);
    let announced =
        format!("PUT {resource} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", u64::MAX);
    assert!(raw(dir.path(), announced.as_bytes()).status >= 400);
    assert_eq!(fake.calls.load(Ordering::Relaxed), 1);
}
