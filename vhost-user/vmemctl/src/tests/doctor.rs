//! `doctor`, with a daemon and without.

use serde_json::Value;
use vhost_user_mem::management::fake::Fake;

use super::resizes::stalled;
use super::vmemctl;

#[test]
fn the_doctor_has_a_running_daemon_tell_of_its_region_and_guest() {
    let fake = Fake::new();
    fake.device.lock().resize = Some(stalled());
    let (_server, dir) = fake.serve();
    let root = dir.path().to_str().unwrap();
    let seen = vmemctl(&dir, &["doctor", "--root", root, "--json"]);
    assert_eq!(seen.status, 1);
    let report: Value = serde_json::from_str(&seen.out).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let find = |name: &str| checks.iter().find(|check| check["name"] == name).unwrap();
    let guest = find("guest");
    assert_eq!(guest["status"], "problem");
    assert!(guest["found"].as_str().unwrap().contains("no \\u{1b}[31mdriver"), "{guest}");
    assert_eq!(
        find("alignment")["found"],
        "with memory blocks of 128 MiB, the guest can use 1 GiB of 1 GiB"
    );
    assert!(report["problems"].as_u64().unwrap() >= 2, "{report}");
    let text = vmemctl(&dir, &["doctor", "--root", root]);
    assert!(text.out.contains("PROBLEM  guest        stands still since"), "{}", text.out);
    assert!(text.err.starts_with("vmemctl: ") && text.err.contains(" problems, "), "{}", text.err);
    assert_eq!(vmemctl(&dir, &["doctor", "--addr", "4G"]).status, 2);
}
