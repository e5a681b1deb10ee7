//! Migrations to the other host, most of them with a fault in the middle.

use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::{clean_up, is_kept_out, wait_for_clients};
use crate::machine::Machine;
use crate::migration::{Expected, Links, MigrateOptions, Migration, PostcopyOptions, When};
use crate::relay::Relay;
use crate::soak::random::Random;
use crate::soak::world::World;

/// How long a migration may take.
const BOUND: Duration = Duration::from_secs(120);
/// How long the destination waits for a source that has failed before it is told to give up.
const LONELY: Duration = Duration::from_secs(3);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    Break,
    Cancel,
    EndSourceDaemon,
    EndDestinationDaemon,
    StopDaemon,
}

const FAULTS: [Fault; 10] = [
    Fault::None,
    Fault::None,
    Fault::None,
    Fault::None,
    Fault::Break,
    Fault::Break,
    Fault::Cancel,
    Fault::EndSourceDaemon,
    Fault::EndDestinationDaemon,
    Fault::StopDaemon,
];

/// A migration under way, and what goes wrong in it.
struct Move<'a> {
    world: &'a World,
    from: usize,
    to: usize,
    source: Arc<Machine>,
    destination: Arc<Machine>,
    outgoing: Migration,
    incoming: Migration,
    fault: Fault,
    postcopy: bool,
}

pub(super) fn step(world: &World, random: &mut Random) -> anyhow::Result<()> {
    let _moving = world.settled.write().unwrap_or_else(PoisonError::into_inner);
    let (from, source) = world.guest();
    let to = 1 - from;
    wait_for_clients(world, to)?;
    let destination = world.waiting_machine(to).context("a machine that waits for the guest")?;
    let (postcopy, tcp) = (random.percent(50), random.percent(50));
    let fault = match random.pick(&FAULTS) {
        // In postcopy it would give the guest up.
        Fault::Cancel if postcopy => Fault::None,
        fault => fault,
    };
    let listen = |name: &str| match tcp {
        true => "tcp:127.0.0.1:0".to_owned(),
        false => format!("unix:{}", world.path(name).display()),
    };
    // Sometimes over channels of their own.
    let channels = random.pick(&[0, 0, 1, 3]);
    let zstd = if channels == 0 { None } else { random.pick(&[None, Some(1), Some(9)]) };
    let links = Links { channels, tls_dir: None, zstd };
    let expected = Expected { discard_aware: true, postcopy, links: links.clone() };
    let incoming = Migration::incoming(&destination, &listen("migrate"), expected)?;
    let address = incoming.listening().context("it does not listen")?.to_owned();
    let relay = match fault {
        Fault::Break => Some(Relay::start(&listen("relay"), &address)?),
        _ => None,
    };
    if let Some(relay) = &relay {
        let bytes = match random.below(3) {
            0 => random.below(4096),
            1 => random.below(1 << 20),
            _ => random.below(40 << 20),
        };
        relay.hold_after(bytes);
    }
    let when = random.pick(&[When::Told, When::AtOnce, When::Rounds(1), When::Rounds(3)]);
    let recover = Some(address.clone());
    let options = MigrateOptions {
        to: relay.as_ref().map_or(address, |relay| relay.address().to_owned()),
        max_bandwidth: random.pick(&[None, Some(48 << 20), Some(128 << 20)]),
        downtime_limit: random.pick(&[None, Some(50), Some(1000)]),
        discard_aware: true,
        elastic: true,
        postcopy: postcopy.then_some(PostcopyOptions { when, recover }),
        links,
    };
    let kind = if postcopy { "migrations in postcopy" } else { "migrations in precopy" };
    let names = (world.hosts[from].name, world.hosts[to].name);
    let detail = format!("{} to {}, tcp {tcp}, {fault:?}, {options:?}", names.0, names.1);
    world.journal.did(kind, detail);
    let outgoing = Migration::outgoing(&source, options)?;
    let delay = random.millis(0, 1500);
    let migration =
        Move { world, from, to, source, destination, outgoing, incoming, fault, postcopy };
    migration.disturb(delay, relay, random)?;
    migration.wait_over();
    migration.judge()
}

