//! The order of sections, and what levels set.

use super::DevicePhase::{Early, Late};
use super::*;
use crate::stream::SectionKind;
use parking_lot::Mutex;
use std::sync::Arc;
use vmstate::wire::WireReader;
use vmstate::{Access, Described, Field, VmState, VmStateDevice};

/// A device that notes what was done to it.
struct Noted {
    name: &'static str,
    journal: Arc<Mutex<Vec<String>>>,
}

impl VmStateDevice for Noted {
    type State = u8;

    fn snapshot(&mut self) -> Result<u8, Reason> {
        Ok(7)
    }

    fn take_over(&mut self, state: u8) -> Result<(), Reason> {
        self.journal.lock().push(format!("{} {state}", self.name));
        Ok(())
    }
}

const BYTE: Field<u8> = Field::u8("byte", Access::Mutable(|s| *s, |s, byte| *s = byte));
static LOW: VmState<u8> = VmState::new("low", 1, &[BYTE]).priority(Priority::Low);
static PLAIN: VmState<u8> = VmState::new("plain", 1, &[BYTE]);
static BUS: VmState<u8> = VmState::new("bus", 1, &[BYTE]).priority(Priority::PciBus);
static SOON: VmState<u8> = VmState::new("soon", 1, &[BYTE]).early();
static RARE: VmState<u8> = VmState::new("rare", 1, &[BYTE]).needed(|_| false);

fn registry() -> (DeviceRegistry, Arc<Mutex<Vec<String>>>) {
    let journal = Arc::new(Mutex::default());
    let mut registry = DeviceRegistry::new(Properties::new(&[]));
    for (name, vmstate) in
        [("a", &LOW), ("b", &PLAIN), ("c", &BUS), ("d", &PLAIN), ("e", &SOON), ("f", &RARE)]
    {
        let device = Noted { name, journal: Arc::clone(&journal) };
        registry.register(name, 0, Box::new(Described { vmstate, device })).unwrap();
    }
    (registry, journal)
}

fn header(idstr: &str) -> SectionHeader {
    let idstr = idstr.to_owned();
    SectionHeader { kind: SectionKind::Full, section_id: 0, idstr, instance_id: 0, version_id: 1 }
}

fn load_all(
    registry: &mut DeviceRegistry,
    sections: &[(&str, DevicePhase)],
) -> Result<(), RegistryError> {
    for (name, phase) in sections {
        registry.load_section(&header(name), *phase, &mut WireReader::new(&[9][..]))?;
    }
    registry.finish_load()
}

#[test]
fn sections_are_saved_by_priority_and_then_as_registered() {
    let (mut registry, _) = registry();
    let mut names = |phase| -> Vec<String> {
        registry.save_phase(phase).unwrap().into_iter().map(|section| section.idstr).collect()
    };
    assert_eq!(names(Early), ["e"]);
    assert_eq!(names(Late), ["c", "b", "d", "a"], "what is not needed is left out");
}

#[test]
fn sections_are_loaded_in_their_order_only() {
    let good = [("e", Early), ("c", Late), ("b", Late), ("d", Late), ("a", Late)];
    let (mut registry, journal) = registry();
    load_all(&mut registry, &good).unwrap();
    load_all(&mut registry, &good).unwrap();
    assert_eq!(journal.lock().len(), 10);
    journal.lock().clear();
    let mut refused = |sections: &[(&str, DevicePhase)]| {
        let error = load_all(&mut registry, sections).unwrap_err().to_string();
        registry.abandon_load();
        error
    };
    let order = refused(&[("e", Early), ("b", Late), ("c", Late)]);
    assert_eq!(order, "c (priority PciBus) must be loaded before b (Default)");
    let registered = refused(&[("d", Late), ("b", Late)]);
    assert_eq!(registered, "b (priority Default) must be loaded before d (Default)");
    assert_eq!(refused(&[("e", Late)]), "e belongs before RAM");
    assert_eq!(refused(&[("b", Early)]), "b belongs after RAM");
    assert_eq!(refused(&[("c", Late), ("c", Late)]), "c comes twice");
    assert_eq!(refused(&good[..4]), "a did not come");
    assert_eq!(refused(&[("z", Late)]), "z, instance 0, is not known here");
}

#[test]
fn an_id_string_of_a_stream_is_escaped_and_cut_in_the_reason() {
    let (mut registry, _) = registry();
    let mut refused =
        |idstr: &str| load_all(&mut registry, &[(idstr, Late)]).unwrap_err().to_string();
    let reason = refused("z\n\u{1b}[2J\u{202e}");
    assert_eq!(reason, "z\\n\\u{1b}[2J\\u{202e}, instance 0, is not known here");
    let long = refused(&"\u{1}".repeat(255));
    assert!(long.len() < 320 && long.contains("..., instance 0"), "{long}");
}

