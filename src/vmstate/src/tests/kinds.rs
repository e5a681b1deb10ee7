//! Signs, fractions, text, structures that may be absent, and the roles of what is within them.

use super::super::*;
use crate::wire::{WireError, WireRead, WireReader};
use proptest::prelude::*;

#[derive(Clone, Debug, Default, PartialEq)]
struct Part {
    model: u8,
    twice: u16,
    level: i8,
}

type P = Field<Part>;

static PART: VmState<Part> = VmState::new(
    "part",
    1,
    &[
        P::u8("model", Access::Immutable(|s| s.model)),
        P::u16("twice", Access::Derived(|s| s.twice)),
        P::i8("level", Access::Mutable(|s| s.level, |s, level| s.level = level)),
    ],
)
.post_load(|s, _| {
    s.twice = 2 * u16::from(s.level.unsigned_abs());
    Ok(())
});

#[derive(Clone, Debug, Default, PartialEq)]
struct Mixed {
    small: i16,
    medium: i32,
    timer: i64,
    ratio: f64,
    unit: f64,
    name: String,
    serial: String,
    part: Part,
    spare: Option<Part>,
    squares: Vec<u32>,
    saves: u8,
}

impl Mixed {
    fn compute(&mut self) {
        self.squares = vec![self.medium.unsigned_abs(), u32::from(self.small.unsigned_abs())];
    }

    fn about_to_save(&mut self) -> Result<(), Reason> {
        self.saves += 1;
        if self.saves > 9 { Err("too often".into()) } else { Ok(()) }
    }
}

type M = Field<Mixed>;

static MIXED: VmState<Mixed> = VmState::new(
    "mixed",
    1,
    &[
        M::i16("small", Access::Mutable(|s| s.small, |s, small| s.small = small)),
        M::i32("medium", Access::Mutable(|s| s.medium, |s, medium| s.medium = medium)),
        M::i64("timer", Access::Mutable(|s| s.timer, |s, timer| s.timer = timer)),
        M::f64("ratio", Access::Mutable(|s| s.ratio, |s, ratio| s.ratio = ratio)),
        M::f64("unit", Access::Immutable(|s| s.unit)),
        M::text("name", 5, Access::Mutable(|s| s.name.clone(), |s, name| s.name = name)),
        M::text("serial", 5, Access::Immutable(|s| s.serial.clone())),
        M::structure("part", &Struct { vmstate: &PART, get: |s: &mut Mixed| &mut s.part }),
        M::structure(
            "spare",
            &OptionalStruct {
                vmstate: &PART,
                get: |s: &mut Mixed| s.spare.as_mut(),
                make: |s| Part { model: s.part.model, ..Part::default() },
                set: |s, spare| s.spare = spare,
            },
        ),
        M::array_u32("squares", Count::Fixed(2), SliceAccess::Derived(|s| &s.squares)),
        M::u8("saves", Access::Mutable(|s| s.saves, |s, saves| s.saves = saves)),
    ],
)
.pre_save(Mixed::about_to_save)
.post_load(|s, _| {
    s.compute();
    Ok(())
});

fn sample() -> Mixed {
    let part = Part { model: 7, twice: 6, level: -3 };
    let mut sample = Mixed {
        small: -2,
        medium: -3,
        timer: i64::MIN,
        ratio: -0.5,
        unit: f64::NAN,
        name: "eth0".to_owned(),
        serial: "q1".to_owned(),
        spare: Some(Part { twice: 10, level: 5, ..part }),
        part,
        ..Mixed::default()
    };
    sample.compute();
    sample
}

#[rustfmt::skip]
const BYTES: &[u8] = &[
    0xff, 0xfe,                             // small
    0xff, 0xff, 0xff, 0xfd,                 // medium
    0x80, 0, 0, 0, 0, 0, 0, 0,              // timer
    0xbf, 0xe0, 0, 0, 0, 0, 0, 0,           // ratio
    0x7f, 0xf8, 0, 0, 0, 0, 0, 0,           // unit
    0, 0, 0, 4, b'e', b't', b'h', b'0',     // name
    0, 0, 0, 2, b'q', b'1',                 // serial
    7, 0, 6, 0xfd,                          // part
    b'1', 7, 0, 10, 5,                      // spare
    0, 0, 0, 3, 0, 0, 0, 2,                 // squares
    1,                                      // saves
];
const MODEL: usize = 44;
const TWICE: usize = 46;
const SPARE: usize = 48;
const SQUARES: usize = 53;

fn save(state: &Mixed) -> Result<Vec<u8>, VmStateError> {
    let mut out = Vec::new();
    MIXED.save(&mut state.clone(), &Properties::default(), &mut out)?;
    Ok(out)
}

/// A device of the same model.
fn device() -> Mixed {
    Mixed {
        unit: f64::NAN,
        serial: "q1".to_owned(),
        part: Part { model: 7, ..Part::default() },
        ..Mixed::default()
    }
}

fn load(bytes: &[u8]) -> Result<Mixed, VmStateError> {
    let mut state = device();
    let mut reader = WireReader::new(bytes);
    MIXED.load(&mut state, 1, &Properties::default(), &mut reader)?;
    assert!(reader.is_at_end().unwrap(), "bytes are left");
    Ok(state)
}

fn changed(at: usize, byte: u8) -> Vec<u8> {
    let mut bytes = BYTES.to_vec();
    bytes[at] = byte;
    bytes
}

