//! `soak`: daemons, a guest that moves between two of them, and everything that may go wrong, for
//! as long as one likes, while invariants are looked at.
//!
//! What is done is chosen by a seed, each actor by its own; when it happens is not. Parts:
//!
//! - `host`, `world`: daemons, the guest's machine, the locks between those who disturb and those
//!   who look.
//! - `actors`: who disturbs all the time, one file a kind.
//! - `steps`: what is done to the guest and its daemon, one after the other.
//! - `invariants`: what must hold, one file a subject.
//! - `journal`: counts, last actions, the first violation.

mod actors;
mod host;
mod invariants;
mod journal;
mod random;
mod steps;
mod world;

use std::env;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::process::find_daemon;
use journal::Journal;
use random::Random;
use world::World;

/// Between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(5);
/// How long the actors may take to end.
const END: Duration = Duration::from_secs(60);

/// What a soak is asked for.
#[derive(Clone, Debug)]
pub struct SoakOptions {
    /// The daemon; beside this program unless given.
    pub daemon: Option<PathBuf>,
    /// How long.
    pub time: Duration,
    /// What is chosen follows from it; the time of day unless given.
    pub seed: Option<u64>,
}

/// Runs until the time is over, or an invariant is violated; false then.
///
/// # Errors
///
/// When something fails that the daemon, the engine or the guest do not promise.
pub fn run(options: &SoakOptions) -> anyhow::Result<bool> {
    let binary = match &options.daemon {
        Some(path) => path.clone(),
        None => find_daemon(&env::current_exe()?)?,
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let seed = options.seed.unwrap_or(now);
    println!("soak: seed {seed}, {} s", options.time.as_secs());
    let world = Arc::new(World::new(&binary, seed, Journal::new(options.time))?);
    show_progress(&world)?;
    let mut threads = actors::start(&world)?;
    threads.push(invariants::watch(&world)?);
    let mut random = Random::of(seed, 0);
    let result = steps::run(&world, &mut random);
    if let Err(error) = &result {
        world.journal.violated("every step can be done", format!("{error:#}"));
    }
    end(&world, threads);
    let journal = &world.journal;
    println!("soak: what was done\n{}", journal.summary());
    let Some(violation) = journal.violation() else {
        println!("soak: seed {seed}: all invariants held");
        return Ok(true);
    };
    let (last, all) = journal.last_actions();
    let logs = format!("{}{}", world.hosts[0].log(), world.hosts[1].log());
    let file = env::temp_dir().join(format!("soak-{seed}.log"));
    std::fs::write(&file, format!("{violation}\n{all}\n{logs}"))?;
    println!("soak: the last actions (more of them, and of the logs: {})\n{last}", file.display());
    println!("soak: seed {seed}: VIOLATED: {violation}");
    Ok(false)
}

fn show_progress(world: &Arc<World>) -> std::io::Result<()> {
    let world = Arc::clone(world);
    thread::Builder::new().name("progress".to_owned()).spawn(move || {
        while !world.journal.is_over() {
            world.journal.sleep(PROGRESS);
            println!("soak: {}", world.journal.progress());
        }
    })?;
    Ok(())
}

/// Ends actors, daemons and vCPUs, each of which has to end in time.
fn end(world: &World, threads: Vec<thread::JoinHandle<()>>) {
    let begin = Instant::now();
    for thread in threads {
        while !thread.is_finished() && begin.elapsed() < END {
            thread::sleep(Duration::from_millis(5));
        }
        let name = thread.thread().name().unwrap_or_default().to_owned();
        if !thread.is_finished() {
            world.journal.violated("every request is answered within a bound", name);
        } else if thread.join().is_err() {
            world.journal.violated("no actor panics", name);
        }
    }
    for host in &world.hosts {
        host.close(&world.journal);
    }
}
