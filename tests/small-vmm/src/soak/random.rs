//! Choices that follow from a seed.

use std::time::Duration;

/// splitmix64: the same choices for the same seed.
pub(super) struct Random(u64);

impl Random {
    /// The choices of one actor; each has its own, so that what one does changes no other's.
    pub(super) fn of(seed: u64, actor: u64) -> Self {
        let mut random = Self(seed ^ actor.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        random.next();
        random
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0 to `end`, without it; `end` is not 0.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(super) fn percent(&mut self, share: u64) -> bool {
        self.below(100) < share
    }

    pub(super) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        let last = choices.len() as u64;
        choices[self.below(last) as usize]
    }

    /// Any time between two numbers of milliseconds.
    pub(super) fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_micros(1000 * from + self.below(1000 * (to - from) + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_choices_and_actors_differ() {
        let choices = |actor| {
            let mut random = Random::of(7, actor);
            (0..20).map(|_| random.next()).collect::<Vec<_>>()
        };
        assert_eq!(choices(1), choices(1));
        assert_ne!(choices(1), choices(2));
        let mut random = Random::of(7, 1);
        assert!((0..1000).all(|_| (2..=5).contains(&random.millis(2, 5).as_millis())));
    }
}
