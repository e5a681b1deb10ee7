//! Requests to the management API with any body and any content type, over its socket.
//!
//! What is promised: an answer to every request; 200 only for a body that means something and
//! with the change made; a problem of RFC 9457 with nothing changed for every other; the next good
//! request works.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use serde_json::{Map, Value};
use tempfile::TempDir;
use vhost_user_mem::front_door::Notifier;
use vhost_user_mem::management::{Management, Server};
use vhost_user_mem::service::Service;
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{Geometry, VirtioMem};

use crate::input::Input;

const BLOCK: u64 = 2 << 20;
const REGION: u64 = 1 << 30;
const PATIENCE: Duration = Duration::from_secs(20);

/// A device with its API, which serves all inputs.
struct Api {
    service: Arc<Service>,
    socket: PathBuf,
    _server: Server,
    _dir: TempDir,
}

static API: LazyLock<Api> = LazyLock::new(|| {
    let geometry = Geometry::new(1 << 32, REGION, BLOCK, None).unwrap();
    let controller =
        MemController::new(InitialState::volatile(VirtioMem::new(geometry, 0).unwrap()));
    let notifier = Arc::new(Notifier::new().unwrap());
    let service = Service::new(Arc::new(controller), notifier).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api");
    let server = Server::bind(&socket, Arc::clone(&service) as Arc<_>).unwrap();
    server.start().unwrap();
    Api { service, socket, _server: server, _dir: dir }
});

struct Answer {
    status: u16,
    content_type: String,
    body: Vec<u8>,
}

impl Api {
    fn send(&self, head: &str, body: &[u8]) -> Answer {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // The server may answer and close before it has everything.
        let _ = stream.write_all(&[head.as_bytes(), body].concat());
        let mut bytes = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            match stream.read(&mut chunk) {
                Ok(0) => break,
                Ok(read) => bytes.extend(&chunk[..read]),
                // The fuzzer's timer.
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    panic!("no answer within {PATIENCE:?}")
                }
                Err(_) => break,
            }
        }
        let end = bytes.windows(4).position(|at| at == b"\r\n\r\n").expect("no answer");
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
        let header = |name: &str| {
            head.lines().find_map(|line| {
                let (key, value) = line.split_once(": ")?;
                key.eq_ignore_ascii_case(name).then(|| value.to_owned())
            })
        };
        Answer {
            status: head.split(' ').nth(1).unwrap().parse().unwrap(),
            content_type: header("content-type").unwrap_or_default(),
            body: bytes[end + 4..].to_vec(),
        }
    }

    /// What a resource may change.
    fn state(&self) -> (u64, bool) {
        let device = self.service.device();
        (device.requested_size, device.migration_active)
    }
}

fn head(method: &str, resource: &str, content_type: Option<&str>, len: usize) -> String {
    let content_type =
        content_type.map_or(String::new(), |value| format!("Content-Type: {value}\r\n"));
    format!(
        "{method} {resource} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{content_type}\
         Content-Length: {len}\r\n\r\n"
    )
}

/// What a good body sets, and nothing else: an object with this one field.
fn only_field(body: &[u8], name: &str) -> Option<Value> {
    let mut fields: Map<String, Value> = serde_json::from_slice(body).ok()?;
    if fields.len() != 1 { None } else { fields.remove(name) }
}

/// Sends one request, with the state set beforehand, and checks the answer.
fn exchange(api: &Api, migration: bool, content_type: Option<&str>, body: &[u8]) {
    Management::resize(&*api.service, BLOCK).unwrap_or_else(|refusal| panic!("{refusal:?}"));
    api.service.set_migration(false).unwrap_or_else(|refusal| panic!("{refusal:?}"));
    let before = api.state();
    let resource = if migration { "/v1/migration" } else { "/v1/device/requested-size" };
    let answer = api.send(&head("PUT", resource, content_type, body.len()), body);
    let after = api.state();
    let json: Map<String, Value> = serde_json::from_slice(&answer.body).expect("not an object");
    let field = if migration { "active" } else { "requested_size" };
    let asked = only_field(body, field);
    let expected = match &asked {
        Some(Value::Bool(active)) if migration => Some((before.0, *active)),
        Some(Value::Number(size)) if !migration => size
            .as_u64()
            .filter(|size| size.is_multiple_of(BLOCK) && *size <= REGION)
            .map(|size| (size, before.1)),
        _ => None,
    };
    if answer.status == 200 {
        assert_eq!(Some(after), expected, "accepted");
        assert_eq!(json["requested_size"], after.0);
        assert_eq!(json["migration_active"], after.1);
        return;
    }
    assert_eq!(after, before, "refused with {}, but changed", answer.status);
    assert!(matches!(answer.status, 400 | 413 | 415 | 422), "{}", answer.status);
    assert_eq!(answer.content_type, "application/problem+json");
    assert_eq!(json["status"], answer.status);
    for text in ["type", "title", "detail"] {
        assert!(json[text].as_str().is_some_and(|text| !text.is_empty()), "{text}");
    }
    // A field that is there twice is refused although a map shows it once.
    let known = content_type.is_none_or(|value| value == "application/json");
    let once = body.windows(field.len()).filter(|at| *at == field.as_bytes()).count() == 1;
    assert!(expected.is_none() || !known || !once, "a good request was refused");
}

/// Sends one request about the log, which this process has not: what means something fails, and
/// everything else is refused.
fn exchange_level(api: &Api, content_type: Option<&str>, body: &[u8]) {
    let before = api.state();
    let answer = api.send(&head("PUT", "/v1/log-level", content_type, body.len()), body);
    assert_eq!(api.state(), before);
    let json: Map<String, Value> = serde_json::from_slice(&answer.body).expect("not an object");
    assert_eq!(answer.content_type, "application/problem+json");
    assert_eq!(json["status"], answer.status);
    match answer.status {
        500 => {
            let level = only_field(body, "level").expect("an object with one field");
            let list = level.as_str().expect("a text").to_lowercase();
            let levels = ["off", "error", "warn", "info", "debug", "trace"];
            let is_level = |item: &str| levels.contains(&item.rsplit('=').next().unwrap_or(""));
            assert!(list.split(',').all(is_level), "{list}");
        }
        status => assert!(matches!(status, 400 | 413 | 415 | 422), "{status}"),
    }
}

/// Runs one input.
pub fn run(data: &[u8]) {
    let api = &*API;
    let mut input = Input::new(data);
    let choice = input.u8();
    let made_up;
    let content_type = match choice >> 1 & 7 {
        0 => None,
        1 => Some("application/x-www-form-urlencoded"),
        2 | 3 => {
            let len = usize::from(input.u8() % 64);
            // What would end the line is a matter of HTTP, which is hyper's.
            let bytes = input.bytes(len).iter().map(|&byte| byte.clamp(0x20, 0x7e));
            made_up = bytes.map(char::from).collect::<String>();
            Some(made_up.as_str())
        }
        _ => Some("application/json"),
    };
    let body = input.rest();
    if choice & 0x80 == 0 {
        exchange(api, choice & 1 == 1, content_type, body);
    } else {
        exchange_level(api, content_type, body);
    }
    exchange(api, false, Some("application/json"), b"{\"requested_size\": 4194304}");
    assert_eq!(api.state().0, 2 * BLOCK);
}
