//! A guest that writes memory that it has not plugged: seen, and swept.

mod common;

use std::time::Instant;

use common::{BLOCK, PATIENCE, Rig, options, ram, rig, rig_with};
use serde_json::json;
use small_vmm::driver::ResponseType;

/// A guest with two blocks that it may use, and stamps in as many that it may not.
fn astray(mut rig: Rig) -> Rig {
    assert_eq!(rig.plug(0, 2), ResponseType::Ack);
    rig.stamp(0, 4);
    assert_eq!(rig.resident(0, 8), 4 * BLOCK);
    rig
}

#[test]
fn a_sweep_takes_what_is_stray_tells_of_it_and_leaves_what_is_plugged() {
    let rig = astray(rig());
    let api = rig.daemon.api();
    let mut events = api.events().unwrap();
    let swept = api.post("/v1/device/sweep").unwrap();
    assert_eq!((swept.status, swept.json()), (200, json!({ "swept_size": 2 * BLOCK })));
    assert_eq!((rig.resident(0, 2), rig.resident(2, 8)), (2 * BLOCK, 0));
    rig.assert_stamped(0, 2);
    let told = loop {
        let event = events.next(PATIENCE).unwrap().unwrap();
        if event.name == "stray" {
            break event.json();
        }
    };
    assert_eq!(told, json!({ "swept_size": 2 * BLOCK }));
    let metrics = api.get("/metrics").unwrap().text;
    let line = format!("virtio_mem_stray_swept_bytes_total {}\n", 2 * BLOCK);
    assert!(metrics.contains(&line), "{metrics}");
    assert_eq!(api.post("/v1/device/sweep").unwrap().json(), json!({ "swept_size": 0 }));
    assert!(rig.daemon.wait_logged("discarded what the guest had in unplugged memory", PATIENCE));
}

#[test]
fn sweeps_come_by_themselves_when_they_are_asked_for() {
    let rig = astray(rig_with(options().arg("--sweep-interval").arg("1s"), ram()));
    let start = Instant::now();
    while rig.resident(2, 8) != 0 {
        assert!(start.elapsed() < PATIENCE, "it is not swept");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    rig.assert_stamped(0, 2);
}

#[test]
fn nothing_is_swept_while_migration_is_active_or_the_guest_is_stopped() {
    let rig = astray(rig_with(options().arg("--sweep-interval").arg("1s"), ram()));
    let api = rig.daemon.api();
    let refused = |why: &str| {
        let answer = api.post("/v1/device/sweep").unwrap();
        assert_eq!(answer.status, 409, "{}", answer.text);
        assert!(answer.text.contains(why), "{}", answer.text);
    };
    // A front-end that loads a state brings its memory while the ring is stopped.
    rig.frontend.get_vring_base(0).unwrap();
    rig.stamp(0, 4);
    refused("the guest does not run");
    std::thread::sleep(std::time::Duration::from_millis(2500));
    rig.assert_stamped(0, 4);
    rig.frontend.start_ring(0, rig.driver.ring()).unwrap();
    assert!(api.set_migration(true).unwrap().is_success());
    rig.stamp(0, 4);
    refused("migration is active");
    std::thread::sleep(std::time::Duration::from_millis(2500));
    rig.assert_stamped(0, 4);
    assert!(api.set_migration(false).unwrap().is_success());
    assert_eq!(api.post("/v1/device/sweep").unwrap().status, 200);
    assert_eq!((rig.resident(0, 2), rig.resident(2, 8)), (2 * BLOCK, 0));
}
