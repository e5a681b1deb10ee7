//! What the management API and `vmemctl` show of the region, while a guest uses it.

mod common;

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::{BLOCK, REGION, gpa};
use serde_json::{Value, json};
use small_vmm::daemon::Daemon;
use small_vmm::driver::ResponseType;
use small_vmm::process::find_program;

fn resident(daemon: &Daemon) -> Value {
    let answer = daemon.api().get("/v1/device/resident").unwrap();
    assert_eq!(answer.status, 200);
    answer.json()["resident"].clone()
}

fn range(first: u64, end: u64) -> Value {
    json!({ "offset": first * BLOCK, "size": (end - first) * BLOCK })
}

fn vmemctl_blocks(daemon: &Daemon, options: &[&str]) -> String {
    let vmemctl = find_program(env!("CARGO_BIN_EXE_vhost-user-mem").as_ref(), "vmemctl").unwrap();
    let output = Command::new(vmemctl)
        .arg("--api-socket")
        .arg(daemon.api_socket())
        .arg("blocks")
        .args(options)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_map_shows_what_is_plugged_resident_and_discarded() {
    let mut rig = common::rig();
    assert_eq!(resident(&rig.daemon), json!([]));
    assert_eq!(rig.plug(0, 6), ResponseType::Ack);
    assert_eq!(rig.plug(100, 2), ResponseType::Ack);
    assert_eq!(resident(&rig.daemon), json!([]), "a plugged block costs nothing until it is used");
    rig.stamp(1, 3);
    // A single byte is enough of a block.
    rig.ram.write(gpa(5) + BLOCK / 2, &[1]).unwrap();
    rig.ram.write(gpa(102) - 1, &[1]).unwrap();
    let before = rig.resident(0, REGION / BLOCK);
    let expected = json!([range(1, 3), range(5, 6), range(101, 102)]);
    assert_eq!(resident(&rig.daemon), expected);
    let map = vmemctl_blocks(&rig.daemon, &[]);
    let lines: Vec<&str> = map.lines().collect();
    assert_eq!(lines[0], format!("{:#018x}  +##++#{}", gpa(0), ".".repeat(26)));
    assert_eq!(lines[3], format!("{:#018x}  ....+#{}", gpa(96), ".".repeat(26)));
    let json: Value = serde_json::from_str(&vmemctl_blocks(&rig.daemon, &["--json"])).unwrap();
    assert_eq!(json["plugged"], json!([range(0, 6), range(100, 102)]));
    assert_eq!(json["resident"], expected);
    assert_eq!(rig.resident(0, REGION / BLOCK), before, "looking takes no memory");

    assert_eq!(rig.unplug(1, 1), ResponseType::Ack);
    assert_eq!(resident(&rig.daemon)[0], range(2, 3));
    rig.reconnect();
    assert_eq!(resident(&rig.daemon)[0], range(2, 3));
    rig.frontend.disconnect();
    let deadline = Instant::now() + common::PATIENCE;
    while !resident(&rig.daemon).is_null() {
        assert!(Instant::now() < deadline, "memory is not unmapped");
        thread::sleep(Duration::from_millis(2));
    }
    assert!(vmemctl_blocks(&rig.daemon, &[]).contains("resident   unknown (not mapped)\n"));
}
