//! Resizes, right and wrong, at all times.

use serde_json::{Value, json};

use crate::soak::host::{BLOCK, REGION};
use crate::soak::random::Random;
use crate::soak::world::{World, lock};

/// Most resizes stay below, so that not all memory of the machine is needed.
const USUAL: u64 = 160 << 20;
const TARGET: &str = "/v1/device/requested-size";

pub(super) fn turn(world: &World, random: &mut Random) {
    let host = world.host();
    let _changes = lock(&world.api_changes);
    if random.percent(15) {
        let wrong = wrong_size(random);
        let body = json!({ "requested_size": wrong });
        if let Some(answer) = host.ask(&world.journal, |api| api.put(TARGET, &body)) {
            world.journal.did("resizes that are wrong", &wrong);
            if answer.is_success() || answer.status >= 500 {
                let detail = format!("{wrong} was answered with {}", answer.status);
                world.journal.violated("a wrong size is refused", detail);
            }
        }
        return;
    }
    let most = if random.percent(5) { REGION } else { USUAL };
    let size = BLOCK * random.below(most / BLOCK + 1);
    world.will_request(size);
    let starts = host.starts();
    let answer = host.ask(&world.journal, |api| api.resize(size));
    // The sizes may have been looked at since.
    world.will_request(size);
    let Some(answer) = answer else { return };
    world.journal.did("resizes", format_args!("{} MiB on host {}", size >> 20, host.name));
    if !answer.is_success() && host.is_same(starts) {
        let detail = format!("{size:#x}: {} {}", answer.status, answer.text);
        world.journal.violated("a right size is accepted", detail);
    }
}

fn wrong_size(random: &mut Random) -> Value {
    match random.below(5) {
        0 => json!(BLOCK * random.below(64) + 1 + random.below(BLOCK - 1)),
        1 => json!(REGION + BLOCK),
        2 => json!(-1),
        3 => json!("2M"),
        _ => json!(1e30),
    }
}
