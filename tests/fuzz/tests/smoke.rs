//! The bodies of the targets over their seeds and over random bytes, without a fuzzer.

use virtio_mem_fuzz::{TARGETS, seeds};

/// Inputs made up for each target.
const ROUNDS: u64 = 300;

/// xorshift64: the same inputs in every run.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// One test for all, since one body measures what the whole process allocates.
#[test]
fn seeds_and_random_bytes_break_no_promise() {
    for (name, run) in TARGETS {
        let seeds = seeds::of(name);
        assert!(!seeds.is_empty(), "{name} has no seeds");
        seeds.iter().for_each(|seed| run(seed));
        let mut state = 0x9e37_79b9_7f4a_7c15;
        for round in 0..ROUNDS {
            // Seeds with a few bytes changed get further than noise alone.
            let mut input = match usize::try_from(round).unwrap() % (seeds.len() + 1) {
                0 => Vec::new(),
                seed => seeds[seed - 1].clone(),
            };
            input.extend((0..random(&mut state) % 200).map(|_| (random(&mut state) >> 32) as u8));
            for _ in 0..random(&mut state) % 8 {
                let at = random(&mut state) as usize % input.len().max(1);
                if let Some(byte) = input.get_mut(at) {
                    *byte = (random(&mut state) >> 32) as u8;
                }
            }
            run(&input);
        }
    }
}
