use std::io::ErrorKind;
use std::os::unix::net::UnixListener;

use small_vmm::cloud_hypervisor::faults::{Asking, Trap};
use small_vmm::cloud_hypervisor::guest::{MIB, PAGE};
use small_vmm::cloud_hypervisor::receiver::Receive;
use small_vmm::cloud_hypervisor::{Guest, content};

use super::ways::{Options, Saved};
use crate::cloud_hypervisor::metrics::RestoreMetrics;
use crate::cloud_hypervisor::restore::{Plan, restore};
use crate::huge_page_pool::Pool;
use crate::run::Run;
use crate::socket::Address;

const HUGE: u64 = 2 * MIB;
const EACH: u64 = HUGE / PAGE;

/// Five huge pages, of which the second and the fourth have something in them.
fn guest() -> Guest {
    let guest = Guest::with_boot_memory(5 * HUGE, Some(HUGE));
    guest.write(0, EACH + 3, &content(1));
    guest.write(0, 3 * EACH, &content(2));
    guest.write(0, 4 * EACH - 1, &content(3));
    guest
}

#[test]
fn a_guest_of_huge_pages_is_saved_and_restored_with_as_many_as_it_needs() {
    // Two of the guest, and two more of the restored one.
    let pool = Pool::with_free(HUGE, 4).expect("a pool of huge pages");
    let guest = guest();
    assert_eq!(pool.free(), 2);
    let saved = Saved::of(&guest);
    assert_eq!((pool.free(), saved.image.image().present_bytes()), (2, 3 * PAGE));
    let found = saved.restored(&Options::new(true), &Receive::new(false), &Run::new(None)).taken();
    assert!(found.memory == guest.memory());
    assert_eq!(found.resident, 2 * HUGE);
    // On demand every page is asked for, and has to be had.
    pool.make_free(5).unwrap();
    for trap in [None, Some(Trap::Again), Some(Trap::Balloon)] {
        let touches = vec![4 * HUGE, 3 * HUGE + PAGE];
        let how = Receive::new(true).asking(Asking { touches, trap, ..Asking::default() });
        let found = saved.restored(&Options::new(false), &how, &Run::new(None)).taken();
        assert!(found.memory == guest.memory());
        assert_eq!((found.asked, found.resident), (if trap.is_some() { 6 } else { 5 }, 5 * HUGE));
    }
    drop(pool);
}

#[test]
fn a_pool_that_is_too_small_is_told_of_before_anything_is_told_to_the_vmm() {
    let pool = Pool::with_free(HUGE, 2).expect("a pool of huge pages");
    let saved = Saved::of(&guest());
    let address = Address::Unix(saved.path("socket"));
    let listener = UnixListener::bind(saved.path("socket")).unwrap();
    listener.set_nonblocking(true).unwrap();
    for (eager, free, needed) in [(true, 1, 2), (false, 4, 5)] {
        pool.make_free(free).unwrap();
        let options = Options::new(eager);
        let plan = Plan {
            guest: &saved.image,
            config: saved.image.config(),
            eager,
            bandwidth: None,
            replay: &options.replay,
            record: None,
            address: &address,
        };
        let error = restore(plan, &Run::new(None), &options.report, &RestoreMetrics::new());
        let error = error.unwrap_err().to_string();
        let expected =
            format!("the guest needs {needed} huge pages of 2048 KiB, of which {free} are");
        assert!(error.contains(&expected), "{error}");
        assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
        // What was set aside is free again.
        assert_eq!(pool.free(), free);
    }
    drop(pool);
}
