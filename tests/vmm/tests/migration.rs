//! Whole migrations between four processes: two daemons and two VMMs.

mod common;

use common::Host;

#[test]
fn a_guest_goes_on_elsewhere_with_all_of_its_memory() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let address = to.listen();
    from.migrate(&address);
    let sent = from.outcome();
    assert_eq!(sent.status, "completed", "{sent:?}");
    let loaded = to.outcome();
    assert_eq!(loaded.status, "completed", "{loaded:?}");
    from.assert_no_guest();
    to.assert_guest_works();
}