#[test]
fn what_cannot_be_registered_is_refused() {
    let (mut registry, journal) = registry();
    let mut add = |idstr: &str, instance, vmstate: &'static VmState<u8>| {
        let device = Noted { name: "x", journal: Arc::clone(&journal) };
        registry.register(idstr, instance, Box::new(Described { vmstate, device }))
    };
    assert!(matches!(add("a", 0, &PLAIN), Err(RegistryError::Registered { .. })));
    add("a", 1, &PLAIN).unwrap();
    assert!(matches!(add("", 0, &PLAIN), Err(RegistryError::IdLength(0))));
    add(&"x".repeat(255), 0, &PLAIN).unwrap();
    assert!(matches!(add(&"x".repeat(256), 0, &PLAIN), Err(RegistryError::IdLength(256))));
    static WRONG: VmState<u8> = VmState::new("wrong", 1, &[BYTE, BYTE]);
    let error = add("w", 0, &WRONG).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the description of w is wrong: wrong: field byte is there twice"
    );
}

/// A device that notes what it becomes, and refuses to become some things.
struct Kept {
    now: Arc<Mutex<Vec<u8>>>,
    index: usize,
}

impl VmStateDevice for Kept {
    type State = u8;

    fn snapshot(&mut self) -> Result<u8, Reason> {
        Ok(self.now.lock()[self.index])
    }

    fn take_over(&mut self, state: u8) -> Result<(), Reason> {
        if state == 13 {
            return Err("thirteen".into());
        }
        self.now.lock()[self.index] = state;
        Ok(())
    }
}

/// One early section and three others, of devices that were 1, 2, 3 and 4.
fn kept() -> (DeviceRegistry, Arc<Mutex<Vec<u8>>>) {
    let now = Arc::new(Mutex::new(vec![1, 2, 3, 4]));
    let mut registry = DeviceRegistry::new(Properties::new(&[]));
    for (index, vmstate) in [&SOON, &PLAIN, &PLAIN, &PLAIN].into_iter().enumerate() {
        let device = Kept { now: Arc::clone(&now), index };
        registry
            .register(&format!("d{index}"), 0, Box::new(Described { vmstate, device }))
            .unwrap();
    }
    (registry, now)
}

fn stage(registry: &mut DeviceRegistry, states: &[u8]) -> Result<(), RegistryError> {
    for (index, state) in states.iter().enumerate() {
        let header = header(&format!("d{index}"));
        let phase = if index == 0 { Early } else { Late };
        registry.load_section(&header, phase, &mut WireReader::new(&[*state][..]))?;
    }
    Ok(())
}

#[test]
fn state_is_taken_over_when_all_of_it_has_come_and_early_state_at_once() {
    let (mut registry, now) = kept();
    stage(&mut registry, &[21, 22, 23, 24]).unwrap();
    assert_eq!(*now.lock(), [21, 2, 3, 4]);
    registry.finish_load().unwrap();
    assert_eq!(*now.lock(), [21, 22, 23, 24]);
    registry.abandon_load();
    assert_eq!(*now.lock(), [21, 22, 23, 24], "what was finished stays");
}

#[test]
fn early_sections_are_missed_when_memory_follows() {
    let (mut registry, _) = kept();
    let error = registry.finish_early().unwrap_err().to_string();
    assert_eq!(error, "d0 did not come before RAM: do both sides have the same properties?");
    stage(&mut registry, &[21]).unwrap();
    registry.finish_early().unwrap();
}

#[test]
fn a_load_that_fails_at_any_point_leaves_all_devices_as_they_were() {
    let (mut registry, now) = kept();
    stage(&mut registry, &[21, 22]).unwrap();
    assert_eq!(registry.finish_load().unwrap_err().to_string(), "d2 did not come");
    assert_eq!(*now.lock(), [1, 2, 3, 4]);

    stage(&mut registry, &[21, 22, 23]).unwrap();
    registry.abandon_load();
    assert_eq!(*now.lock(), [1, 2, 3, 4]);

    for refused in 1..4 {
        let mut states = [21, 22, 23, 24];
        states[refused] = 13;
        stage(&mut registry, &states).unwrap();
        let error = registry.finish_load().unwrap_err().to_string();
        assert_eq!(error, format!("d{refused}: thirteen"));
        assert_eq!(*now.lock(), [1, 2, 3, 4]);
    }
    stage(&mut registry, &[31, 32, 33, 34]).unwrap();
    registry.finish_load().unwrap();
    assert_eq!(*now.lock(), [31, 32, 33, 34]);
}
