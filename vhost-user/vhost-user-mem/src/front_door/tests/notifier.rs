//! The sender of configuration changes against all kinds of front-ends.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

use super::super::Notifier;
use super::super::message::Header;
use super::harness::Peer;

fn attached(reply_ack: bool) -> (Notifier, Peer) {
    let notifier = Notifier::new().unwrap();
    let (channel, theirs) = UnixStream::pair().unwrap();
    notifier.attach(theirs.into(), reply_ack);
    notifier.resume();
    (notifier, Peer::new(channel))
}

fn message(peer: &Peer) -> Header {
    assert!(peer.readable(5000), "no message");
    peer.receive().unwrap().header
}

fn assert_ends(notifier: &Notifier) {
    let start = Instant::now();
    notifier.shutdown();
    assert!(start.elapsed() < Duration::from_secs(1));
}

#[test]
fn acknowledged_messages_go_on() {
    let (notifier, peer) = attached(true);
    for status in [0u64, 1, 0] {
        notifier.notify();
        assert_eq!(message(&peer), Header::request(2, 0).asking());
        // Nothing more before the answer.
        notifier.notify();
        assert!(!peer.readable(50));
        peer.send(Header::reply(2, 8), &status.to_le_bytes(), &[]);
        assert_eq!(message(&peer), Header::request(2, 0).asking());
        peer.send(Header::reply(2, 8), &status.to_le_bytes(), &[]);
    }
    assert!(!peer.readable(50));
    assert_ends(&notifier);
}

#[test]
fn who_never_acknowledges_is_no_longer_asked() {
    let (notifier, peer) = attached(true);
    notifier.notify();
    assert_eq!(message(&peer), Header::request(2, 0).asking());
    notifier.notify();
    assert_eq!(message(&peer), Header::request(2, 0));
    // Late answers are taken from the socket, however many.
    peer.stream.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
    for _ in 0..100 {
        (&peer.stream).write_all(&[0; 65536]).unwrap();
    }
    notifier.notify();
    assert_eq!(message(&peer), Header::request(2, 0));
    assert_ends(&notifier);
}

#[test]
fn a_wait_for_an_answer_does_not_delay_others() {
    let (notifier, peer) = attached(true);
    notifier.notify();
    message(&peer);
    let start = Instant::now();
    notifier.suspend();
    notifier.resume();
    notifier.notify();
    assert!(start.elapsed() < Duration::from_millis(500));
    assert_ends(&notifier);
}

#[test]
fn a_closed_channel_keeps_what_is_pending() {
    let (notifier, peer) = attached(false);
    drop(peer);
    notifier.notify();
    sleep(Duration::from_millis(20));
    notifier.notify();
    let (channel, theirs) = UnixStream::pair().unwrap();
    notifier.attach(theirs.into(), false);
    assert_eq!(message(&Peer::new(channel)), Header::request(2, 0));
}

#[test]
fn without_a_channel_it_waits_for_one() {
    let notifier = Notifier::new().unwrap();
    notifier.notify();
    let (channel, theirs) = UnixStream::pair().unwrap();
    notifier.attach(theirs.into(), false);
    let peer = Peer::new(channel);
    assert!(!peer.readable(50), "no ring runs yet");
    notifier.resume();
    assert_eq!(message(&peer), Header::request(2, 0));
    notifier.detach();
    assert!(peer.receive().is_none());
}

#[test]
fn a_full_socket_is_tried_again() {
    let (channel, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    // Whole messages, so that the front-end finds its way.
    let filler = Header::request(2, 0).to_bytes();
    let mut fillers = 0;
    while (&theirs).write(&filler).is_ok() {
        fillers += 1;
    }
    let notifier = Notifier::new().unwrap();
    notifier.attach(theirs.into(), false);
    notifier.resume();
    notifier.notify();
    sleep(Duration::from_millis(50));
    let peer = Peer::new(channel);
    for _ in 0..fillers {
        message(&peer);
    }
    assert_eq!(message(&peer), Header::request(2, 0));
    assert!(!peer.readable(50));
}

#[test]
fn a_full_socket_does_not_hold_the_end_up() {
    let (_channel, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    while (&theirs).write(&[0]).is_ok() {}
    let notifier = Notifier::new().unwrap();
    notifier.attach(theirs.into(), true);
    notifier.resume();
    notifier.notify();
    assert_ends(&notifier);
}

#[test]
fn nothing_is_sent_after_suspend() {
    let (notifier, peer) = attached(false);
    let notifier = Arc::new(notifier);
    for _ in 0..100 {
        let other = Arc::clone(&notifier);
        let hammer = spawn(move || (0..50).for_each(|_| other.notify()));
        notifier.suspend();
        let mut sent = 0;
        while peer.readable(0) {
            peer.receive().unwrap();
            sent += 1;
        }
        hammer.join().unwrap();
        notifier.notify();
        assert!(!peer.readable(2), "{sent} came before, one after suspend");
        notifier.resume();
        message(&peer);
    }
}

#[test]
fn the_last_call_is_followed_by_a_message() {
    let (notifier, peer) = attached(true);
    let notifier = Arc::new(notifier);
    let reader = peer;
    let consumer = spawn(move || {
        let mut count = 0;
        while reader.readable(500) {
            reader.receive().unwrap();
            reader.send(Header::reply(2, 8), &[0; 8], &[]);
            count += 1;
        }
        (count, reader)
    });
    let hammers: Vec<_> = (0..4)
        .map(|_| {
            let notifier = Arc::clone(&notifier);
            spawn(move || (0..10_000).for_each(|_| notifier.notify()))
        })
        .collect();
    hammers.into_iter().for_each(|hammer| hammer.join().unwrap());
    let (count, reader) = consumer.join().unwrap();
    assert!((1..=40_000).contains(&count));
    // Nothing is pending any more.
    notifier.suspend();
    notifier.resume();
    assert!(!reader.readable(50));
}
