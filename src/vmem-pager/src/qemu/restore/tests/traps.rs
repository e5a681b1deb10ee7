//! Destinations that do what QEMU does not.

use std::io::Write;

use super::*;

/// What a restore ends with whose destination does `bad` once everything is loaded.
fn failure(sample: &Sample, how: How, bad: impl FnOnce(&mut fake::Main, &Fake)) -> PagerError {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::listen(dir.path());
    let restored = restore(sample, &dir, how);
    let (mut main, urgent) = fake.load(sample);
    let placing = main.place();
    bad(&mut main, &fake);
    let error = restored.join().unwrap().0.expect_err("it was restored");
    drop(main);
    placing.join().unwrap();
    urgent.join().unwrap();
    assert_eq!(fake.placed.lock().twice, []);
    error
}

/// So slow that the stream has not ended when something else happens.
fn slow() -> How {
    How { bandwidth: Some(1), ..How::default() }
}

#[test]
fn a_request_for_what_does_not_exist_is_named_and_ends_it() {
    let request = |block: Option<&str>, start, len| ReturnMessage::RequestPages {
        block: block.map(str::to_owned),
        start,
        len,
    };
    for (message, expected) in [
        (request(None, 0, 4096), "of the request before"),
        (request(Some("other"), 0, 4096), "\"other\""),
        (request(Some("ram"), 64 << 12, 4096), "0x40000 of block \"ram\""),
        (request(Some("ram"), u64::MAX - 4095, 4096), "block \"ram\""),
        (request(Some("ram"), 1, 4096), "pages have 4096 bytes"),
        (request(Some("ram"), 0, 8192), "pages have 4096 bytes"),
        (request(Some("ram"), 0, 0), "0x0 bytes"),
        (ReturnMessage::ResumeAck, "ResumeAck"),
        (ReturnMessage::RecvBitmap { block: "vm0/vmem".to_owned() }, "RecvBitmap"),
    ] {
        let error = failure(&Sample::new(true), slow(), |main, _| main.say(&message));
        assert_eq!(error.exit_status(), 1);
        let text = error.to_string();
        assert!(text.contains(expected) && text.contains("--recover"), "{message:?}: {text}");
    }
}

#[test]
fn what_is_not_a_message_ends_it() {
    let error = failure(&Sample::new(true), slow(), |main, _| {
        let _ = main.back.write_all(&[0xff; 64]);
    });
    assert!(error.to_string().contains("not a message of its return path"), "{error}");
}

#[test]
fn requests_that_repeat_are_answered_once() {
    let (sample, dir) = (Sample::new(true), tempfile::tempdir().unwrap());
    let fake = Fake::listen(dir.path());
    let restored = restore(&sample, &dir, How::default());
    let (mut main, _urgent) = fake.load(&sample);
    let placing = main.place();
    for _ in 0..2000 {
        main.ask(Some("ram"), 33);
        main.ask(Some("vm0/vmem"), 0);
    }
    fake.wait_for("ram", 33);
    fake.wait_ended();
    main.say(&ReturnMessage::Shut(0));
    restored.join().unwrap().0.unwrap();
    placing.join().unwrap();
    assert_eq!(fake.placed.lock().twice, []);
}

#[test]
fn a_flood_of_requests_whose_answers_are_not_read_is_bounded() {
    let mut sample = Sample::new(false);
    sample.blocks[1].pages = 1 << 20;
    let ask_for_all = |main: &mut fake::Main| {
        let mut bytes = Vec::new();
        for page in 0..70_000u64 {
            let (block, start) = (Some("ram".to_owned()), page << 12);
            ReturnMessage::RequestPages { block, start, len: 4096 }.put(&mut bytes);
        }
        let _ = main.back.write_all(&bytes);
    };
    // One channel, which is not read: the answers are queued.
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::listen(dir.path());
    let restored = restore(&sample, &dir, How::default());
    let mut main = fake.accept_main();
    main.greet();
    main.setup(&sample);
    main.say(&ReturnMessage::Pong(4));
    ask_for_all(&mut main);
    let error = restored.join().unwrap().0.unwrap_err().to_string();
    assert!(error.contains("more than 65536 page requests"), "{error}");

    // A channel for them, which is not read: they are not, either.
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::listen(dir.path());
    let how = How { silence: Some(SHORT_SILENCE), preempt: Some(true), ..How::default() };
    let restored = restore(&sample, &dir, how);
    let mut main = fake.accept_main();
    main.greet();
    let _urgent = fake.accept();
    main.setup(&sample);
    let _placing = main.place();
    ask_for_all(&mut main);
    let error = restored.join().unwrap().0.unwrap_err();
    assert_eq!(error.exit_status(), 3, "{error}");
}

