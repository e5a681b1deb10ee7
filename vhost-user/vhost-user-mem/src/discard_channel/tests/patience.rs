//! Clients that keep the guest waiting, and what they get for it.

use super::*;

/// Answers every event after a pause that depends on its number; the events that it answered.
fn answer_slowly(
    mut raw: Raw,
    pause: impl Fn(u64) -> Duration + Send + 'static,
) -> JoinHandle<Vec<u64>> {
    thread::spawn(move || {
        let mut answered = Vec::new();
        while let Ok((message, _)) = raw.frames.next_with_fd(&raw.stream, Instant::now() + SOON) {
            let (ServerMessage::Populate { event, .. } | ServerMessage::Discard { event, .. }) =
                message
            else {
                break;
            };
            thread::sleep(pause(event));
            if send(&raw.stream, &ClientMessage::Ack { event }).is_err() {
                break;
            }
            answered.push(event);
        }
        answered
    })
}

/// While one is waited for, the other regains nothing: the guest waits for one budget, and not for
/// one a range.
#[test]
fn clients_that_are_slow_in_turn_cost_one_budget_for_a_whole_change() {
    const BLOCKS: u64 = 4096;
    let rig = rig_with(BLOCKS, 4096, LIMITS);
    let mut state = rig.controller.save_state();
    state.plugged = in_tatters(BLOCKS);
    rig.controller.load_state(state).unwrap();
    let quick = answer_slowly(Raw::attached(&rig), |_| Duration::ZERO);
    let slow = |turn: u64| {
        answer_slowly(Raw::attached(&rig), move |event| match event % 2 == turn {
            true => Duration::from_millis(800),
            false => Duration::ZERO,
        })
    };
    let slow = [slow(0), slow(1)];
    assert_eq!(rig.controller.execute(Request::UnplugAll), Response::Ack);
    assert_eq!(rig.dropped(), 2, "those that used the budget up");
    // 2048 ranges, of which an event tells 255: one after the other, that is 9 times 800 ms.
    let waited = rig.metric("discard_client_wait_seconds_total");
    assert!(waited < 3.0, "{waited}");
    for slow in slow {
        assert!(slow.join().unwrap().len() < 9);
    }
    drop(rig.channel);
    assert_eq!(quick.join().unwrap().len(), 9, "one that answers is not dropped with them");
}

#[test]
fn a_client_that_was_dropped_is_not_let_in_again_at_once() {
    let rig = rig_with(NR, BLOCK, Limits { pause: Duration::from_secs(3600), ..LIMITS });
    let bystander = rig.attach();
    let raw = Raw::attached(&rig);
    raw.say(&ClientMessage::Ack { event: 9 });
    raw.assert_left(Farewell::Protocol);
    for _ in 0..3 {
        let refused = RemoteRamDiscardManager::attach(rig.connect(), SOON).err().unwrap();
        let text = refused.to_string();
        assert!(text.contains("Paused") && text.contains("try again in 3"), "{text}");
    }
    assert_eq!(rig.metric("discard_clients_turned_away_total"), 3.0);
    assert_eq!(rig.dropped(), 1);
    assert_eq!(rig.plug(0, 1), Response::Ack);
    assert_eq!(bystander.words().unwrap(), [1], "a client that is there already stays");
}

/// Also one that leaves while it is told something.
#[test]
fn a_client_that_leaves_may_come_again_at_once() {
    let rig = rig_with(NR, BLOCK, Limits { pause: Duration::from_secs(3600), ..LIMITS });
    for block in 0..4 {
        drop(Raw::attached(&rig));
        let client = rig.attach();
        assert_eq!(rig.plug(block, 1), Response::Ack);
        drop(client);
    }
    assert_eq!(rig.dropped(), 0);
    assert_eq!(rig.metric("discard_clients_turned_away_total"), 0.0);
}
