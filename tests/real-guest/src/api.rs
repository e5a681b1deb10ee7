//! The daemon's management API: HTTP/1.1 over a Unix socket, one connection per request.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Where the API is served.
pub struct Api {
    socket: PathBuf,
}

/// `GET /v1/device`, what the run needs of it.
#[derive(Debug, Clone, Deserialize)]
pub struct Device {
    /// First guest-physical address of the region.
    pub addr: u64,
    /// Size of the region.
    pub region_size: u64,
    /// Size of a block.
    pub block_size: u64,
    /// NUMA node, if one was given.
    pub node_id: Option<u16>,
    /// What the guest has.
    pub plugged_size: u64,
    /// What the guest should have.
    pub requested_size: u64,
    /// What the host really holds; null when no front-end is there.
    pub resident_size: Option<u64>,
    /// Whether a front-end is there.
    pub connected: bool,
    /// Whether block state is frozen.
    pub migration_active: bool,
    /// How the guest is doing with what is requested.
    pub resize: Resize,
}

/// How the guest is doing with what is requested.
#[derive(Debug, Clone, Deserialize)]
pub struct Resize {
    /// `done`, `waiting`, `progressing` or `stalled`.
    pub state: String,
    /// Bytes to plug or to unplug.
    pub remaining_size: u64,
    /// Since when nothing has moved.
    pub since: Option<String>,
    /// Why it stands still.
    pub reason: Option<Reason>,
}

/// Why a guest stands still.
#[derive(Debug, Clone, Deserialize)]
pub struct Reason {
    /// For programs.
    pub kind: String,
    /// For people.
    pub text: String,
}

/// `GET /v1/device/blocks`.
#[derive(Debug, Deserialize)]
pub struct Blocks {
    /// Ranges that the guest may use.
    pub plugged: Vec<Range>,
    /// Ranges that hold nothing.
    pub discarded: Vec<Range>,
}

/// Bytes from the start of the region.
#[derive(Debug, Deserialize)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub size: u64,
}

impl Api {
    /// The API behind `socket`.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Where it is served.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Sizes and state.
    pub fn device(&self) -> Result<Device> {
        self.get("/v1/device")
    }

    /// The block map.
    pub fn blocks(&self) -> Result<Blocks> {
        self.get("/v1/device/blocks")
    }

    /// Asks the guest to have `size` bytes.
    pub fn resize(&self, size: u64) -> Result<()> {
        self.put("/v1/device/requested-size", &json!({ "requested_size": size }))
    }

    /// Freezes or thaws block state.
    pub fn migration(&self, active: bool) -> Result<()> {
        self.put("/v1/migration", &json!({ "active": active }))
    }

    /// How many requests were answered so far whose labels hold all of `words`.
    pub fn requests(&self, words: &[&str]) -> Result<u64> {
        Ok(count(&self.call("GET", "/metrics", None)?, words))
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let body = self.call("GET", path, None)?;
        serde_json::from_str(&body).with_context(|| format!("GET {path} gave {body}"))
    }

    fn put(&self, path: &str, value: &Value) -> Result<()> {
        self.call("PUT", path, Some(value)).map(drop)
    }

    fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<String> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let mut stream = UnixStream::connect(&self.socket).context("the daemon's API is gone")?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let length = body.len();
        stream.write_all(
            format!(
                "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
                 content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
            )
            .as_bytes(),
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).with_context(|| format!("{method} {path}"))?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        let status = head.split_whitespace().nth(1).unwrap_or_default();
        ensure!(status.starts_with('2'), "{method} {path} answered {status}: {body}");
        Ok(body.to_owned())
    }
}

/// Sums the request counters of an OpenMetrics text whose labels hold all of `words`.
fn count(metrics: &str, words: &[&str]) -> u64 {
    metrics
        .lines()
        .filter_map(|line| line.rsplit_once(' '))
        .map(|(series, value)| (series.to_lowercase().replace('-', "_"), value))
        .filter(|(series, _)| series.contains("requests_total{"))
        .filter(|(series, _)| words.iter().all(|word| series.contains(&format!("=\"{word}\""))))
        .filter_map(|(_, value)| value.parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn counters_are_found_by_their_labels() {
        let text = "# TYPE x counter\n\
                    a_requests_total{type=\"plug\",response=\"busy\"} 3\n\
                    a_requests_total{type=\"unplug\",response=\"busy\"} 2\n\
                    a_requests_total{type=\"unplug\",response=\"ack\"} 9\n";
        assert_eq!(count(text, &["busy"]), 5);
        assert_eq!(count(text, &["plug", "busy"]), 3);
    }
}
