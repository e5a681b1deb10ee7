//! Lists of ranges: as long as the guest makes them, and read by clients that take their time.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use management_api::Blocks;
use tempfile::TempDir;
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{Geometry, VirtioMem};

use super::http::{connect, get};
use crate::front_door::Notifier;
use crate::management::{Management, Server};
use crate::service::Service;

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 1 << 18;
const REQUEST: &[u8] = b"GET /v1/device/blocks HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
/// More than one list of the region below takes on the wire.
const MUCH: u64 = 8 << 20;

/// A device of which every second block is plugged: there can be no more ranges.
fn in_tatters() -> (Arc<Service>, Server, TempDir) {
    let geometry = Geometry::new(1 << 40, BLOCKS * BLOCK, BLOCK, None).unwrap();
    let device = VirtioMem::new(geometry, BLOCKS * BLOCK).unwrap();
    let controller = Arc::new(MemController::new(InitialState::volatile(device)));
    let mut state = controller.save_state();
    state.plugged.fill(0x5555_5555_5555_5555);
    controller.load_state(state).unwrap();
    let service = Service::new(controller, Arc::new(Notifier::new().unwrap())).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let server = Server::bind(dir.path().join("api"), Arc::clone(&service) as Arc<_>).unwrap();
    server.start().unwrap();
    (service, server, dir)
}

/// Bytes of this process's memory that are resident.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// Clients that ask for all blocks and do not read, until as many are there as there may be.
fn stalled(dir: &TempDir) -> Vec<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut clients = Vec::new();
    loop {
        let mut client = connect(dir.path());
        client.write_all(REQUEST).unwrap();
        client.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let mut head = [0; 64];
        // Those that wait for a place hear nothing yet.
        let read = client.read(&mut head).unwrap_or(0);
        if head[..read].starts_with(b"HTTP/1.1 503") {
            return clients;
        }
        clients.push(client);
        assert!(Instant::now() < deadline, "{} clients", clients.len());
    }
}

#[test]
fn clients_that_do_not_read_their_lists_cost_little_and_are_in_the_way_of_nothing_else() {
    let (_service, _server, dir) = in_tatters();
    let before = resident();
    let clients = stalled(&dir);
    assert_eq!(clients.len(), 16);
    let grown = resident().saturating_sub(before);
    // Other tests run in this process, too; all lists as they were would be four times as much.
    assert!(grown < 16 * MUCH, "{grown} bytes");
    let detail = get(dir.path(), "/v1/device/blocks").problem(503);
    assert!(detail.contains("16 clients"), "{detail}");
    get(dir.path(), "/v1/device/resident").problem(503);
    assert_eq!(get(dir.path(), "/v1/device").json()["plugged_size"], BLOCKS / 2 * BLOCK);
    assert_eq!(get(dir.path(), "/metrics").status, 200);
    assert!(get(dir.path(), "/openapi.json").json()["openapi"].is_string());
    drop(clients);
    let deadline = Instant::now() + Duration::from_secs(20);
    while get(dir.path(), "/v1/device/resident").status != 200 {
        assert!(Instant::now() < deadline, "places are not given back");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Far more than all buffers on the way hold, so that most of it is made after the change.
#[test]
fn both_lists_are_of_one_moment_though_blocks_change_while_they_are_read() {
    let (service, _server, dir) = in_tatters();
    let mut client = connect(dir.path());
    client.write_all(REQUEST).unwrap();
    let mut text = vec![0; 4096];
    client.read_exact(&mut text).unwrap();
    service.system_reset().unwrap();
    client.read_to_end(&mut text).unwrap();
    assert!(text.len() as u64 > MUCH);
    let text = String::from_utf8(text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let length = format!("content-length: {}", body.len());
    assert!(head.lines().any(|line| line == length), "{head}");
    let blocks: Blocks = serde_json::from_str(body).unwrap();
    for (first, ranges) in [(0, &blocks.plugged), (1, &blocks.discarded)] {
        assert_eq!(ranges.len() as u64, BLOCKS / 2);
        for (range, block) in ranges.iter().zip((first..).step_by(2)) {
            assert_eq!((range.offset, range.size), (block * BLOCK, BLOCK));
        }
    }
    let now = get(dir.path(), "/v1/device").json();
    assert_eq!(now["plugged_size"], 0);
}

/// As socat and `nc -N` do: what is asked for is done, and told.
#[test]
fn a_client_that_ends_its_requests_gets_its_answers() {
    let (_service, _server, dir) = in_tatters();
    for round in 0..20 {
        let size = round * 16 * BLOCK;
        let body = format!("{{\"requested_size\": {size}}}");
        let put = format!(
            "PUT /v1/device/requested-size HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        for request in [put.as_str(), "GET /v1/device HTTP/1.1\r\nHost: x\r\n\r\n"] {
            let answer = half_closing(&dir, request);
            assert!(answer.starts_with("HTTP/1.1 200"), "round {round}: {answer:?}");
            assert!(answer.contains(&format!("\"requested_size\":{size},")), "{answer}");
        }
    }
    let answer = half_closing(&dir, "GET /v1/device/blocks HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(answer.len() as u64 > MUCH && answer.ends_with("}]}"));
}

fn half_closing(dir: &TempDir, request: &str) -> String {
    let mut client = connect(dir.path());
    client.write_all(request.as_bytes()).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    answer
}