impl Move<'_> {
    fn is_over(&self) -> bool {
        self.outgoing.is_over() && self.incoming.is_over()
    }

    fn disturb(
        &self,
        delay: Duration,
        relay: Option<Relay>,
        random: &mut Random,
    ) -> anyhow::Result<()> {
        let (journal, hosts) = (&self.world.journal, &self.world.hosts);
        let begin = Instant::now();
        let held = || relay.as_ref().is_some_and(Relay::is_holding);
        while begin.elapsed() < delay && !self.is_over() && !held() {
            thread::sleep(Duration::from_millis(1));
        }
        if self.postcopy {
            self.outgoing.start_postcopy();
        }
        if self.is_over() {
            journal.count("migrations that were over before the fault", 1);
            return Ok(());
        }
        match self.fault {
            Fault::None => {}
            Fault::Break => {
                while begin.elapsed() < delay + Duration::from_secs(3) && !self.is_over() && !held()
                {
                    thread::sleep(Duration::from_millis(1));
                }
                journal.did("migration channels broken", "");
                drop(relay);
            }
            Fault::Cancel => self.outgoing.cancel(),
            Fault::StopDaemon => {
                let host = &hosts[random.below(2) as usize];
                journal.did("daemon stopped in a migration", host.name);
                host.pause(random.millis(20, 1500))?;
            }
            Fault::EndSourceDaemon => {
                self.source.detach();
                hosts[self.from].end(journal, random)?;
                hosts[self.from].restart()?;
                // The driver may wait for an answer, and the migration for the driver.
                if let Err(error) = self.source.reconnect() {
                    journal.did("no reconnection in a migration", format_args!("{error:#}"));
                }
            }
            Fault::EndDestinationDaemon => {
                self.destination.detach();
                hosts[self.to].end(journal, random)?;
            }
        }
        Ok(())
    }

    fn wait_over(&self) {
        let begin = Instant::now();
        let mut failed = None;
        while !self.is_over() {
            if self.outgoing.is_over() && !self.destination.is_running() {
                let since = *failed.get_or_insert_with(Instant::now);
                if since.elapsed() > LONELY {
                    self.incoming.cancel();
                }
            }
            if begin.elapsed() > BOUND {
                let detail = self.describe();
                self.world.journal.violated("a migration ends", detail);
                return;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn describe(&self) -> String {
        let (out, into) = (self.outgoing.report(), self.incoming.report());
        format!(
            "{:?}; source {} ({:?}), destination {} ({:?})",
            self.fault, out.status, out.error_desc, into.status, into.error_desc
        )
    }

    /// The guest runs on one side, which both know; that side gets its daemon back, the other is
    /// made ready for the next guest.
    fn judge(&self) -> anyhow::Result<()> {
        let (world, hosts) = (self.world, &self.world.hosts);
        if world.journal.violation().is_some() {
            return Ok(());
        }
        let (here, there) = (self.source.is_running(), self.destination.is_running());
        let completed = self.outgoing.report().status == "completed";
        let detail = format!("runs at the source {here}, there {there}: {}", self.describe());
        if here == there || (completed && !there) {
            world.journal.violated("the guest runs on exactly one side", &detail);
            return Ok(());
        }
        let kept_out = is_kept_out(world, &self.outgoing.report());
        if !completed && !kept_out && self.fault == Fault::None {
            world.journal.violated("a migration without a fault completes", &detail);
        }
        world.journal.count(if there { "guests moved" } else { "guests that stayed" }, 1);
        let (stays, machine, other) = match there {
            true => (self.to, &self.destination, &self.source),
            false => (self.from, &self.source, &self.destination),
        };
        if there {
            world.move_guest(self.to, Arc::clone(&self.destination));
        }
        let ended = match self.fault {
            Fault::EndSourceDaemon => !there,
            Fault::EndDestinationDaemon => there,
            _ => false,
        };
        if ended {
            hosts[stays].restart()?;
            machine.reconnect().with_context(|| format!("reconnect after {detail}"))?;
        }
        clean_up(world, &hosts[1 - stays], other)
    }
}
