//! Clients of the management API: too many requests, nothing that is read, nothing that is right.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::soak::random::Random;
use crate::soak::world::World;

const TARGETS: [&str; 4] = ["/v1/device", "/v1/device/blocks", "/metrics", "/openapi.json"];

/// Many requests in a row, each of which is answered.
pub(super) fn flood(world: &World, random: &mut Random) {
    let requests = 1 + random.below(120);
    let target = random.pick(&TARGETS);
    world.journal.did("API floods", format_args!("{requests} x GET {target}"));
    for _ in 0..requests {
        let host = world.host();
        let Some(answer) = host.ask(&world.journal, |api| api.get(target)) else { return };
        if !answer.is_success() && answer.status != 503 {
            let detail = format!("GET {target}: {} {}", answer.status, answer.text);
            world.journal.violated("the API answers", detail);
        }
    }
    world.journal.count("API requests of floods", requests);
}

/// Connections that ask and never read.
pub(super) fn unread(world: &World, random: &mut Random) {
    let targets = ["/v1/device/blocks", "/v1/events", "/metrics", "/v1/device"];
    let request = format!("GET {} HTTP/1.1\r\nHost: a\r\n\r\n", random.pick(&targets));
    let repeated = request.repeat(1 + random.below(40) as usize);
    let path = world.host().api_socket();
    let clients = 1 + random.below(16);
    let mut streams = Vec::new();
    for _ in 0..clients {
        let Ok(mut stream) = UnixStream::connect(&path) else { break };
        let _ = stream.set_write_timeout(Some(Duration::from_millis(100)));
        // Fails where the daemon reads no more, too.
        let _ = stream.write_all(repeated.as_bytes());
        streams.push(stream);
    }
    world.journal.did("API clients that never read", clients);
    let time = random.millis(50, 2500);
    world.journal.sleep(time);
}

/// Bytes that are no request, or half of one.
pub(super) fn garbage(world: &World, random: &mut Random) {
    let Ok(mut stream) = UnixStream::connect(world.host().api_socket()) else { return };
    let _ = stream.set_write_timeout(Some(Duration::from_millis(100)));
    let mut bytes =
        b"PUT /v1/device/requested-size HTTP/1.1\r\nHost: a\r\nContent-Length: 30\r\n\r\n{"
            .to_vec();
    if random.percent(50) {
        bytes.truncate(random.below(bytes.len() as u64) as usize);
    } else {
        for _ in 0..1 + random.below(8) {
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] = random.next() as u8;
        }
    }
    let _ = stream.write_all(&bytes);
    world.journal.did("API clients that send half a request", bytes.len());
    let time = random.millis(0, 500);
    world.journal.sleep(time);
}
