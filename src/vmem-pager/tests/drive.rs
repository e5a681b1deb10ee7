//! A save with QEMU's control socket, and a QEMU that says what it is told to. In this process, so that silence
//! need not last.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use clap::Parser;
use common::process::{hear, names, send};
use common::source::{Source, content, state};
use migration::stream::{ReturnMessage, SectionKind};
use serde_json::{Value, json};
use vmem_pager::PagerError;
use vmem_pager::cli::args::{Args, Command, SaveArgs};
use vmem_pager::cli::report::Report;
use vmem_pager::qemu::save::{SaveMetrics, run};
use vmem_pager::run::Run;
use vmem_pager::socket::Address;

const SILENCE: Duration = Duration::from_millis(300);

fn args(dir: &Path, qmp: Option<PathBuf>) -> SaveArgs {
    let path = |name| dir.join(name).display().to_string();
    let mut words = ["vmem-pager", "save", "--vmm", "qemu", "--socket"].map(str::to_owned).to_vec();
    words.extend([path("vm.sock"), "--image".to_owned(), path("image")]);
    words.extend(qmp.into_iter().flat_map(|qmp| ["--qmp".to_owned(), qmp.display().to_string()]));
    match Args::parse_from(words).command {
        Command::Save(args) => args,
        other => panic!("{other:?}"),
    }
}

/// Saves, with as little patience.
fn save(dir: &Path, qmp: Option<PathBuf>) -> Result<(), PagerError> {
    let run_of = Run::with_silence(None, SILENCE);
    run(&args(dir, qmp), &run_of, &Report::silent(), &SaveMetrics::new())
}

fn stream() -> Source {
    Source::new().return_path().ram(&[("ram", 1 << 20)]).section(SectionKind::Part)
}

/// Gives each line that is written to it to a test.
struct Lines(mpsc::Sender<String>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.send(String::from_utf8_lossy(bytes).into_owned());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_source_may_come_by_tcp() {
    let dir = tempfile::tempdir().unwrap();
    let mut args = args(dir.path(), None);
    args.common.socket = Address::Tcp("127.0.0.1:0".to_owned());
    let (lines, told) = mpsc::channel();
    let report = Report::to(Box::new(Lines(lines)), Box::new(std::io::sink()), true);
    let saving = thread::spawn(move || {
        let metrics = SaveMetrics::new();
        run(&args, &Run::new(None), &report, &metrics).map_err(|error| error.to_string())
    });
    let address = told.iter().find_map(|text| {
        let rest = text.split_once("tcp:")?.1;
        Some(rest.split_once('"').map_or(rest, |(address, _)| address).to_owned())
    });
    let mut source = TcpStream::connect(address.unwrap()).unwrap();
    source
        .write_all(&stream().page("ram", 0, Some(&content(1))).end_section().end(&state()).bytes)
        .unwrap();
    let mut heard = Vec::new();
    source.read_to_end(&mut heard).unwrap();
    let mut wanted = Vec::new();
    ReturnMessage::Pong(1).put(&mut wanted);
    ReturnMessage::Shut(0).put(&mut wanted);
    assert_eq!(heard, wanted);
    saving.join().unwrap().unwrap();
    assert_eq!(names(dir.path()), ["image"]);
}

/// A QEMU: it answers commands, and does `migrate` when it is asked to.
struct Qemu {
    asked: Arc<Mutex<Vec<Value>>>,
    thread: JoinHandle<()>,
}

impl Qemu {
    /// `refuses` is the command that it does not carry out; `migrate` gets the channel, and says how it ended.
    fn start(path: &Path, refuses: &'static str, migrate: fn(UnixStream) -> &'static str) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&asked);
        let thread = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap());
            let mut stream = stream;
            writeln!(stream, "{}", json!({ "QMP": { "capabilities": ["oob"] } })).unwrap();
            let status = Arc::new(Mutex::new("none"));
            loop {
                let mut line = String::new();
                if lines.read_line(&mut line).unwrap_or(0) == 0 {
                    return;
                }
                let request: Value = serde_json::from_str(&line).unwrap();
                let (id, command) = (&request["id"], request["execute"].as_str().unwrap());
                let answer = match command {
                    _ if command == refuses => {
                        json!({ "error": { "class": "GenericError", "desc": "not today" }, "id": id })
                    }
                    "query-migrate" => {
                        let status = *status.lock().unwrap();
                        let mut answer = json!({ "status": status });
                        if status == "failed" {
                            answer["error-desc"] = "the disk of dreams is full".into();
                        }
                        json!({ "return": answer, "id": id })
                    }
                    "query-migrate-capabilities" => {
                        let one = |name, state| json!({ "capability": name, "state": state });
                        let all = [
                            one("return-path", false),
                            one("mapped-ram", true),
                            one("multifd", true),
                        ];
                        json!({ "return": all, "id": id })
                    }
                    "migrate" => {
                        let uri = request["arguments"]["uri"].as_str().unwrap().to_owned();
                        *status.lock().unwrap() = "active";
                        let status = Arc::clone(&status);
                        thread::spawn(move || {
                            let channel = UnixStream::connect(uri.strip_prefix("unix:").unwrap());
                            let ended = migrate(channel.unwrap());
                            *status.lock().unwrap() = ended;
                        });
                        json!({ "return": {}, "id": id })
                    }
                    _ => json!({ "return": {}, "id": id }),
                };
                all.lock().unwrap().push(request.clone());
                if writeln!(stream, "{answer}").is_err() {
                    return;
                }
            }
        });
        Self { asked, thread }
    }

    fn asked(self, command: &str) -> Vec<Value> {
        self.thread.join().unwrap();
        let asked = self.asked.lock().unwrap();
        asked
            .iter()
            .filter(|one| one["execute"] == command)
            .map(|one| one["arguments"].clone())
            .collect()
    }
}

