//! Postcopy is answered by the relay.

use std::os::fd::AsFd;

use super::super::RelayError;
use super::super::message::{FrontendRequest as R, Header, u64_at};
use super::harness::{Bench, MAPPED, NOWHERE, memfd, region};

fn listening() -> Bench {
    let bench = Bench::negotiated();
    bench.send(R::POSTCOPY_ADVISE, &[]);
    let advised = bench.front.receive().unwrap();
    assert_eq!(advised.header, Header::reply(R::POSTCOPY_ADVISE as u32, 0));
    assert_eq!(advised.fds.len(), 1, "the descriptor is ancillary data of an empty reply");
    assert_eq!(bench.ask(R::POSTCOPY_LISTEN, &[], &[]), 0);
    assert_eq!(bench.take_journal(), ["listen"]);
    bench
}

fn add(bench: &Bench, gpa: u64) {
    let (file, body) = (memfd(4096), region(gpa, 4096));
    let header = Header::request(R::ADD_MEM_REG as u32, body.len());
    assert!(bench.front.send(header, &body, &[file.as_fd()]));
}

#[test]
fn memory_is_answered_with_its_addresses_and_used_once_it_is_confirmed() {
    let bench = listening();
    for gpa in [0, 0x8000] {
        add(&bench, gpa);
        let mut expected = region(gpa, 4096);
        expected[24..32].copy_from_slice(&(gpa + MAPPED).to_le_bytes());
        assert_eq!(bench.reply(R::ADD_MEM_REG), expected);
    }
    let added = ["quiesce", "crate ADD_MEM_REG"];
    assert_eq!(bench.take_journal(), [added[0], added[1], added[0], added[1], "release"]);
    // One confirmation for both, of which nothing is said.
    bench.send(R::ADD_MEM_REG, &[0; 8]);
    bench.get(R::GET_FEATURES, &[]);
    assert_eq!(bench.take_journal(), ["release", "crate GET_FEATURES"]);

    let file = memfd(8192);
    let mut table = 2u64.to_le_bytes().to_vec();
    for gpa in [0u64, 4096] {
        table.extend([gpa, 4096, 0x5000 + gpa, gpa].iter().flat_map(|n| n.to_le_bytes()));
    }
    let header = Header::request(R::SET_MEM_TABLE as u32, table.len());
    assert!(bench.front.send(header, &table, &[file.as_fd(), file.as_fd()]));
    let reply = bench.reply(R::SET_MEM_TABLE);
    assert_eq!(reply.len(), table.len());
    assert_eq!((u64_at(&reply, 24), u64_at(&reply, 56)), (MAPPED, MAPPED + 4096));
    // What the end finds unconfirmed is used from then on.
    assert_eq!(bench.get(R::POSTCOPY_END, &[]), [0; 8]);
    assert_eq!(bench.take_journal(), ["quiesce", "crate SET_MEM_TABLE", "end", "release"]);
    // And what comes later is acknowledged as ever.
    let body = region(0x8000, 4096);
    assert_eq!(bench.ask(R::ADD_MEM_REG, &body, &[file.as_fd()]), 0);
}

#[test]
fn what_is_out_of_order_ends_the_connection() {
    let mut bench = Bench::negotiated();
    bench.send(R::ADD_MEM_REG, &[0; 8]);
    assert!(matches!(bench.outcome(), Err(RelayError::Size { request: R::ADD_MEM_REG, size: 8 })));

    let mut bench = listening();
    add(&bench, 0);
    bench.reply(R::ADD_MEM_REG);
    bench.send(R::SET_VRING_ADDR, &[0; 40]);
    let refused = bench.outcome();
    assert!(matches!(refused, Err(RelayError::Value { request: R::SET_VRING_ADDR, .. })));
    let released = bench.take_journal().iter().filter(|event| *event == "release").count();
    assert_eq!(released, 1, "no request waits for a confirmation that never comes");

    let mut bench = listening();
    bench.send(R::SET_MEM_TABLE, &1u64.to_le_bytes());
    let refused = bench.outcome();
    assert!(matches!(refused, Err(RelayError::Value { request: R::SET_MEM_TABLE, .. })));

    let mut bench = listening();
    add(&bench, NOWHERE);
    let refused = bench.outcome();
    assert!(matches!(refused, Err(RelayError::Value { request: R::ADD_MEM_REG, .. })));
}
