//! Pagers that die, and those that continue what they began.

use super::*;

#[test]
fn pagers_that_die_again_and_again_lose_nothing() {
    for preempt in [true, false] {
        let (sample, dir) = (large(), tempfile::tempdir().unwrap());
        let fake = Fake::listen(dir.path());
        for life in 0..4 {
            let last = life == 3;
            let bandwidth = (!last).then_some(1);
            let how = How { recover: life != 0, bandwidth, ..How::default() };
            let restored = restore(&sample, &dir, how);
            let mut main = fake.accept_main();
            if life == 0 {
                main.greet();
                main.setup(&sample);
            } else {
                main.resume(&sample);
                main.resumed();
            }
            let urgent = preempt.then(|| fake.accept_urgent());
            main.say(&ReturnMessage::Pong(4));
            let placing = main.place();
            let page = 100 * (life + 1);
            main.ask(Some("big"), page);
            fake.wait_for("big", page);
            // A hole that was asked for is one page more that it has.
            main.ask(Some("ram"), 10 + life);
            fake.wait_for("ram", 10 + life);
            if last {
                fake.wait_ended();
                main.say(&ReturnMessage::Shut(0));
                restored.join().unwrap().0.unwrap();
            } else {
                main.back.shutdown(std::net::Shutdown::Both).unwrap();
                assert!(restored.join().unwrap().0.is_err());
            }
            placing.join().unwrap();
            urgent.map(JoinHandle::join).transpose().unwrap();
        }
        let placed = fake.placed.lock();
        assert_eq!(placed.twice, []);
        for (page, bytes) in expected(&sample) {
            assert_eq!(placed.pages.get(&page), Some(&bytes), "{page:?}");
        }
        let holes = placed.pages.len() - expected(&sample).len();
        match preempt {
            // Each pager may have tried the second channel with one.
            true => assert!((4..=8).contains(&holes), "{holes} holes"),
            // Without it all holes of populated memory are sent at the end.
            false => assert_eq!(holes, 48 + 16 + 64 - 7),
        }
    }
}

#[test]
fn a_destination_with_other_memory_is_not_resumed() {
    let (sample, dir) = (large(), tempfile::tempdir().unwrap());
    let fake = Fake::listen(dir.path());
    let restored = restore(&sample, &dir, How { recover: true, ..How::default() });
    let mut main = fake.accept_main();
    main.tell_received("vm0/vmem", 512, &[]);
    let error = restored.join().unwrap().0.unwrap_err().to_string();
    assert!(
        error.contains("a bitmap of 64 bytes for block \"vm0/vmem\", which needs 32"),
        "{error}"
    );
}

#[test]
fn another_answer_than_the_bitmap_that_was_asked_for_is_refused() {
    let (sample, dir) = (large(), tempfile::tempdir().unwrap());
    let fake = Fake::listen(dir.path());
    let restored = restore(&sample, &dir, How { recover: true, ..How::default() });
    let mut main = fake.accept_main();
    main.say(&ReturnMessage::ResumeAck);
    let error = restored.join().unwrap().0.unwrap_err().to_string();
    assert!(error.contains("where its bitmap of RAM block \"vm0/vmem\" was expected"), "{error}");
}
