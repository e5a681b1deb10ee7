//! What every resource answers when asked well.

use std::sync::atomic::Ordering;

use management_api::{Range, Resident};
use serde_json::{Value, json};

use super::http::{get, put, send};
use super::{Fake, device};

#[test]
fn the_device() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let answer = get(dir.path(), "/v1/device");
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!(
        answer.json(),
        json!({
            "addr": 4u64 << 30, "region_size": 1 << 30, "block_size": 2 << 20, "node_id": null,
            "usable_region_size": 256 << 20, "plugged_size": 0, "requested_size": 0,
            "connected": false, "migration_active": false, "resident_size": null, "resize": null,
        })
    );
    *fake.device.lock() = management_api::DeviceInfo {
        node_id: Some(u16::MAX),
        resident_size: Some(4096),
        ..device()
    };
    let device = get(dir.path(), "/v1/device").json();
    assert_eq!((&device["node_id"], &device["resident_size"]), (&json!(65535), &json!(4096)));
}

#[test]
fn resize() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let body = br#" { "requested_size": 2097152 } "#;
    for headers in [
        "",
        "Content-Type: application/json\r\n",
        "Content-Type: application/x-www-form-urlencoded\r\n",
        "content-type: Application/JSON; charset=utf-8\r\n",
    ] {
        let answer = send(dir.path(), "PUT", "/v1/device/requested-size", headers, body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert_eq!(answer.json()["requested_size"], 2 << 20);
    }
    assert_eq!(fake.calls.load(Ordering::Relaxed), 4);
}

#[test]
fn blocks() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let whole = json!([{ "offset": 0, "size": 1 << 30 }]);
    let blocks = get(dir.path(), "/v1/device/blocks").json();
    assert_eq!(blocks, json!({ "plugged": [], "discarded": whole }));
    fake.plug(1 << 30);
    let blocks = get(dir.path(), "/v1/device/blocks").json();
    assert_eq!(blocks, json!({ "plugged": whole, "discarded": [] }));
}

#[test]
fn resident() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let get = || get(dir.path(), "/v1/device/resident").json();
    assert_eq!(get(), json!({ "resident": null }));
    *fake.resident.lock() = Resident { resident: Some(Vec::new()) };
    assert_eq!(get(), json!({ "resident": [] }));
    let range = Range { offset: 2 << 20, size: 4 << 20 };
    *fake.resident.lock() = Resident { resident: Some(vec![range]) };
    assert_eq!(get(), json!({ "resident": [{ "offset": 2 << 20, "size": 4 << 20 }] }));
}

#[test]
fn system_reset() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    for body in ["", "{}"] {
        fake.plug(4 << 20);
        let headers = "Content-Type: application/json\r\n";
        let answer = send(dir.path(), "POST", "/v1/device/system-reset", headers, body.as_bytes());
        assert_eq!(answer.status, 200);
        assert_eq!(answer.json()["plugged_size"], 0);
    }
}

#[test]
fn migration() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    for active in [true, false] {
        let answer = put(dir.path(), "/v1/migration", &json!({ "active": active }).to_string());
        assert_eq!(answer.status, 200);
        assert_eq!(answer.json()["migration_active"], active);
    }
}

#[test]
fn log_level() {
    let fake = Fake::new();
    let (_server, dir) = fake.serve();
    let answer = put(dir.path(), "/v1/log-level", r#"{"level": "debug"}"#);
    assert_eq!((answer.status, answer.json()), (200, json!({ "level": "debug" })));
    assert_eq!(fake.calls.load(Ordering::Relaxed), 1);
}

#[test]
fn metrics() {
    let (_server, dir) = Fake::new().serve();
    let answer = get(dir.path(), "/metrics");
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    assert_eq!(answer.header("content-type"), Some(content_type));
    assert_eq!((answer.status, answer.body.as_str()), (200, "# EOF\n"));
}

#[test]
fn the_page_is_whole_and_runs_nothing_but_itself() {
    let (_server, dir) = Fake::new().serve();
    let page = get(dir.path(), "/");
    assert_eq!(page.status, 200);
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    assert_eq!(page.header("cache-control"), Some("no-store"));
    assert_eq!(page.header("referrer-policy"), Some("no-referrer"));
    let policy = page.header("content-security-policy").unwrap();
    let (_, nonce) = policy.split_once("script-src 'nonce-").unwrap();
    let (nonce, _) = nonce.split_once('\'').unwrap();
    assert!(nonce.len() == 32 && nonce.bytes().all(|byte| byte.is_ascii_hexdigit()), "{policy}");
    for rule in ["default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"] {
        assert!(policy.split("; ").any(|found| found == rule), "{policy}");
    }
    for forbidden in ["unsafe-", "http:", "https:", "*"] {
        assert!(!policy.contains(forbidden), "{policy}");
    }
    // Style and script are in it and carry the nonce; nothing comes from elsewhere.
    assert_eq!(page.body.matches(&format!("nonce=\"{nonce}\">")).count(), 2);
    assert!(!page.body.contains("{{"), "a part is missing");
    for needed in ["--resident:", "class RegionMap", "</html>"] {
        assert!(page.body.contains(needed), "{needed}");
    }
    for elsewhere in [" src=", "url(", "@import", "import ", " style=", " onclick="] {
        assert!(!page.body.contains(elsewhere), "{elsewhere}");
    }
    let again = get(dir.path(), "/");
    assert!(!again.body.contains(nonce), "the nonce is used twice");
}

#[test]
fn the_document_describes_every_resource() {
    let (_server, dir) = Fake::new().serve();
    let document = get(dir.path(), "/openapi.json").json();
    assert!(document["openapi"].as_str().unwrap().starts_with("3."));
    for (path, method, refused) in [
        ("/", "get", false),
        ("/v1/device", "get", false),
        ("/v1/device/requested-size", "put", true),
        ("/v1/device/blocks", "get", false),
        ("/v1/device/resident", "get", false),
        ("/v1/device/system-reset", "post", true),
        ("/v1/device/sweep", "post", true),
        ("/v1/migration", "put", true),
        ("/v1/log-level", "put", true),
        ("/v1/events", "get", false),
        ("/metrics", "get", false),
        ("/openapi.json", "get", false),
    ] {
        let responses = &document["paths"][path][method]["responses"];
        assert!(responses["200"].is_object(), "{path}");
        assert_eq!(responses["422"].is_object(), refused, "{path}");
    }
    assert_eq!(document["paths"].as_object().unwrap().len(), 12);
    let problem = &document["components"]["schemas"]["Problem"];
    assert_eq!(problem["required"], json!(["type", "title", "status", "detail"]));
    let device = &document["components"]["schemas"]["DeviceInfo"];
    assert_eq!(device["required"].as_array().unwrap().len(), 11);
    check_references(&document, &document);
}

fn check_references(document: &Value, value: &Value) {
    match value {
        Value::Object(fields) => {
            if let Some(Value::String(reference)) = fields.get("$ref") {
                let pointer = reference.strip_prefix('#').unwrap();
                assert!(document.pointer(pointer).is_some(), "{reference}");
            }
            fields.values().for_each(|value| check_references(document, value));
        }
        Value::Array(items) => items.iter().for_each(|item| check_references(document, item)),
        _ => {}
    }
}
