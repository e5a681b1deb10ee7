//! Whole migrations between four processes: two daemons and two VMMs.

mod common;

use common::{ADDR, BLOCK, Host, PAGE, PLUGGED, REGION, TOUCHED, to_address};
use small_vmm::guest::Command;
use small_vmm::machine::BOOT_SIZE;
use small_vmm::migration::{MigrateOptions, MigrationReport};

/// Moves the guest, which must work; what was sent.
fn migrate(from: &mut Host, to: &mut Host, address: &str, discard_aware: bool) -> MigrationReport {
    let address = to.vmm.wait_for_guest(address, discard_aware).unwrap();
    from.begin(MigrateOptions { discard_aware, ..to_address(&address) });
    let sent = from.outcome();
    assert_eq!(sent.status, "completed", "{sent:?}");
    assert_eq!(to.outcome().status, "completed");
    from.assert_no_guest();
    to.assert_guest_works();
    sent
}

fn unix(to: &Host) -> String {
    format!("unix:{}", to.daemon.socket().with_file_name("migrate.sock").display())
}

#[test]
fn a_guest_goes_on_elsewhere_and_only_what_it_touched_was_sent() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let ram = migrate(&mut from, &mut to, "tcp:127.0.0.1:0", true).ram;
    assert_eq!(ram.discarded, (REGION - PLUGGED) / PAGE);
    let all = (REGION + BOOT_SIZE) / PAGE;
    assert_eq!(ram.discarded + ram.holes + ram.total / PAGE, all);
    assert!(ram.total >= TOUCHED && ram.total < TOUCHED + BOOT_SIZE, "{ram:?}");
    assert!(ram.normal >= TOUCHED / PAGE);
    assert_eq!(ram.dirty_while_discarded, 0);
    assert_eq!(from.vmm.report().unwrap().resident, TOUCHED);
    assert_eq!(to.vmm.report().unwrap().resident, TOUCHED);
    from.vmm.quit().unwrap();
    to.vmm.quit().unwrap();
}

#[test]
fn a_destination_is_the_next_source() {
    let (mut first, mut second, mut third) = (Host::with_guest(), Host::waiting(), Host::waiting());
    let address = unix(&second);
    migrate(&mut first, &mut second, &address, true);
    drop(first);
    let address = unix(&third);
    let sent = migrate(&mut second, &mut third, &address, true);
    assert_eq!(sent.ram.discarded, (REGION - PLUGGED) / PAGE);
    third.vmm.quit().unwrap();
}

#[test]
fn without_asking_what_is_discarded_the_whole_region_is_read_and_held() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let address = unix(&to);
    let ram = migrate(&mut from, &mut to, &address, false).ram;
    assert_eq!(ram.discarded, 0);
    assert!(ram.duplicate >= (REGION - TOUCHED) / PAGE, "{ram:?}");
    assert_eq!(from.vmm.report().unwrap().resident, REGION);
    assert_eq!(to.vmm.report().unwrap().resident, TOUCHED);
}

#[test]
fn sides_that_do_not_agree_on_discarded_memory_refuse_each_other() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let address = to.listen();
    from.begin(MigrateOptions { discard_aware: false, ..to_address(&address) });
    assert_eq!(from.outcome().status, "failed");
    let error = to.outcome().error_desc.unwrap();
    assert_eq!(error, "capabilities: \"x-ignore-discards\" in the stream, \"\" here");
    from.assert_guest_works();
}

#[test]
fn a_device_of_another_geometry_is_refused_by_name_with_both_values() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting_at(ADDR, 2 * REGION));
    let address = to.listen();
    from.migrate(&address);
    assert_eq!(from.outcome().status, "failed");
    let error = to.outcome().error_desc.unwrap();
    assert!(error.contains("field region_size"), "{error}");
    assert!(error.contains(&format!("{REGION} in the stream, {} here", 2 * REGION)), "{error}");
    to.assert_no_guest();
    from.assert_guest_works();
}

#[test]
fn sides_of_an_older_release_understand_each_other_and_no_newer_one() {
    let old = Some("7.2");
    let (mut from, mut to, mut newest) =
        (Host::with_guest_of(old), Host::waiting_of(old), Host::waiting());
    let address = newest.listen();
    from.migrate(&address);
    assert_eq!(from.outcome().status, "failed");
    let error = newest.outcome().error_desc.unwrap();
    let expected = "\"vmem0/virtio-mem-device-early\": it did not come before RAM";
    assert!(error.contains(expected), "{error}");
    from.assert_guest_works();
    let mut new = Host::with_guest();
    let address = to.listen();
    new.migrate(&address);
    assert_eq!(new.outcome().status, "failed");
    let error = to.outcome().error_desc.unwrap();
    assert!(error.contains("is not sent with the properties of this side"), "{error}");

    // What is discarded comes after memory, and is not sent all the same.
    let address = unix(&to);
    let sent = migrate(&mut from, &mut to, &address, true);
    assert_eq!(sent.ram.discarded, (REGION - PLUGGED) / PAGE);
    assert_eq!(to.vmm.report().unwrap().resident, TOUCHED);
}

