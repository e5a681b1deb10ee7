//! Plain HTTP, so that requests can be as wrong as they like.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) head: String,
    pub(super) body: String,
}

impl Answer {
    pub(super) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then_some(value)
        })
    }

    /// Checks that it is a problem of this status; its detail.
    pub(super) fn problem(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{}", self.body);
        assert_eq!(self.header("content-type"), Some("application/problem+json"));
        let problem = self.json();
        assert_eq!(problem["type"], "about:blank");
        assert_eq!(problem["status"], status);
        assert!(!problem["title"].as_str().unwrap().is_empty());
        assert_eq!(problem.as_object().unwrap().len(), 4, "{problem}");
        problem["detail"].as_str().unwrap().to_owned()
    }
}

pub(super) fn connect(dir: &Path) -> UnixStream {
    let stream = UnixStream::connect(dir.join("api")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// Sends bytes and reads until the server closes.
pub(super) fn raw(dir: &Path, bytes: &[u8]) -> Answer {
    let mut stream = connect(dir);
    // The server may answer and close before it has everything.
    let _ = stream.write_all(bytes);
    let mut text = Vec::new();
    let _ = stream.read_to_end(&mut text);
    let text = String::from_utf8(text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    Answer { status, head: head.to_owned(), body: body.to_owned() }
}

pub(super) fn send(dir: &Path, method: &str, resource: &str, headers: &str, body: &[u8]) -> Answer {
    let head = format!(
        "{method} {resource} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    raw(dir, &[head.as_bytes(), body].concat())
}

pub(super) fn get(dir: &Path, resource: &str) -> Answer {
    send(dir, "GET", resource, "", b"")
}

pub(super) fn put(dir: &Path, resource: &str, body: &str) -> Answer {
    send(dir, "PUT", resource, "Content-Type: application/json\r\n", body.as_bytes())
}
