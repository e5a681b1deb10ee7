//! What must hold when nothing disturbs: the guest gets what it was asked to take, all of its
//! memory is right, and the daemons are as small as they were.

use std::sync::PoisonError;
use std::thread;
use std::time::{Duration, Instant};

use super::process::{Usage, thread_names};
use crate::machine::Machine;
use crate::memory::PAGE_SIZE;
use crate::soak::host::{ADDR, Host, REGION};
use crate::soak::world::World;

/// How long the device may take to become what is requested.
const SETTLE: Duration = Duration::from_secs(60);
/// How long the daemons may take to let go of what clients have left.
const RELEASE: Duration = Duration::from_secs(40);
/// What a daemon may use with a front-end and without clients; it uses about half.
const MOST: Usage = Usage { memory: 48 << 20, threads: 32, descriptors: 80 };

/// Waits for quiet, and looks.
pub(in crate::soak) fn quiet(world: &World) {
    let _quiet = world.disturbing.write().unwrap_or_else(PoisonError::into_inner);
    if world.journal.violation().is_some() {
        return;
    }
    world.journal.did("looks in quiet", world.host().name);
    let machine = world.machine();
    settle(world, &machine);
    super::memory::look_at_blocks(world);
    let held = machine.ram().allocated_bytes(ADDR..ADDR + REGION).unwrap_or(u64::MAX);
    let plugged = machine.frontend().config().map_or(0, |config| config.plugged_size);
    if held > plugged {
        let detail = format!("{held:#x} bytes are held, {plugged:#x} are plugged");
        world.journal.violated("no more is held than is plugged", detail);
    }
    verify_all(world, &machine);
    for host in &world.hosts {
        wait_released(world, host);
    }
}

/// Waits until a daemon uses no more than it needs for the guest.
fn wait_released(world: &World, host: &Host) {
    let begin = Instant::now();
    while let Some(now) = Usage::of(host) {
        let released = now.descriptors <= MOST.descriptors
            && now.threads <= MOST.threads
            && now.memory <= MOST.memory;
        if released {
            return;
        }
        if begin.elapsed() > RELEASE {
            let detail = format!("host {}: {now:?} with {:?}", host.name, thread_names(host));
            world.journal.violated("what clients have left is let go of", detail);
            return;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn settle(world: &World, machine: &Machine) {
    let begin = Instant::now();
    loop {
        let settled = machine
            .frontend()
            .config()
            .is_ok_and(|config| config.plugged_size == config.requested_size);
        if settled {
            return;
        }
        if begin.elapsed() > SETTLE {
            let device = world.host().device(&world.journal);
            let answers = machine.with_driver(|driver| driver.answers());
            let detail = format!("after {SETTLE:?} {device:?}, {answers:?}, {:?}", machine.lost());
            world.journal.violated("the guest gets what is requested", detail);
            return;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Has the vCPUs look at every page that they use.
fn verify_all(world: &World, machine: &Machine) {
    let given = machine.vcpus().given();
    let pages = given.iter().map(|range| (range.end - range.start) / PAGE_SIZE);
    // Each goes through all of its pages at least once.
    let wanted = machine.vcpus().work().verified + 2 * pages.sum::<u64>();
    machine.vcpus().limit(None);
    let begin = Instant::now();
    while machine.vcpus().work().verified < wanted && machine.vcpus().is_healthy() {
        if begin.elapsed() > SETTLE {
            world.journal.violated("vCPUs get on", format!("{:?}", machine.vcpus().work()));
            break;
        }
        thread::sleep(Duration::from_millis(2));
    }
    machine.vcpus().limit(Some(crate::soak::world::PAGES_PER_SECOND));
    super::memory::look(world);
}
