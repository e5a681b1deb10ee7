//! What a QEMU that a guest is restored to is told, and what its answers lead to.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;

use parking_lot::Mutex;
use serde_json::{Value, json};

use super::*;

/// A QEMU that answers each request as `answer` has it: what is returned, or the words of an error.
struct Qemu {
    destination: Destination,
    asked: Arc<Mutex<Vec<Value>>>,
    _dir: TempDir,
}

type Answer = Result<Value, &'static str>;

impl Qemu {
    fn start(mut answer: impl FnMut(&str, &Value) -> Answer + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&asked);
        thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            writeln!(stream, "{}", json!({ "QMP": { "capabilities": ["oob"] } })).unwrap();
            for line in lines.map_while(Result::ok) {
                let request: Value = serde_json::from_str(&line).unwrap();
                let command = request["execute"].as_str().or(request["exec-oob"].as_str());
                let command = command.unwrap().to_owned();
                let mut answered = match command.as_str() {
                    "qmp_capabilities" => json!({ "return": {} }),
                    _ => match answer(&command, &request["arguments"]) {
                        Ok(answer) => json!({ "return": answer }),
                        Err(desc) => json!({ "error": { "class": "GenericError", "desc": desc } }),
                    },
                };
                answered["id"] = request["id"].clone();
                all.lock().push(request);
                if writeln!(stream, "{answered}").is_err() {
                    return;
                }
            }
        });
        let run = Run::with_silence(None, SHORT_SILENCE);
        let destination = Destination::connect(&path, &run, &Report::silent()).unwrap();
        Self { destination, asked, _dir: dir }
    }

    /// The arguments of all commands of this name.
    fn asked(&self, command: &str) -> Vec<Value> {
        let asked = self.asked.lock();
        let of_name =
            asked.iter().filter(|one| one["execute"] == command || one["exec-oob"] == command);
        of_name.map(|one| one["arguments"].clone()).collect()
    }
}

fn address() -> Address {
    Address::Unix("/run/vm.sock".into())
}

fn capability(arguments: &Value, name: &str) -> Option<bool> {
    let all = arguments["capabilities"].as_array()?;
    all.iter().find(|one| one["capability"] == name)?["state"].as_bool()
}

#[test]
fn a_qemu_without_postcopy_preempt_is_served_by_one_channel() {
    for has_it in [true, false] {
        let qemu = Qemu::start(move |command, arguments| match command {
            "query-migrate-capabilities" => {
                Ok(json!([{ "capability": "mapped-ram", "state": true }]))
            }
            "migrate-set-capabilities"
                if !has_it && capability(arguments, "postcopy-preempt") == Some(true) =>
            {
                Err("no such capability")
            }
            _ => Ok(json!({})),
        });
        assert_eq!(qemu.destination.prepare(&address(), true, true).unwrap(), has_it);
        let sets = qemu.asked("migrate-set-capabilities");
        let set = |name: &str| sets.iter().find_map(|arguments| capability(arguments, name));
        assert_eq!((set("postcopy-ram"), set("mapped-ram")), (Some(true), Some(false)));
        // It was saved while it was paused, and postcopy would start it.
        assert_eq!(qemu.asked("stop").len(), 1);
        let incoming = json!({ "uri": "unix:/run/vm.sock", "exit-on-error": false });
        assert_eq!(qemu.asked("migrate-incoming"), [incoming]);
    }
}

#[test]
fn a_recovery_waits_until_qemu_has_seen_that_the_other_pager_is_gone() {
    let mut refusals = 2;
    let qemu = Qemu::start(move |_, _| {
        refusals -= 1;
        match refusals {
            0.. => Err("Migrate recover can only be run when postcopy is paused."),
            _ => Ok(json!({})),
        }
    });
    qemu.destination.recover(&address()).unwrap();
    assert_eq!(qemu.asked("migrate-recover"), vec![json!({ "uri": "unix:/run/vm.sock" }); 3]);
    let qemu = Qemu::start(|_, _| Err("Migrate recovery is triggered already"));
    qemu.destination.recover(&address()).unwrap();
}

