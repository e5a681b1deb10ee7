//! Streams that nothing comes back from.

use super::*;
use crate::inspect::inspect;
use crate::postcopy::{GiveUp, PostcopyOutgoing, SwitchWhen};
use std::fs::File;
use std::os::fd::OwnedFd;

fn one_way() -> Parameters {
    Parameters { one_way: true, ..parameters() }
}

fn filled() -> Side {
    let from = Side::new(&[1, 4, 5]);
    fill(&from.region, 64..96, 7);
    fill(&from.boot, 3..5, 5);
    from
}

#[test]
fn a_guest_goes_down_a_pipe() {
    let (from, to) = (filled(), Side::new(&[1, 4, 5]));
    let (reader, writer) = io::pipe().unwrap();
    let progress = Arc::new(Progress::new());
    let (script, channels) = (Script::default(), (writer.into(), reader.into()));
    let run = migrate_by(one_way(), &from, &to, &script, Witness::default(), progress, channels);
    run.outgoing.unwrap();
    run.incoming.unwrap();
    assert_eq!(to.page(95), [7; 4096]);
    assert_eq!(to.resident(), (32, 2));
    // It does not continue here.
    assert_eq!(run.source.log(), ["freeze", "stop", "thaw"]);
    assert_eq!(run.destination.log(), ["run"]);
    assert_eq!(run.sent.status, Status::Completed);
}

#[test]
fn a_pipe_that_is_closed_gives_the_guest_back() {
    let from = filled();
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let (outcome, log) = save(&from, writer);
    assert!(matches!(outcome, Err(MigrationError::Io { .. })), "{outcome:?}");
    let count = |what| log.iter().filter(|&&call| call == what).count();
    assert_eq!(count("stop"), count("run"));

    // With the guest stopped.
    let (near, far) = UnixStream::pair().unwrap();
    let mut reading = far.try_clone().unwrap();
    let reader = thread::spawn(move || io::copy(&mut reading, &mut io::sink()));
    let closes: Box<dyn FnOnce() + Send> =
        Box::new(move || far.shutdown(std::net::Shutdown::Both).unwrap());
    let guest = Witness { last_words: Mutex::new(Some(closes)), ..Witness::default() };
    let (outcome, log) = save_of(&from, near, &guest);
    assert!(matches!(outcome, Err(MigrationError::Io { .. })), "{outcome:?}");
    assert_eq!(log, ["stop", "run"]);
    reader.join().unwrap().unwrap();
}

fn save(from: &Side, fd: impl Into<OwnedFd>) -> (Outcome, Vec<&'static str>) {
    save_of(from, fd, &Witness::default())
}

fn save_of(from: &Side, fd: impl Into<OwnedFd>, guest: &Witness) -> (Outcome, Vec<&'static str>) {
    let progress = Arc::new(Progress::new());
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Script>::default() };
    let options = ListOptions::default();
    let ram = RamSave::new(&from.blocks, options, Arc::clone(&progress), tracker).unwrap();
    let outgoing = Outgoing {
        parameters: one_way(),
        guest,
        handlers: vec![Box::new(ram)],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    let outcome = outgoing.run(Channel::new(fd, progress).unwrap());
    (outcome.map_err(|failed| failed.error), guest.log())
}

#[test]
fn a_guest_is_saved_to_a_file_and_comes_back_from_it() {
    let from = filled();
    let file = tempfile::NamedTempFile::new().unwrap();
    save(&from, file.reopen().unwrap()).0.unwrap();
    let seen = inspect(File::open(file.path()).unwrap());
    assert!(seen.error.is_none(), "{:?}", seen.error);
    let commands: Vec<_> = seen.commands.into_iter().map(|(_, command)| command).collect();
    assert_eq!(commands, [crate::stream::Command::SwitchoverStart]);

    let to = Side::new(&[1, 4, 5]);
    let progress = Arc::new(Progress::new());
    let options = ListOptions::default();
    let ram = RamLoad::new(Arc::clone(&to.blocks), options, Arc::clone(&progress));
    let guest = Witness::default();
    let incoming = Incoming {
        configuration: Configuration::new("test"),
        guest: &guest,
        handlers: vec![Box::new(ram)],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    incoming.run(Channel::new(file.reopen().unwrap(), progress).unwrap()).unwrap();
    assert_eq!(to.resident(), (32, 2));
    assert_eq!(guest.log(), ["run"]);
}

#[test]
fn postcopy_is_refused_where_it_is_not_possible() {
    let refused = |parameters: Parameters| {
        let from = filled();
        let progress = Arc::new(Progress::new());
        let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Script>::default() };
        let options = ListOptions::of(&parameters.configuration);
        let ram = RamSave::new(&from.blocks, options, Arc::clone(&progress), tracker).unwrap();
        let guest = Witness::default();
        let (near, far) = UnixStream::pair().unwrap();
        let outgoing = Outgoing {
            parameters,
            guest: &guest,
            handlers: vec![Box::new(ram)],
            devices: &mut NoDevices,
            postcopy: Some(PostcopyOutgoing {
                when: SwitchWhen::Told,
                urgent: None,
                reconnect: Box::new(GiveUp),
            }),
            progress: Arc::clone(&progress),
        };
        let error = outgoing.run(Channel::new(near, progress).unwrap()).unwrap_err();
        let mut sent = Vec::new();
        io::Read::read_to_end(&mut &far, &mut sent).unwrap();
        assert_eq!(sent, b"");
        error.error.to_string()
    };
    let expected = "postcopy-ram needs return-path, and the stream goes one way";
    assert_eq!(refused(one_way()), expected);
    let mut shared = parameters();
    shared.configuration.capabilities.push("x-ignore-shared".to_owned());
    let expected = "postcopy-ram and x-ignore-shared exclude each other: switch one of them off";
    assert_eq!(refused(shared), expected);
}
