//! Block state that changes while pages go over channels of their own.

use std::os::unix::net::UnixStream;

use vmstate::wire::WireRead;

use super::*;
use crate::channel::Channel;
use crate::ram::load::ChannelBlocks;
use crate::stream::{CAPABILITY_MULTIFD, Greeting, Packets};
use crate::test_support::wait_until;

pub(super) fn configuration() -> Configuration {
    Configuration {
        capabilities: vec![CAPABILITY_MULTIFD.to_owned()],
        uuid: Some([7; 16]),
        ..Configuration::new("test")
    }
}

/// Both ends of so many channels, and what is between.
pub(super) fn pairs(
    count: usize,
    progress: &Arc<Progress>,
) -> (PageChannels, PageChannels, Vec<Arc<Delayed>>) {
    let (mut near, mut far, mut ways) = (Vec::new(), Vec::new(), Vec::new());
    for (writes, reads, way) in (0..count).map(|_| Delayed::pair()) {
        near.push(Channel::over(Arc::new(writes), Arc::clone(progress)));
        far.push(Channel::over(Arc::new(reads), Arc::clone(progress)));
        ways.push(way);
    }
    (PageChannels::new(near).unwrap(), PageChannels::new(far).unwrap(), ways)
}

/// A pair with two channels, of which a request of the guest waits for as long as it takes.
fn by_channels(plugged: &[usize]) -> Pair {
    let mut model = vec![None; BLOCKS];
    plugged.iter().for_each(|&block| model[block] = Some(vec![0; PAGES as usize]));
    Pair::from(Side::elastic(plugged), model, Duration::from_secs(60), 2)
}

fn write_all(pair: &mut Pair, block: usize, byte: u8) {
    (0..PAGES).for_each(|page| pair.step(Op::Write { block, page, byte }));
    pair.step(Op::Sync);
}

/// As of [`model::op`], with pages that arrive whenever they do, of which few are written often: they are sent again
/// while they are on their way.
fn op() -> impl Strategy<Value = Op> {
    let few = |op| match op {
        Op::Write { block, page, byte } => Op::Write { block: block % 4, page: page % 2, byte },
        op => op,
    };
    let bytes = prop_oneof![1..6 * PAGE as usize, Just(usize::MAX)];
    prop_oneof![
        10 => model::op().prop_map(few),
        4 => (any::<prop::sample::Index>(), bytes).prop_map(|(way, bytes)| Op::Arrive(way, bytes)),
    ]
}

proptest! {
    #![proptest_config(model::times(500))]
    #[test]
    fn both_ends_have_the_same_blocks_and_pages_when_these_go_over_channels_of_their_own(
        plugged in proptest::collection::btree_set(0..BLOCKS, 0..BLOCKS),
        ops in proptest::collection::vec(op(), 0..80),
        breaks in proptest::option::weighted(0.3, 0..60usize),
        cancels in prop::bool::weighted(0.1),
    ) {
        let plugged: Vec<_> = plugged.into_iter().collect();
        let mut pair = by_channels(&plugged);
        pair.patience = Duration::from_millis(3);
        for (index, op) in ops.into_iter().enumerate() {
            if breaks == Some(index) {
                pair = pair.retry()?;
            }
            // One that is never answered would wait for a minute.
            if !matches!(op, Op::PlugInTime(_)) {
                pair.step(op);
            }
        }
        if cancels { pair.cancel()? } else { pair.switch()? }
    }
}

#[test]
fn a_discard_waits_at_a_barrier_for_pages_of_its_range_and_for_no_others() {
    let mut pair = by_channels(&[1, 4, 5]);
    write_all(&mut pair, 1, 7);
    pair.step(Op::Iterate(PAGES));
    // Nothing of it is on the way.
    pair.step(Op::Request { block: 5, plug: false });
    let before = pair.stream.len();
    pair.send_changes();
    assert_eq!(pair.stream.len() - before, 1, "the change alone");
    pair.step(Op::Request { block: 1, plug: false });
    pair.send_changes();
    assert_eq!(pair.stream.len() - before, 3, "a barrier, and the change");
    while !pair.stream.is_empty() {
        pair.deliver().unwrap();
    }
    assert_eq!(pair.to.resident_of(1), 0);
    // Behind the barrier nothing of it is on the way any more.
    pair.step(Op::Request { block: 1, plug: true });
    pair.step(Op::Request { block: 1, plug: false });
    pair.send_changes();
    assert_eq!(pair.stream.len(), 1);
    pair.switch().unwrap();
}

