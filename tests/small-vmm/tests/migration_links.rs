//! Migrations between processes over several channels, and over TLS.

mod common;

use common::{Host, PAGE, PLUGGED, REGION, TOUCHED, to_address};
use small_vmm::demo::make_certificates;
use small_vmm::guest::Command;
use small_vmm::migration::{Links, MigrateOptions, PostcopyOptions, When};

fn unix(to: &Host) -> String {
    format!("unix:{}", to.daemon.socket().with_file_name("migrate.sock").display())
}

#[test]
fn over_several_channels_and_tls_only_what_was_touched_is_sent_and_the_guest_goes_on() {
    let certificates = make_certificates().unwrap();
    let links = Links { channels: 4, tls_dir: Some(certificates.path().to_owned()), zstd: None };
    for address in [None, Some("tcp:127.0.0.1:0")] {
        let (mut from, mut to) = (Host::with_guest(), Host::waiting());
        let address = address.map_or_else(|| unix(&to), ToOwned::to_owned);
        let address = to.vmm.wait_over(&address, true, &links).unwrap();
        from.begin(MigrateOptions { links: links.clone(), ..to_address(&address) });
        let sent = from.outcome();
        assert_eq!(sent.status, "completed", "{sent:?}");
        assert_eq!(to.outcome().status, "completed");
        from.assert_no_guest();
        to.assert_guest_works();
        assert_eq!(sent.ram.discarded, (REGION - PLUGGED) / PAGE);
        assert_eq!(to.vmm.report().unwrap().resident, TOUCHED);
        from.vmm.quit().unwrap();
        to.vmm.quit().unwrap();
    }
}

#[test]
fn compressed_pages_go_over_any_number_of_channels_in_the_clear_and_over_tls() {
    let certificates = make_certificates().unwrap();
    for (channels, tls) in [(1, false), (2, true), (4, false), (4, true)] {
        let tls_dir = tls.then(|| certificates.path().to_owned());
        let links = Links { channels, tls_dir, zstd: Some(1) };
        let (mut from, mut to) = (Host::with_guest(), Host::waiting());
        let address = to.vmm.wait_over(&unix(&to), true, &links).unwrap();
        from.begin(MigrateOptions { links, ..to_address(&address) });
        let sent = from.outcome();
        assert_eq!(sent.status, "completed", "{sent:?}");
        assert_eq!(to.outcome().status, "completed");
        from.assert_no_guest();
        to.assert_guest_works();
        assert_eq!(to.vmm.report().unwrap().resident, TOUCHED);
        assert!(sent.ram.transferred < sent.ram.normal * PAGE / 2, "{sent:?}");
        from.vmm.quit().unwrap();
        to.vmm.quit().unwrap();
    }
}

#[test]
fn a_destination_that_does_not_decompress_refuses_a_guest_which_goes_on_and_is_taken_then() {
    let plain = Links { channels: 2, tls_dir: None, zstd: None };
    let compressed = Links { zstd: Some(1), ..plain.clone() };
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let address = to.vmm.wait_over(&unix(&to), true, &plain).unwrap();
    from.begin(MigrateOptions { links: compressed.clone(), ..to_address(&address) });
    let refused = to.outcome();
    assert_eq!(refused.status, "failed", "{refused:?}");
    let error = refused.error_desc.unwrap();
    assert!(error.contains("multifd,x-multifd-zstd"), "{error}");
    assert_eq!(from.outcome().status, "failed");
    from.assert_guest_works();
    to.assert_no_guest();
    let address = to.vmm.wait_over(&unix(&to), true, &compressed).unwrap();
    from.begin(MigrateOptions { links: compressed, ..to_address(&address) });
    assert_eq!(from.outcome().status, "completed");
    to.assert_guest_works();
    from.vmm.quit().unwrap();
    to.vmm.quit().unwrap();
}

#[test]
fn over_several_compressed_channels_and_tls_a_guest_goes_before_its_memory() {
    let certificates = make_certificates().unwrap();
    let links = Links { channels: 2, tls_dir: Some(certificates.path().to_owned()), zstd: Some(3) };
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let incoming = Command::Incoming {
        from: unix(&to),
        discard_aware: true,
        postcopy: true,
        links: links.clone(),
    };
    let address = to.vmm.tell(incoming).unwrap().listening.unwrap();
    let postcopy = Some(PostcopyOptions { when: When::Rounds(0), recover: None });
    from.begin(MigrateOptions { postcopy, links, ..to_address(&address) });
    let sent = from.outcome();
    assert_eq!(sent.status, "completed", "{sent:?}");
    assert_eq!(to.outcome().status, "completed");
    from.assert_no_guest();
    to.assert_guest_works();
    to.vmm.quit().unwrap();
}

#[test]
fn a_source_in_the_clear_is_refused_by_a_destination_with_tls_and_keeps_its_guest() {
    let certificates = make_certificates().unwrap();
    let links = Links { channels: 0, tls_dir: Some(certificates.path().to_owned()), zstd: None };
    let (mut from, mut to) = (Host::with_guest(), Host::waiting());
    let address = to.vmm.wait_over(&unix(&to), true, &links).unwrap();
    from.begin(to_address(&address));
    let refused = to.outcome();
    assert_eq!(refused.status, "failed", "{refused:?}");
    assert_eq!(from.outcome().status, "failed");
    from.assert_guest_works();
    to.assert_no_guest();
    // And is taken over TLS then.
    let address = to.vmm.wait_over(&unix(&to), true, &links).unwrap();
    from.begin(MigrateOptions { links, ..to_address(&address) });
    assert_eq!(from.outcome().status, "completed");
    to.assert_guest_works();
}
