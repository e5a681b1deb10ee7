//! Who disturbs, each in a thread of its own, for as long as the run lasts.

mod api_clients;
mod discard_clients;
mod guest;
mod resizer;

use std::sync::{Arc, PoisonError};
use std::thread::{self, JoinHandle};

use super::random::Random;
use super::world::World;

/// One turn of an actor. It takes some seconds at most.
type Turn = fn(&World, &mut Random);

const ACTORS: [(&str, Turn); 9] = [
    ("resizer", resizer::turn),
    ("guest", guest::turn),
    ("api-flood", api_clients::flood),
    ("api-unread", api_clients::unread),
    ("api-garbage", api_clients::garbage),
    ("discard-client", discard_clients::turn),
    ("discard-client", discard_clients::turn),
    ("discard-client", discard_clients::turn),
    ("discard-garbage", discard_clients::garbage),
];

pub(super) fn start(world: &Arc<World>) -> std::io::Result<Vec<JoinHandle<()>>> {
    let start = |(number, (name, turn)): (u64, (&str, Turn))| {
        let world = Arc::clone(world);
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            let mut random = Random::of(world.seed, number);
            while !world.journal.is_over() {
                let pause = random.millis(10, 400);
                world.journal.sleep(pause);
                let _disturbing = world.disturbing.read().unwrap_or_else(PoisonError::into_inner);
                turn(&world, &mut random);
            }
        })
    };
    (1..).zip(ACTORS).map(start).collect()
}
