//! Clients of a daemon's discard channel.

use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use ram_discard::{MemoryState, RamDiscardManager, Section};
use small_vmm::daemon::Daemon;
use virtio_mem::discard_channel::{AttachError, RemoteRamDiscardManager, wire};

use super::{BLOCK, PATIENCE, REGION, Rig, options, ram, rig_with};

pub fn channel_rig() -> Rig {
    rig_with(options().discard_socket(), ram())
}

pub fn attach(daemon: &Daemon) -> RemoteRamDiscardManager {
    attach_at(&daemon.discard_socket())
}

pub fn attach_at(socket: &Path) -> RemoteRamDiscardManager {
    let start = Instant::now();
    loop {
        let stream = UnixStream::connect(socket).unwrap();
        match RemoteRamDiscardManager::attach(stream, PATIENCE) {
            Ok(manager) => return manager,
            // Clients that have left keep their place until the change under way has ended.
            Err(AttachError::Refused { cause: wire::Farewell::TooMany, .. })
                if start.elapsed() < PATIENCE => {}
            Err(error) => panic!("{error}"),
        }
    }
}

pub fn section(first: u64, end: u64) -> Section {
    Section::from_bounds(first * BLOCK, end * BLOCK).unwrap()
}

pub fn all() -> Section {
    Section::new(0, REGION).unwrap()
}

pub fn replay(manager: &RemoteRamDiscardManager, state: MemoryState) -> Vec<Section> {
    let mut ranges = Vec::new();
    let mut collect = |range| {
        ranges.push(range);
        ControlFlow::Continue(())
    };
    let replayed = match state {
        MemoryState::Populated => manager.replay_populated(all(), &mut collect),
        MemoryState::Discarded => manager.replay_discarded(all(), &mut collect),
    };
    assert!(replayed.unwrap().is_continue());
    ranges
}

/// What the management API calls plugged, or discarded.
pub fn blocks(daemon: &Daemon, state: MemoryState) -> Vec<Section> {
    let blocks = daemon.api().get("/v1/device/blocks").unwrap().json();
    let name = match state {
        MemoryState::Populated => "plugged",
        MemoryState::Discarded => "discarded",
    };
    let ranges = blocks[name].as_array().unwrap();
    let number = |range: &serde_json::Value, name: &str| range[name].as_u64().unwrap();
    let range = |range| Section::new(number(range, "offset"), number(range, "size")).unwrap();
    ranges.iter().map(range).collect()
}

pub fn wait_logged(daemon: &Daemon, text: &str) {
    assert!(daemon.wait_logged(text, PATIENCE), "not logged: {text}\n{}", daemon.stderr());
}
