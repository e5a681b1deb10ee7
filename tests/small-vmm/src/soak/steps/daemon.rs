//! Faults of the daemon that has the guest, and of the connection to it.

use std::sync::PoisonError;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::daemon::LogReader;
use crate::soak::random::Random;
use crate::soak::world::{World, lock};

/// Ends the daemon at any moment of a request, and starts it again.
pub(super) fn end_and_restart(world: &World, random: &mut Random) -> anyhow::Result<()> {
    let _moving = world.settled.write().unwrap_or_else(PoisonError::into_inner);
    let (host, machine) = (world.host(), world.machine());
    machine.detach();
    thread::sleep(random.millis(0, 20));
    host.end(&world.journal, random)?;
    host.restart()?;
    machine.reconnect().context("a front-end that comes again after a restart")
}

/// Ends the daemon while nothing is asked of it, and compares.
pub(super) fn compare_after_restart(world: &World, random: &mut Random) -> anyhow::Result<()> {
    let _moving = world.settled.write().unwrap_or_else(PoisonError::into_inner);
    let _unchanged = lock(&world.api_changes);
    let (host, machine) = (world.host(), world.machine());
    if world.may_reset() {
        // A freeze that ends with the daemon lets it happen.
        return Ok(());
    }
    machine.detach();
    machine.with_driver(|_| host.restart_and_compare(&world.journal, random))?;
    world.journal.did("restarts with a comparison", host.name);
    machine.reconnect().context("a front-end that comes again after a restart")
}

/// SIGSTOP, and SIGCONT after a while.
pub(super) fn pause(world: &World, random: &mut Random) -> anyhow::Result<()> {
    let _moving = world.settled.write().unwrap_or_else(PoisonError::into_inner);
    let time = random.millis(20, 1500);
    world.journal.did("daemon stopped and continued", format_args!("{time:?}"));
    world.host().pause(time)
}

/// The front-end goes in the middle of a message, and comes again.
pub(super) fn cut_off(world: &World, random: &mut Random) -> anyhow::Result<()> {
    let _moving = world.settled.write().unwrap_or_else(PoisonError::into_inner);
    let machine = world.machine();
    machine.detach();
    thread::sleep(random.millis(1, 20));
    // A SET_MEM_TABLE with NEED_REPLY and a payload that does not come.
    let message = [5u8, 0, 0, 0, 9, 0, 0, 0, 40, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    let len = random.below(message.len() as u64 + 1) as usize;
    // Fails when the daemon was faster.
    let _ = machine.frontend().connection().send_raw(&message[..len], &[]);
    world.journal.did("front-end leaves in the middle of a message", len);
    machine.reconnect().context("a front-end that comes again after it was cut off")
}

/// The reader of the daemon's log hangs, or is gone, until the daemon is started again.
pub(super) fn lose_log_reader(world: &World, random: &mut Random) -> anyhow::Result<()> {
    let reader = random.pick(&[LogReader::Hangs, LogReader::Gone]);
    world.journal.did("log reader lost", format_args!("{reader:?}"));
    world.host().set_log_reader(reader);
    Ok(())
}

/// A migration by the API, which is one by word only.
pub(super) fn freeze(world: &World, random: &mut Random) -> anyhow::Result<()> {
    let host = world.host();
    for active in [true, false] {
        let answer = host.ask(&world.journal, |api| api.set_migration(active));
        let answer = answer.context("the daemon does not answer")?;
        ensure!(answer.is_success(), "migration by the API: {} {}", answer.status, answer.text);
        let time = random.millis(20, 700);
        if active {
            world.journal.did("frozen by the API", format_args!("{time:?}"));
            world.journal.sleep(time);
        }
    }
    Ok(())
}

/// The guest is reset.
pub(super) fn reboot(world: &World, _random: &mut Random) -> anyhow::Result<()> {
    let _moving = world.settled.write().unwrap_or_else(PoisonError::into_inner);
    let (host, machine) = (world.host(), world.machine());
    world.journal.did("guest rebooted", host.name);
    world.will_reset();
    machine.reboot(|| {
        let answer = host.ask(&world.journal, |api| api.system_reset());
        let answer = answer.context("the daemon does not answer")?;
        ensure!(answer.is_success(), "system reset: {} {}", answer.status, answer.text);
        Ok(())
    })?;
    // Let the driver see it before sizes are looked at.
    thread::sleep(Duration::from_millis(5));
    Ok(())
}