#[test]
fn pages_that_wait_for_a_channel_that_is_stuck_are_not_read_once_they_are_discarded() {
    let from = Side::elastic(&[0, 1, 4, 5]);
    fill(&from.region, 0..2 * PAGES, 7);
    fill(&from.region, 4 * PAGES..6 * PAGES, 7);
    let progress = Arc::new(Progress::new());
    let (near, far) = UnixStream::pair().unwrap();
    let near = Channel::new(near, Arc::clone(&progress)).unwrap();
    let tracker = |_: &MigrationBlock| Box::<Told>::default() as Box<dyn DirtyTracker>;
    let save = RamSave::new(&from.blocks, ListOptions::default(), Arc::clone(&progress), tracker);
    let mut save = save.unwrap().with_channels(PageChannels::new(vec![near]).unwrap());
    save.configure(&configuration()).unwrap();
    save.setup(&mut CountedStream::default()).unwrap();
    save.follow(Duration::from_secs(60)).unwrap();
    let (device, region) = (Arc::clone(from.device()), from.region.try_clone().unwrap());
    let guest = thread::spawn(move || {
        // The first packet is more than the socket takes, and the other waits behind it.
        wait_until(|| progress.snapshot().remaining == 0);
        device.unplug(4, &region).unwrap();
        let mut reader = WireReader::new(far);
        Greeting::read(&mut reader).unwrap();
        let (mut packets, mut sent) = (Packets::default(), Vec::new());
        for _ in 0..2 {
            let head = packets.read_head(&mut reader).unwrap();
            reader.skip(head.payload as u64, "pages").unwrap();
            sent.extend(packets.normal_runs().chain(packets.zero_runs()));
        }
        sent
    });
    save.iterate(&mut CountedStream::default(), u64::MAX).unwrap();
    let expected = [(0, 2), (5, 6)].map(|(from, to)| (from * BLOCK, to * BLOCK));
    let expected = expected.map(|(from, to)| ByteRange::from_bounds(from, to).unwrap());
    assert_eq!(guest.join().unwrap(), expected);
    assert_eq!(from.resident_of(4), 0);
}

#[test]
fn a_block_that_is_plugged_again_has_what_was_written_then() {
    let mut pair = by_channels(&[1]);
    for byte in [1, 0, 3] {
        write_all(&mut pair, 1, byte);
        pair.step(Op::Iterate(PAGES / 2));
        pair.step(Op::Request { block: 1, plug: false });
        pair.step(Op::Request { block: 1, plug: true });
    }
    pair.step(Op::Write { block: 1, page: 3, byte: 9 });
    pair.switch().unwrap();
}

#[test]
fn a_late_page_of_what_was_discarded_is_refused_and_brings_no_memory_back() {
    for round in 0..100 {
        let mut pair = patient(&[1]);
        let registry = Arc::clone(&pair.to.blocks);
        let blocks = registry.iter().map(Arc::clone);
        let blocks = Arc::new(ChannelBlocks::of(blocks));
        pair.load.written_by(Arc::clone(&blocks));
        let begun = Arc::new(AtomicBool::new(false));
        let tell = Arc::clone(&begun);
        let late = thread::spawn(move || {
            let index = registry.iter().position(|block| block.id() == "vmem0").unwrap();
            loop {
                for page in ByteRange::new(BLOCK, BLOCK).unwrap().chunks(PAGE) {
                    let (kind, bytes) = (page.start() / PAGE % 2, [7; PAGE as usize]);
                    let written = match kind {
                        0 => blocks.write(index, page, &bytes, 0),
                        _ => blocks.zero(index, page, 0),
                    };
                    if let Err(error) = written {
                        return error;
                    }
                    tell.store(true, Ordering::SeqCst);
                }
            }
        });
        while !begun.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        let range = ByteRange::new(BLOCK, BLOCK).unwrap();
        let (number, state, block, ranges) =
            (1, MemoryState::Discarded, "vmem0".to_owned(), vec![range]);
        pair.load.block_state(&BlockStateChange { number, state, block, ranges }, 0).unwrap();
        let refused = late.join().unwrap();
        assert!(matches!(refused, MigrationError::Discarded { .. }), "{refused}");
        assert_eq!(pair.to.resident_of(1), 0, "in round {round}");
    }
}
