//! Servers that end, hang, or break the protocol.

use super::*;

pub(super) fn assert_unavailable(manager: &RemoteRamDiscardManager) {
    let visit = &mut |_| ControlFlow::Continue(());
    let all = section(0, NR);
    assert!(manager.is_populated(all).is_err());
    assert!(manager.replay_populated(all, visit).is_err());
    assert!(manager.replay_discarded(all, visit).is_err());
    assert!(manager.words().is_err());
    assert!(manager.sizes().is_err());
    assert!(manager.freeze(FreezeFor::Source).is_err());
    assert!(manager.freeze(FreezeFor::Destination).is_err());
    let registered = manager.register(all, Recorder::boxed("late", &Calls::default()));
    assert!(matches!(registered, Err(RegisterError::Unavailable(_))));
    let another = LocalRamDiscardManager::new(all.end());
    let id = another.register(all, Recorder::boxed("another", &Calls::default())).unwrap();
    let unregistered = manager.unregister(id);
    assert!(matches!(unregistered, Err(RegisterError::Unavailable(_))));
}

pub(super) fn wait_lost(manager: &RemoteRamDiscardManager) -> String {
    let start = Instant::now();
    loop {
        if let Some(reason) = manager.lost() {
            return reason;
        }
        assert!(start.elapsed() < PATIENCE, "the connection is not lost");
        thread::yield_now();
    }
}

/// Sends on what it is told of the end.
struct Mourner(&'static str, mpsc::Sender<(&'static str, String)>);

impl RamDiscardListener for Mourner {
    fn name(&self) -> &str {
        self.0
    }

    fn notify_populate(&mut self, _section: Section) -> Result<(), String> {
        Ok(())
    }

    fn notify_discard(&mut self, _section: Section) {}

    fn notify_lost(&mut self, reason: &str) {
        self.1.send((self.0, reason.to_owned())).unwrap();
    }
}

#[test]
fn listeners_are_told_once_that_the_server_has_gone() {
    let (server, manager) = pair();
    let (told, hears) = mpsc::channel();
    for name in ["first", "second"] {
        manager.register(section(0, NR), Box::new(Mourner(name, told.clone()))).unwrap();
    }
    drop(server);
    let reason = wait_lost(&manager);
    for name in ["second", "first"] {
        assert_eq!(hears.recv_timeout(PATIENCE).unwrap(), (name, reason.clone()));
    }
    // Also those who would come too late find out.
    assert!(manager.register(section(0, NR), Box::new(Mourner("late", told.clone()))).is_err());
    drop((manager, told));
    assert!(hears.recv().is_err());
}

#[test]
fn a_manager_that_is_dropped_tells_nobody_of_its_end() {
    let (_server, manager) = pair();
    let (told, hears) = mpsc::channel();
    manager.register(section(0, NR), Box::new(Mourner("dma", told))).unwrap();
    drop(manager);
    assert!(hears.recv().is_err());
}

#[test]
fn after_the_server_has_gone_everything_is_unavailable() {
    let (server, manager) = pair();
    manager.register(section(0, NR), Recorder::boxed("dma", &Calls::default())).unwrap();
    drop(server);
    wait_lost(&manager);
    assert_unavailable(&manager);
}

#[test]
fn a_server_that_breaks_the_protocol_is_left() {
    let unaligned = Section::new(1, BLOCK).unwrap();
    let populate = |event, section| ServerMessage::Populate {
        event,
        sections: Sections::from_slice(&[self::section(5, 6), section]),
    };
    let wrong: [(&str, Vec<ServerMessage>); 5] = [
        ("not whole blocks", vec![populate(1, unaligned)]),
        ("not whole blocks", vec![populate(1, section(NR, NR + 1))]),
        ("event 1 after event 1", vec![populate(1, section(0, 1)), populate(1, section(1, 2))]),
        ("which is none", vec![ServerMessage::Done { id: 9 }]),
        (
            "ends now",
            vec![ServerMessage::Goodbye {
                cause: Farewell::Ending,
                min_version: 1,
                max_version: 1,
                reason: "it ends now".to_owned(),
            }],
        ),
    ];
    for (expected, messages) in wrong {
        let (server, manager) = pair();
        messages.iter().for_each(|message| server.send(message));
        let reason = wait_lost(&manager);
        assert!(reason.contains(expected), "{reason}");
        assert_unavailable(&manager);
    }
    let (server, manager) = pair();
    rustix::io::write(&server.stream, &[0x63, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    assert!(wait_lost(&manager).contains("unknown message 0x63"));
}

#[test]
fn a_server_that_does_not_answer_is_left_and_a_freeze_with_it() {
    let (mut server, manager) = pair_with(Duration::from_millis(50));
    assert!(manager.freeze(FreezeFor::Source).is_err());
    assert_unavailable(&manager);
    assert!(matches!(server.receive(), ClientMessage::Freeze { .. }));
    let end = server.frames.next::<ClientMessage>(&server.stream);
    assert!(matches!(end, Err(ReceiveError::Closed)));
}

#[test]
fn a_bitmap_that_stays_in_the_middle_of_a_change_is_not_waited_for_forever() {
    let file = memfd_create("stuck", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let file = File::from(file);
    file.set_len(file_size(NR as usize)).unwrap();
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).unwrap();
    let words = SharedWords::map(&file, HEADER_WORDS).unwrap();
    let header = [u64::from_le_bytes(*b"VMEMBITS"), 1, NR, BLOCK, 1];
    for (word, value) in words.words().iter().zip(header) {
        word.store(value, Ordering::Relaxed);
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        welcome(&ours, file.as_fd());
        ours
    });
    let manager = RemoteRamDiscardManager::attach(theirs, Duration::from_millis(50)).unwrap();
    let _stream = server.join().unwrap();
    assert!(manager.words().is_err());
    assert_unavailable(&manager);
}

#[test]
fn a_server_that_is_silent_or_none_is_an_error() {
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let error = RemoteRamDiscardManager::attach(theirs, Duration::from_millis(20)).err().unwrap();
    assert!(matches!(error, AttachError::Receive(ReceiveError::TimedOut)), "{error}");
    let (ours, theirs) = UnixStream::pair().unwrap();
    rustix::io::write(&ours, b"HTTP/1.1 400 Bad Request\r\n").unwrap();
    let error = RemoteRamDiscardManager::attach(theirs, PATIENCE).err().unwrap();
    assert!(matches!(error, AttachError::Receive(ReceiveError::Wire(_))), "{error}");
    let (ours, theirs) = UnixStream::pair().unwrap();
    send(&ours, &ServerMessage::Done { id: 1 }).unwrap();
    let error = RemoteRamDiscardManager::attach(theirs, PATIENCE).err().unwrap();
    assert!(matches!(error, AttachError::Protocol(_)), "{error}");
}
