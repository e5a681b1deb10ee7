//! A ring that starts again in memory that came from elsewhere.

mod common;

use common::{ADDR, BLOCK, REGION, daemon_binary};
use migration::Guest;
use small_vmm::daemon::{Daemon, DaemonOptions};
use small_vmm::machine::{Machine, MachineOptions};

#[test]
fn a_ring_that_is_not_as_the_driver_left_it_is_not_started() {
    let options = DaemonOptions::new(ADDR, REGION).block_size(BLOCK).requested_size(BLOCK);
    let daemon = Daemon::start(daemon_binary(), options).unwrap();
    let machine = Machine::start(MachineOptions {
        socket: daemon.socket(),
        discard_socket: None,
        addr: ADDR,
        region_size: REGION,
        incoming: false,
        paused: false,
        compat_level: None,
    })
    .unwrap();
    machine.settle(BLOCK).unwrap();
    machine.stop().unwrap();
    let used = || machine.with_driver(|driver| driver.driver().ring().used_idx()).unwrap();
    let answered = used();
    // A request that the driver did not make: the one before the ring's last, once more.
    let at = machine.with_driver(|driver| driver.driver().ring().avail_addr()) + 2;
    let index: u16 = machine.ram().load(at).unwrap();
    machine.ram().write(at, &index.wrapping_add(1).to_le_bytes()).unwrap();
    machine.run().unwrap();
    let lost = machine.lost().unwrap();
    assert!(lost.starts_with("the ring in memory stands at"), "{lost}");
    // The guest continues without the device, which has answered nothing.
    assert!(machine.is_running());
    machine.frontend().sync().unwrap();
    assert_eq!(used(), answered);
}