#[test]
fn qemu_is_set_up_and_migrates_by_one_command() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qmp");
    let qemu = Qemu::start(&socket, "", |mut channel| {
        send(
            &mut channel,
            &stream().page("ram", 0, Some(&content(1))).end_section().end(&state()).bytes,
        );
        assert_eq!(hear(&mut channel), Some(ReturnMessage::Pong(1)));
        assert_eq!(hear(&mut channel), Some(ReturnMessage::Shut(0)));
        "completed"
    });
    save(dir.path(), Some(socket)).unwrap();
    let uri = format!("unix:{}", dir.path().join("vm.sock").display());
    let set = qemu.asked.lock().unwrap().clone();
    assert_eq!(qemu.asked("migrate"), [json!({ "uri": uri })]);
    let one = |name: &str, state: bool| json!({ "capability": name, "state": state });
    let sets: Vec<Value> = set
        .iter()
        .filter(|one| one["execute"] == "migrate-set-capabilities")
        .map(|one| one["arguments"]["capabilities"].clone())
        .collect();
    let wanted = json!([one("return-path", true), one("mapped-ram", false)]);
    let before = json!([one("return-path", false), one("mapped-ram", true)]);
    assert_eq!(sets, [wanted, before]);
    assert_eq!(names(dir.path()), ["image", "qmp"]);
}

#[test]
fn what_qemu_refuses_is_told_in_its_words_and_nothing_is_left() {
    for command in ["migrate-set-capabilities", "migrate"] {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let qemu = Qemu::start(&socket, command, |_| "none");
        let error = save(dir.path(), Some(socket)).unwrap_err();
        assert_eq!(error.to_string(), format!("QEMU refused {command}: GenericError: not today"));
        assert_eq!(qemu.asked(command).len(), 1);
        assert_eq!(names(dir.path()), ["qmp"]);
    }
}

#[test]
fn a_migration_that_fails_at_qemu_ends_the_save_in_its_words() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qmp");
    let qemu = Qemu::start(&socket, "", |mut channel| {
        send(&mut channel, &stream().bytes);
        thread::sleep(Duration::from_millis(50));
        drop(channel);
        "failed"
    });
    let error = save(dir.path(), Some(socket)).unwrap_err();
    assert!(error.to_string().contains("the disk of dreams is full"), "{error}");
    assert_eq!(qemu.asked("migrate_cancel").len(), 1);
    assert_eq!(names(dir.path()), ["qmp"]);
}

#[test]
fn a_source_that_is_silent_is_given_up_and_told() {
    for sent in
        [stream().bytes, stream().end_section().section(SectionKind::End).end_section().bytes]
    {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vm.sock");
        let path = socket.clone();
        let source = thread::spawn(move || {
            let mut channel = loop {
                match UnixStream::connect(&path) {
                    Ok(channel) => break channel,
                    Err(_) => thread::sleep(Duration::from_millis(10)),
                }
            };
            send(&mut channel, &sent);
            [hear(&mut channel), hear(&mut channel)]
        });
        let error = save(dir.path(), None).unwrap_err();
        assert_eq!(error.exit_status(), 3, "{error}");
        assert!(error.to_string().contains("next to nothing, where"), "{error}");
        let told = [ReturnMessage::Pong(1), ReturnMessage::Shut(1)].map(Some);
        assert_eq!(source.join().unwrap(), told);
        assert!(names(dir.path()).is_empty());
    }
}

#[test]
fn a_source_that_sends_a_byte_now_and_then_is_given_up_and_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.sock");
    let source = thread::spawn(move || {
        let mut channel = loop {
            match UnixStream::connect(&path) {
                Ok(channel) => break channel,
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        };
        send(&mut channel, &stream().bytes);
        assert_eq!(hear(&mut channel), Some(ReturnMessage::Pong(1)));
        // Less than a page in all of the time that the pager has.
        for byte in Source::default().page("ram", 0, Some(&content(1))).bytes {
            if channel.write_all(&[byte]).is_err() {
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
    });
    let error = save(dir.path(), None).unwrap_err();
    assert_eq!(error.exit_status(), 3, "{error}");
    assert!(error.to_string().contains("next to nothing, where"), "{error}");
    source.join().unwrap();
    assert!(names(dir.path()).is_empty());
}