#[test]
fn a_guest_that_was_written_to_a_file_goes_on_from_there() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let file = from.daemon.socket().with_file_name("snapshot");
    from.vmm.tell(Command::Snapshot { file: file.clone(), background: false }).unwrap();
    let saved = from.outcome();
    assert_eq!(saved.status, "completed", "{saved:?}");
    assert_eq!(saved.ram.discarded, (REGION - PLUGGED) / PAGE);
    from.assert_guest_works();
    // Once more there is no place for.
    from.vmm.tell(Command::Snapshot { file: file.clone(), background: false }).unwrap();
    assert!(from.outcome().error_desc.unwrap().contains("File exists"));
    from.assert_guest_works();

    to.vmm.tell(Command::Restore { file, lazy: false }).unwrap();
    let restored = to.outcome();
    assert_eq!(restored.status, "completed", "{restored:?}");
    assert_eq!(to.vmm.report().unwrap().plugged, PLUGGED);
    to.assert_guest_works();
    assert_eq!(to.vmm.report().unwrap().resident, TOUCHED);
    to.vmm.quit().unwrap();
}

#[test]
fn a_guest_that_is_to_wait_does() {
    let (mut from, mut to) = (Host::with_guest(), Host::paused());
    let address = to.listen();
    from.migrate(&address);
    assert_eq!(from.outcome().status, "completed");
    assert_eq!(to.outcome().status, "completed");
    to.assert_no_guest();
    // What is wanted meanwhile is done when it goes on.
    let requested = PLUGGED + BLOCK;
    assert!(to.daemon.api().resize(requested).unwrap().is_success());
    to.vmm.tell(Command::Cont).unwrap();
    to.vmm.tell(Command::Settle { requested }).unwrap();
    to.assert_guest_works();
}

#[test]
fn commands_that_make_no_sense_are_refused_and_the_guest_goes_on() {
    let mut host = Host::with_guest();
    let refused = |host: &mut Host, command: Command| host.vmm.tell(command).unwrap_err();
    assert_eq!(refused(&mut host, Command::Status).to_string(), "no migration was begun");
    assert_eq!(refused(&mut host, Command::Cancel).to_string(), "no migration was begun");
    host.begin(to_address("somewhere"));
    let error = host.outcome().error_desc.unwrap();
    assert_eq!(error, "\"somewhere\" is neither unix:PATH nor tcp:HOST:PORT");
    // A guest that comes where one is.
    let address = host.listen();
    let mut other = Host::with_guest();
    other.migrate(&address);
    assert!(host.outcome().error_desc.unwrap().contains("a guest is here already"));
    assert_eq!(other.outcome().status, "failed");
    other.assert_guest_works();
    host.assert_guest_works();
}

/// The guest is not here, and is not continued here.
fn assert_not_continued(host: &mut Host, reason: &str) {
    let error = host.vmm.tell(Command::Cont).unwrap_err().to_string();
    assert_eq!(error, reason);
    host.assert_no_guest();
}

#[test]
fn a_guest_that_has_left_is_not_continued_here() {
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    assert_not_continued(&mut to, "no guest has come yet: continue it when the migration is over");
    let address = unix(&to);
    migrate(&mut from, &mut to, &address, true);
    assert_not_continued(&mut from, "the guest has left, and must not run here again");
    // One that runs is told nothing new.
    to.vmm.tell(Command::Cont).unwrap();
    to.assert_guest_works();
}

#[test]
fn a_guest_that_waits_is_not_replaced_by_another() {
    let (mut from, mut to, mut other) = (Host::with_guest(), Host::paused(), Host::with_guest());
    let address = to.listen();
    from.migrate(&address);
    assert_eq!(from.outcome().status, "completed");
    assert_eq!(to.outcome().status, "completed");
    let address = to.listen();
    other.migrate(&address);
    assert_eq!(other.outcome().status, "failed");
    let error = to.outcome().error_desc.unwrap();
    assert!(error.contains("a guest is here already"), "{error}");
    other.assert_guest_works();
    to.vmm.tell(Command::Cont).unwrap();
    to.assert_guest_works();
}