#[test]
fn a_destination_that_never_says_that_it_has_everything_is_a_timeout() {
    let how = How { silence: Some(SHORT_SILENCE), ..How::default() };
    // Also while it asks for something all the time.
    let error = failure(&Sample::new(true), how, |main, fake| {
        fake.wait_ended();
        let ask = |n: u32| main.ask(Some("ram"), u64::from(n % 64));
        (0..20_000).for_each(ask);
    });
    assert_eq!(error.exit_status(), 3);
    assert!(error.to_string().contains("does not say that it has it"), "{error}");
}

#[test]
fn a_destination_that_is_silent_from_the_start_is_a_timeout() {
    let (sample, dir) = (Sample::new(true), tempfile::tempdir().unwrap());
    let fake = Fake::listen(dir.path());
    let how = How { silence: Some(SHORT_SILENCE), ..How::default() };
    let restored = restore(&sample, &dir, how);
    let main = fake.accept_main();
    let error = restored.join().unwrap().0.unwrap_err();
    assert_eq!(error.exit_status(), 3);
    assert!(error.to_string().contains("no guest was started"), "{error}");
    drop(main);
}

#[test]
fn a_destination_that_goes_before_the_guest_runs_has_started_none() {
    let (sample, dir) = (Sample::new(true), tempfile::tempdir().unwrap());
    let fake = Fake::listen(dir.path());
    let restored = restore(&sample, &dir, How::default());
    drop(fake.accept_main());
    let error = restored.join().unwrap().0.unwrap_err();
    assert_eq!(error.exit_status(), 1);
    assert!(error.to_string().contains("no guest was started"), "{error}");
}

#[test]
fn a_destination_that_goes_in_the_middle_has_the_guest_and_can_be_recovered() {
    let error = failure(&Sample::new(true), slow(), |main, fake| {
        main.say(&ReturnMessage::Pong(0x42));
        main.ask(Some("ram"), 40);
        fake.wait_for("ram", 40);
        main.back.shutdown(std::net::Shutdown::Both).unwrap();
    });
    assert_eq!(error.exit_status(), 1);
    assert!(error.to_string().contains("run this again with --recover"), "{error}");
}

#[test]
fn an_end_that_comes_too_early_or_with_an_error_is_none() {
    let error = failure(&Sample::new(true), slow(), |main, _| main.say(&ReturnMessage::Shut(0)));
    assert!(error.to_string().contains("before it was sent"), "{error}");
    let error = failure(&Sample::new(true), How::default(), |main, fake| {
        fake.wait_ended();
        main.say(&ReturnMessage::Shut(5));
    });
    assert!(error.to_string().contains("could not take the guest's memory (error 5)"), "{error}");
}

#[test]
fn an_image_that_can_no_longer_be_read_ends_it_and_is_named() {
    let (sample, dir) = (large(), tempfile::tempdir().unwrap());
    let fake = Fake::listen(dir.path());
    let restored = restore(&sample, &dir, slow());
    let (mut main, _urgent) = fake.load(&sample);
    let _placing = main.place();
    std::fs::File::options()
        .write(true)
        .open(dir.path().join("guest.img"))
        .unwrap()
        .set_len(5000)
        .unwrap();
    main.ask(Some("big"), 599);
    let error = restored.join().unwrap().0.unwrap_err();
    assert!(matches!(error, PagerError::File { .. }), "{error}");
    assert!(!fake.has("big", 599), "what cannot be read became zeros");
}