/// The values that are sent, without what is not equal to itself.
fn comparable(state: Mixed) -> Mixed {
    assert!(state.unit.is_nan());
    Mixed { unit: 0.0, ..state }
}

#[test]
fn signs_fractions_text_and_optional_structures_have_their_bytes() {
    assert_eq!(MIXED.validate(&Properties::default()), []);
    assert_eq!(save(&sample()).unwrap(), BYTES);
    let expected = Mixed { saves: 1, ..comparable(sample()) };
    assert_eq!(comparable(load(BYTES).unwrap()), expected);
}

#[test]
fn they_are_described_as_qemus_analyser_reads_them() {
    let described = |spare: Option<Part>| {
        let mut state = Mixed { spare, ..sample() };
        let described = MIXED.save(&mut state, &Properties::default(), &mut Vec::new()).unwrap();
        let fields = described["fields"].as_array().unwrap().clone();
        let text = |field: &serde_json::Value| {
            let of = |key: &str| field[key].as_str().unwrap().to_owned();
            format!("{} {} {}", of("name"), of("type"), field["size"])
        };
        fields.iter().map(text).collect::<Vec<_>>().join(", ")
    };
    let before = "small int16 2, medium int32 4, timer int64 8, ratio float64 8, unit float64 8, \
                  name_len uint32 4, name buffer 4, serial_len uint32 4, serial buffer 2, \
                  part struct 4, ";
    let after = ", squares uint32 4, saves uint8 1";
    let present = "spare_present uint8 1, spare struct 4";
    assert_eq!(described(sample().spare), format!("{before}{present}{after}"));
    assert_eq!(described(None), format!("{before}spare nullptr 1{after}"));
}

#[test]
fn a_structure_that_is_absent_is_a_mark_and_comes_back_absent() {
    let bytes = [&BYTES[..SPARE], b"0", &BYTES[SQUARES..]].concat();
    assert_eq!(save(&Mixed { spare: None, ..sample() }).unwrap(), bytes);
    // Also where there is one before.
    let mut state = Mixed { spare: sample().spare, ..device() };
    MIXED.load(&mut state, 1, &Properties::default(), &mut WireReader::new(&bytes[..])).unwrap();
    assert_eq!(state.spare, None);
    let error = load(&changed(SPARE, 2)).unwrap_err();
    assert_eq!(error.place.field, Some("spare"));
    assert!(matches!(error.problem, Problem::NotMark(2)), "{error}");
}

#[test]
fn text_is_bounded_and_utf_8_on_both_sides() {
    let long = save(&Mixed { name: "longer".to_owned(), ..sample() }).unwrap_err();
    assert!(matches!(long.problem, Problem::TooMany { count: 6, limit: 5 }), "{long}");
    let long = load(&changed(33, 6)).unwrap_err();
    assert!(matches!(long.problem, Problem::Wire(WireError::TooLong { len: 6, limit: 5, .. })));
    let other = load(&changed(36, 0xff)).unwrap_err();
    assert!(matches!(other.problem, Problem::Wire(WireError::NotText { .. })), "{other}");
    let serial = load(&changed(43, b'2')).unwrap_err();
    assert_eq!(serial.place.field, Some("serial"));
    assert_eq!(serial.problem.to_string(), "q2 in the stream, q1 here");
}

#[test]
fn fractions_are_compared_bit_by_bit() {
    let error = load(&changed(23, 0xf9)).unwrap_err();
    assert_eq!(error.place.field, Some("unit"));
}

#[test]
fn derived_values_are_dropped_on_load_and_made_anew() {
    for at in [TWICE, SPARE + 3, SQUARES + 3] {
        assert_eq!(comparable(load(&changed(at, 0x55)).unwrap()), comparable(load(BYTES).unwrap()));
    }
}

#[test]
fn roles_hold_within_structures_and_optional_ones() {
    for at in [MODEL, SPARE + 1] {
        let error = load(&changed(at, 8)).unwrap_err();
        assert_eq!((error.place.section, error.place.field), ("part", Some("model")), "byte {at}");
        assert_eq!(error.problem.to_string(), "8 in the stream, 7 here");
    }
}

#[test]
fn pre_save_changes_what_is_saved_or_refuses() {
    assert_eq!(save(&Mixed { saves: 4, ..sample() }).unwrap().last(), Some(&5));
    let error = save(&Mixed { saves: 9, ..sample() }).unwrap_err();
    assert!(error.to_string().ends_with("pre_save: too often"), "{error}");
}

#[test]
fn a_cut_anywhere_is_refused() {
    for len in 0..BYTES.len() {
        assert!(load(&BYTES[..len]).is_err(), "{len}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_loaded_or_refused(
        bytes in prop::collection::vec(any::<u8>(), 0..120),
        (at, new) in (0..BYTES.len(), any::<u8>()),
    ) {
        let mut state = Mixed::default();
        let mut reader = WireReader::new(&bytes[..]);
        let _ = MIXED.load(&mut state, 1, &Properties::default(), &mut reader);
        // What is loaded is saved again as it came, but for what is derived.
        let changed = changed(at, new);
        let mut reader = WireReader::new(&changed[..]);
        let mut state = device();
        if MIXED.load(&mut state, 1, &Properties::default(), &mut reader).is_ok() {
            let end = usize::try_from(reader.offset()).unwrap();
            state.saves = state.saves.wrapping_sub(1).min(8);
            let again = save(&state).unwrap();
            prop_assert_eq!(&again[..MODEL], &changed[..MODEL]);
            prop_assert_eq!(again.len(), end);
        }
    }
}
