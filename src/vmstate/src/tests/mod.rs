//! Descriptions of every kind of field.

mod kinds;

use super::*;
use crate::wire::{WireError, WireRead, WireReader};
use proptest::prelude::*;
use serde_json::json;

const FAST: &str = "test.x-fast";
const PROPERTIES: &[Property] = &[Property { name: FAST, default: true }];

fn properties() -> Properties {
    Properties::new(PROPERTIES)
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Inner {
    low: u8,
    high: u16,
}

type I = Field<Inner>;
type W = Field<Whole>;

static INNER: VmState<Inner> = VmState::new(
    "inner",
    2,
    &[
        I::u8("low", Access::Mutable(|s| s.low, |s, low| s.low = low)),
        I::u16("high", Access::Mutable(|s| s.high, |s, high| s.high = high)).since(2),
    ],
);

/// A field of every kind.
#[derive(Clone, Debug, Default, PartialEq)]
struct Whole {
    on: bool,
    size: u32,
    len: u8,
    name: Vec<u8>,
    ports: Vec<u16>,
    masks: Vec<u32>,
    times: Vec<u64>,
    bits: Vec<u64>,
    inner: Inner,
    parts: Vec<Inner>,
    extra: u64,
    fast: u8,
    sum: u64,
}

impl Whole {
    fn sum(&mut self, _version: u32) -> Result<(), Reason> {
        self.sum = self.times.iter().fold(0, |sum, time| sum ^ time);
        if self.len == 13 { Err("thirteen".into()) } else { Ok(()) }
    }

    fn clear_extra(&mut self) -> Result<(), Reason> {
        self.extra = 0;
        self.fast = 0;
        Ok(())
    }

    fn count(&self) -> u64 {
        u64::from(self.len)
    }
}

const BY_LEN: Count<Whole> = Count::From { count: Whole::count, limit: 70 };

static EXTRA: VmState<Whole> = VmState::new(
    "whole/extra",
    3,
    &[W::u64("extra", Access::Mutable(|s| s.extra, |s, extra| s.extra = extra))],
)
.needed(|s| s.extra != 0);

static FAST_STATE: VmState<Whole> = VmState::new(
    "whole/fast",
    1,
    &[W::u8("fast", Access::Mutable(|s| s.fast, |s, fast| s.fast = fast))],
)
.when(FAST, true);

static WHOLE: VmState<Whole> = VmState::new(
    "whole",
    2,
    &[
        W::bool("on", Access::Mutable(|s| s.on, |s, on| s.on = on)),
        W::u32("size", Access::Immutable(|s| s.size)),
        W::u8("len", Access::Mutable(|s| s.len, |s, len| s.len = len)),
        W::unused(3),
        W::bytes(
            "name",
            Count::Fixed(2),
            SliceAccess::Mutable(|s| &s.name, |s, name| s.name = name),
        ),
        W::array_u16("ports", BY_LEN, SliceAccess::Mutable(|s| &s.ports, |s, v| s.ports = v)),
        W::array_u32("masks", Count::Fixed(1), SliceAccess::Immutable(|s| &s.masks)),
        W::array_u64(
            "times",
            Count::Fixed(2),
            SliceAccess::Mutable(|s| &s.times, |s, times| s.times = times),
        )
        .since(2),
        W::bitmap("bits", BY_LEN, SliceAccess::Mutable(|s| &s.bits, |s, bits| s.bits = bits)),
        W::structure("inner", &Struct { vmstate: &INNER, get: |s: &mut Whole| &mut s.inner }),
        W::structure(
            "parts",
            &StructArray {
                vmstate: &INNER,
                count: BY_LEN,
                get: |s: &mut Whole| &mut s.parts,
                make: |_| Inner::default(),
                set: |s, parts| s.parts = parts,
            },
        ),
        W::u64("sum", Access::DerivedChecked(|s| s.sum)).since(2),
        W::recomputed("product"),
    ],
)
.minimum_version(1)
.subsections(&[&EXTRA, &FAST_STATE])
.pre_load(Whole::clear_extra)
.post_load(Whole::sum);

fn sample() -> Whole {
    let mut sample = Whole {
        on: true,
        size: 0x0102_0304,
        len: 2,
        name: b"ab".to_vec(),
        ports: vec![0x1112, 0x1314],
        masks: vec![0x2122_2324],
        times: vec![0x31, 0x30],
        bits: vec![0b10],
        inner: Inner { low: 0x41, high: 0x4243 },
        parts: vec![Inner { low: 0x51, high: 0x5253 }, Inner { low: 0x54, high: 0x5556 }],
        extra: 0x61,
        fast: 0x71,
        sum: 0,
    };
    sample.sum(2).unwrap();
    sample
}

/// What a device has of the sample before it is loaded.
fn template() -> Whole {
    Whole { size: 0x0102_0304, masks: vec![0x2122_2324], extra: 9, ..Whole::default() }
}

#[rustfmt::skip]
const FIELDS: &[u8] = &[
    1,
    1, 2, 3, 4,
    2,
    0, 0, 0,
    b'a', b'b',
    0x11, 0x12, 0x13, 0x14,
    0x21, 0x22, 0x23, 0x24,
    0, 0, 0, 0, 0, 0, 0, 0x31, 0, 0, 0, 0, 0, 0, 0, 0x30,
    0, 0, 0, 0, 0, 0, 0, 0b10,
    0x41, 0x42, 0x43,
    0x51, 0x52, 0x53, 0x54, 0x55, 0x56,
    0, 0, 0, 0, 0, 0, 0, 1,
];
#[rustfmt::skip]
const EXTRA_BYTES: &[u8] = &[
    5, 11, b'w', b'h', b'o', b'l', b'e', b'/', b'e', b'x', b't', b'r', b'a', 0, 0, 0, 3,
    0, 0, 0, 0, 0, 0, 0, 0x61,
];
#[rustfmt::skip]
const FAST_BYTES: &[u8] = &[
    5, 10, b'w', b'h', b'o', b'l', b'e', b'/', b'f', b'a', b's', b't', 0, 0, 0, 1,
    0x71,
];

fn saved(state: &Whole, properties: &Properties) -> Vec<u8> {
    let mut out = Vec::new();
    WHOLE.save(&mut state.clone(), properties, &mut out).unwrap();
    out
}

fn load(bytes: &[u8], version: u32) -> Result<Whole, VmStateError> {
    let mut state = template();
    let mut reader = WireReader::new(bytes);
    WHOLE.load(&mut state, version, &properties(), &mut reader)?;
    assert!(reader.is_at_end().unwrap(), "bytes are left");
    Ok(state)
}

#[test]
fn every_kind_of_field_has_its_bytes() {
    let bytes = [FIELDS, EXTRA_BYTES, FAST_BYTES].concat();
    assert_eq!(saved(&sample(), &properties()), bytes);
    assert_eq!(load(&bytes, 2).unwrap(), sample());
}

#[test]
fn the_descriptions_of_these_tests_are_valid() {
    assert_eq!(WHOLE.validate(&properties()), []);
    assert_eq!(INNER.validate(&properties()), []);
}

#[test]
fn what_was_saved_is_described() {
    let described = WHOLE.save(&mut sample(), &properties(), &mut Vec::new()).unwrap();
    let inner = || {
        let fields = json!([
            {"name": "low", "type": "uint8", "size": 1},
            {"name": "high", "type": "uint16", "size": 2},
        ]);
        json!({"vmsd_name": "inner", "version": 2, "fields": fields})
    };
    let subsection = |name: &str, version: u32, field: serde_json::Value| json!({"vmsd_name": name, "version": version, "fields": [field]});
    let expected = json!({
        "vmsd_name": "whole",
        "version": 2,
        "fields": [
            {"name": "on", "type": "bool", "size": 1},
            {"name": "size", "type": "uint32", "size": 4},
            {"name": "len", "type": "uint8", "size": 1},
            {"name": "unused", "type": "unused_buffer", "size": 3},
            {"name": "name", "type": "buffer", "size": 2},
            {"name": "ports", "type": "uint16", "size": 2, "array_len": 2},
            {"name": "masks", "type": "uint32", "size": 4, "array_len": 1},
            {"name": "times", "type": "uint64", "size": 8, "array_len": 2},
            {"name": "bits", "type": "bitmap", "size": 8},
            {"name": "inner", "type": "struct", "size": 3, "struct": inner()},
            {"name": "parts", "type": "struct", "size": 3, "index": 0, "struct": inner()},
            {"name": "parts", "type": "struct", "size": 3, "index": 1, "struct": inner()},
            {"name": "sum", "type": "uint64", "size": 8},
        ],
        "subsections": [
            subsection("whole/extra", 3, json!({"name": "extra", "type": "uint64", "size": 8})),
            subsection("whole/fast", 1, json!({"name": "fast", "type": "uint8", "size": 1})),
        ],
    });
    assert_eq!(described, expected);
}

#[test]
fn an_array_without_elements_is_not_described() {
    let mut state = Whole { len: 0, ports: vec![], bits: vec![], parts: vec![], ..sample() };
    let described = WHOLE.save(&mut state, &properties(), &mut Vec::new()).unwrap();
    let names: Vec<_> =
        described["fields"].as_array().unwrap().iter().map(|field| &field["name"]).collect();
    let expected =
        ["on", "size", "len", "unused", "name", "masks", "times", "bits", "inner", "sum"];
    assert_eq!(names, expected);
}

#[test]
fn subsections_come_when_needed_and_are_default_when_they_do_not() {
    let mut slow = properties();
    slow.set(FAST, false).unwrap();
    let plain = Whole { extra: 0, ..sample() };
    let bytes = saved(&plain, &slow);
    assert_eq!(bytes, FIELDS);
    let loaded = load(&bytes, 2).unwrap();
    assert_eq!((loaded.extra, loaded.fast), (0, 0), "pre_load sets the default");
    let swapped = load(&[FIELDS, FAST_BYTES, EXTRA_BYTES].concat(), 2).unwrap();
    assert_eq!(swapped, sample());
}

#[test]
fn wrong_subsections_are_refused_and_other_bytes_left_alone() {
    let refuse = |tail: &[u8]| load(&[FIELDS, tail].concat(), 2).unwrap_err();
    let unknown = refuse(b"\x05\x09whole/new\0\0\0\x01");
    assert!(matches!(unknown.problem, Problem::UnknownSubsection(ref name) if name == "whole/new"));
    let twice = refuse(&[EXTRA_BYTES, EXTRA_BYTES].concat());
    assert!(matches!(twice.problem, Problem::Twice));
    let mut newer = EXTRA_BYTES.to_vec();
    newer[16] = 4;
    let expected = "whole/extra at byte 0x4d: version 4; 3 to 3 are understood";
    assert_eq!(refuse(&newer).to_string(), expected);
    for tail in [&b"\x05\x09other/new"[..], b"\x05", b"\x05\xffwhole", b"\x7e\0\0\0\x01"] {
        let bytes = [FIELDS, tail].concat();
        let mut reader = WireReader::new(&bytes[..]);
        WHOLE.load(&mut template(), 2, &properties(), &mut reader).unwrap();
        assert_eq!(reader.offset(), FIELDS.len() as u64);
    }
}

#[test]
fn versions_decide_on_fields_and_are_bounded() {
    let old = [&FIELDS[..19], &FIELDS[35..52]].concat();
    let loaded = load(&old, 1).unwrap();
    assert!(loaded.times.is_empty());
    assert_eq!(loaded.parts, sample().parts);
    for version in [0, 3] {
        let error = load(FIELDS, version).unwrap_err();
        assert!(matches!(error.problem, Problem::Version { minimum: 1, maximum: 2, .. }));
    }
}

#[test]
fn each_wrong_field_is_named_with_its_place() {
    let wrong = |at: usize, byte: u8| {
        let mut bytes = FIELDS.to_vec();
        bytes[at] = byte;
        let VmStateError { place, problem } = load(&bytes, 2).unwrap_err();
        (place.field, place.offset, problem.to_string())
    };
    assert_eq!(wrong(0, 2), (Some("on"), 0, "a truth value is 0 or 1, not 2".to_owned()));
    let immutable = "16909061 in the stream, 16909060 here";
    assert_eq!(wrong(4, 5), (Some("size"), 1, immutable.to_owned()));
    assert_eq!(wrong(5, 71).2, "71 elements, at most 70 are possible");
    assert_eq!(
        wrong(18, 0),
        (Some("masks"), 15, "[0] 555885312 in the stream, [0] 555885348 here".to_owned())
    );
    assert_eq!(wrong(42, 0b110).2, "bit 2 is set, past the end of a bitmap of 2 bits");
    let derived = "2 in the stream, but the rest of the state makes it 1";
    assert_eq!(wrong(59, 2), (Some("sum"), 52, derived.to_owned()));
    assert!(wrong(5, 13).0.is_none_or(|field| field != "len"));
}

#[test]
fn hooks_refuse_with_their_own_words() {
    let mut state =
        Whole { len: 13, ports: vec![0; 13], parts: vec![Inner::default(); 13], ..sample() };
    state.bits = vec![0];
    let error = load(&saved(&state, &properties()), 2).unwrap_err();
    assert!(error.to_string().ends_with("post_load: thirteen"), "{error}");
}

#[test]
fn a_state_that_does_not_agree_with_itself_is_not_saved() {
    let mut state = Whole { len: 3, ..sample() };
    let error = WHOLE.save(&mut state, &properties(), &mut Vec::new()).unwrap_err();
    assert_eq!(error.place.field, Some("ports"));
    assert!(matches!(error.problem, Problem::Length { held: 2, count: 3 }));
}

#[test]
fn a_cut_anywhere_is_refused() {
    for len in 0..FIELDS.len() {
        let error = load(&FIELDS[..len], 2).unwrap_err();
        assert!(matches!(error.problem, Problem::Wire(WireError::Truncated { .. })), "{len}");
    }
}

#[test]
fn flaws_are_found() {
    fn all<T: 'static>(vmstate: &VmState<T>) -> String {
        let flaws = vmstate.validate(&properties());
        flaws.iter().map(|flaw| flaw.to_string()).collect::<Vec<_>>().join("; ")
    }
    static DERIVED: VmState<Whole> =
        VmState::new("a", 1, &[W::u64("sum", Access::Derived(|s| s.sum))]);
    assert_eq!(all(&DERIVED), "a: field sum is derived, and no post_load recomputes it");
    static PRODUCT: VmState<Whole> = VmState::new("a", 1, &[W::recomputed("product")]);
    assert_eq!(all(&PRODUCT), "a: field product is derived, and no post_load recomputes it");
    static VERSIONS: VmState<Whole> =
        VmState::new("a", 1, &[W::unused(1).since(2), W::unused(0)]).minimum_version(2);
    let expected = "a: minimum version 2 is above version 1; a: field unused is of version 2, \
                    above 1; a: field unused has no bytes";
    assert_eq!(all(&VERSIONS), expected);
    static UNKNOWN: VmState<Whole> = VmState::new("a", 1, &[]).when("test.x-slow", true);
    assert_eq!(all(&UNKNOWN), "a: property \"test.x-slow\" is not known");
    static SUBSECTION: VmState<Whole> = VmState::new("b/c", 1, &[]).early();
    static PARENT: VmState<Whole> = VmState::new("a", 1, &[]).subsections(&[&SUBSECTION]);
    let expected = "a: the name of subsection b/c does not go on from its own; a: nothing says \
                    when subsection b/c is needed; b/c: only a section is early or has a priority";
    assert_eq!(all(&PARENT), expected);
    static TAKEN: VmState<Whole> = VmState::new("inner/x", 1, &[]).needed(|_| true);
    static TAKER: VmState<Whole> = VmState::new(
        "in",
        1,
        &[W::structure("inner", &Struct { vmstate: &INNER, get: |s: &mut Whole| &mut s.inner })],
    )
    .subsections(&[&TAKEN]);
    assert_eq!(all(&TAKER), "in: subsection inner/x would be taken by field inner");
    static NAMELESS: VmState<Whole> = VmState::new("", 256, &[]);
    assert_eq!(all(&NAMELESS), ": the name has 0 bytes, not 1 to 255; : version 256 is above 255");
}