#[test]
fn the_end_of_a_migration_is_waited_for_and_a_failure_is_told_in_qemus_words() {
    let mut states = ["active", "completed"].into_iter();
    let qemu = Qemu::start(move |_, _| Ok(json!({ "status": states.next() })));
    qemu.destination.wait_completed().unwrap();
    let qemu = Qemu::start(|_, _| Ok(json!({ "status": "failed", "error-desc": "out of luck" })));
    let error = qemu.destination.wait_completed().unwrap_err();
    assert!(error.to_string().contains("out of luck"), "{error}");
    let lost = qemu.destination.explain(PagerError::Peer("QEMU closed the connection".to_owned()));
    assert_eq!(lost.to_string(), "QEMU closed the connection; QEMU says: out of luck");
    let sizes = "Postcopy needs matching RAM page sizes (s=1000 d=201000)";
    let qemu = Qemu::start(move |_, _| Ok(json!({ "status": "failed", "error-desc": sizes })));
    let lost = qemu.destination.explain(PagerError::Peer("QEMU failed".to_owned())).to_string();
    assert!(lost.contains("restore to it with --eager"), "{lost}");
    let qemu = Qemu::start(|_, _| Ok(json!({ "status": "active" })));
    assert_eq!(qemu.destination.wait_completed().unwrap_err().exit_status(), 3);
}

/// Two devices that are behind: one with an id, one that only its address tells from others.
#[test]
fn sizes_are_requested_again_of_every_device_that_is_behind() {
    let mut sizes = [0, 0, 7];
    let qemu = Qemu::start(move |command, arguments| {
        let device = |id: Value, memaddr: u64, requested: u64, size: u64| {
            json!({ "type": "virtio-mem", "data": {
                "id": id, "memaddr": memaddr, "requested-size": requested, "size": size
            } })
        };
        let path = arguments["path"].as_str().unwrap_or_default();
        Ok(match command {
            "query-memory-devices" => json!([
                { "type": "dimm", "data": { "id": "d0", "size": 4 } },
                device("vm0".into(), 0x1000, 5, sizes[0]),
                device(Value::Null, 0x3000, 6, sizes[1]),
                // As it is to be.
                device(Value::Null, 0x2000, 7, sizes[2]),
            ]),
            "query-status" => json!({ "running": true }),
            "qom-list" => json!([
                { "name": "type", "type": "string" },
                { "name": "device[0]", "type": "child<virtio-net-pci>" },
                { "name": "device[1]", "type": "child<virtio-mem-pci>" },
                { "name": "device[2]", "type": "child<virtio-mem-pci>" },
            ]),
            "qom-get" if path.ends_with("device[1]") => 0x2000.into(),
            "qom-get" => 0x3000.into(),
            "qom-set" => {
                match path {
                    "/machine/peripheral/vm0" => sizes[0] = 5,
                    "/machine/peripheral-anon/device[2]" => sizes[1] = 6,
                    other => panic!("{other} is set"),
                }
                json!({})
            }
            other => panic!("{other} is asked"),
        })
    });
    qemu.destination.resize_again(&Report::silent()).unwrap();
    let set = |path: &str, value: u64| json!({ "path": path, "property": "requested-size", "value": value });
    let wanted = [set("/machine/peripheral/vm0", 5), set("/machine/peripheral-anon/device[2]", 6)];
    assert_eq!(qemu.asked("qom-set"), wanted);
}

#[test]
fn a_paused_guest_is_not_waited_for_to_change_its_size() {
    let qemu = Qemu::start(|command, _| {
        Ok(match command {
            "query-memory-devices" => json!([{ "type": "virtio-mem", "data": {
                "id": "vm0", "memaddr": 0, "requested-size": 5, "size": 0
            } }]),
            "query-status" => json!({ "running": false }),
            _ => json!({}),
        })
    });
    qemu.destination.resize_again(&Report::silent()).unwrap();
    assert_eq!(qemu.asked("qom-set").len(), 1);
}
