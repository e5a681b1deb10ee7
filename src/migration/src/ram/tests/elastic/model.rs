//! Random runs against a naive model of both sides.

use super::arriving::Listening;
use super::*;

pub(super) fn op() -> impl Strategy<Value = Op> {
    let block = || 0..BLOCKS;
    prop_oneof![
        6 => (block(), any::<bool>()).prop_map(|(block, plug)| Op::Request { block, plug }),
        1 => block().prop_map(Op::PlugInTime),
        8 => (block(), 0..PAGES, any::<u8>())
            .prop_map(|(block, page, byte)| Op::Write { block, page, byte }),
        3 => Just(Op::Sync),
        4 => (1u64..40).prop_map(Op::Iterate),
        4 => (1usize..6).prop_map(Op::Deliver),
        3 => (1usize..3).prop_map(Op::Hear),
        1 => proptest::option::of(0u64..BLOCKS as u64).prop_map(Op::Refuse),
    ]
}

/// So many runs. Without optimisation, proptest's own source of random numbers takes a quarter of the time.
pub(super) fn times(cases: u32) -> ProptestConfig {
    let rng_algorithm = proptest::test_runner::RngAlgorithm::XorShift;
    ProptestConfig { cases, rng_algorithm, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(times(2000))]
    #[test]
    fn both_ends_have_the_same_blocks_and_pages_whatever_is_plugged_and_written_meanwhile(
        plugged in proptest::collection::btree_set(0..BLOCKS, 0..BLOCKS),
        ops in proptest::collection::vec(op(), 0..60),
        breaks in proptest::option::weighted(0.3, 0..60usize),
        cancels in prop::bool::weighted(0.1),
    ) {
        let plugged: Vec<_> = plugged.into_iter().collect();
        // Mostly long enough for what is answered, and short enough for what is not.
        let mut pair = Pair::new(&plugged, Duration::from_millis(3));
        for (index, op) in ops.into_iter().enumerate() {
            if breaks == Some(index) {
                pair = pair.retry()?;
            }
            pair.step(op);
        }
        if cancels { pair.cancel()? } else { pair.switch()? }
    }

    #[test]
    fn the_guest_has_its_blocks_and_pages_whatever_it_plugs_while_they_arrive_over_broken_channels(
        plugged in proptest::collection::btree_set(0..BLOCKS, 0..BLOCKS),
        ops in proptest::collection::vec(op(), 0..20),
        then in proptest::collection::vec(arriving::op(), 0..80),
        cancels in prop::bool::weighted(0.1),
    ) {
        let plugged: Vec<_> = plugged.into_iter().collect();
        let mut pair = Pair::new(&plugged, Duration::from_millis(3));
        ops.into_iter().for_each(|op| pair.step(op));
        let listening = Listening::begin(pair);
        if cancels {
            listening.cancel()?;
        } else {
            let mut arriving = listening.run();
            then.into_iter().try_for_each(|op| arriving.step(op))?;
            arriving.finish()?;
        }
    }
}