proptest! {
    #[test]
    fn any_bytes_are_loaded_or_refused(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        (at, new) in (0..FIELDS.len(), any::<u8>()),
    ) {
        let mut reader = WireReader::new(&bytes[..]);
        let _ = WHOLE.load(&mut template(), 2, &properties(), &mut reader);
        let mut changed = FIELDS.to_vec();
        changed[at] = new;
        let mut state = template();
        let mut reader = WireReader::new(&changed[..]);
        if WHOLE.load(&mut state, 2, &properties(), &mut reader).is_ok() {
            let mut slow = properties();
            slow.set(FAST, false).unwrap();
            let again = saved(&state, &slow);
            // What is unused is not kept.
            let end = usize::try_from(reader.offset()).unwrap();
            prop_assert_eq!(&again[9..], &changed[9..end]);
        }
    }
}

#[test]
fn levels_add_up_from_the_newest() {
    const KNOWN: &[Property] =
        &[Property { name: "a.x", default: true }, Property { name: "b.y", default: false }];
    const LEVELS: &[CompatLevel] = &[
        CompatLevel { name: "3", sets: &[] },
        CompatLevel { name: "2", sets: &[("a.x", false)] },
        CompatLevel { name: "1", sets: &[("b.y", true), ("a.x", true)] },
    ];
    let at = |level: &str| {
        let mut properties = Properties::new(KNOWN);
        properties.apply_level(LEVELS, level)?;
        Ok::<_, PropertyError>((properties.is_on("a.x"), properties.is_on("b.y")))
    };
    assert_eq!(at("3"), Ok((true, false)));
    assert_eq!(at("2"), Ok((false, false)));
    assert_eq!(at("1"), Ok((true, true)));
    let error = at("0").unwrap_err().to_string();
    assert_eq!(error, "unknown compatibility level \"0\"; known are 3, 2, 1");
    assert_eq!(properties().set("c", true), Err(PropertyError::Unknown("c".to_owned())));
}
