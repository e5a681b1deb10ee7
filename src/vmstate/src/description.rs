//! Descriptions: what of a state is sent, and in which order.

use super::access::{Access, Count, Role, Sequence, SliceAccess};
use super::error::Reason;
use super::nested::Nested;

/// When a section is saved and loaded: higher ones first. QEMU's MigrationPriority.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[doc(alias = "MigrationPriority")]
pub enum Priority {
    /// After everything else.
    Low,
    /// What relies on nothing.
    #[default]
    Default,
    /// Must come before the devices that it translates for.
    Iommu,
    /// Must come before its functions.
    PciBus,
    /// Must come before whatever looks at memory.
    VirtioMem,
    /// Must come before whatever raises interrupts.
    Apic,
    /// The same for Arm's translation service.
    GicV3Its,
    /// The same for Arm's controller.
    GicV3,
}

/// Called around saving and loading; refuses by an error.
pub type Hook<T> = fn(&mut T) -> Result<(), Reason>;
/// The same, with the version that was loaded.
pub type VersionHook<T> = fn(&mut T, u32) -> Result<(), Reason>;

/// What of a state `T` is sent: a section, a structure within one, or a subsection.
#[doc(alias = "VMStateDescription")]
pub struct VmState<T: 'static> {
    pub(super) name: &'static str,
    pub(super) version: u32,
    pub(super) minimum_version: u32,
    pub(super) priority: Priority,
    pub(super) early: bool,
    pub(super) fields: &'static [Field<T>],
    pub(super) subsections: &'static [&'static VmState<T>],
    pub(super) condition: Option<(&'static str, bool)>,
    pub(super) needed: Option<fn(&T) -> bool>,
    pub(super) pre_save: Option<Hook<T>>,
    pub(super) pre_load: Option<Hook<T>>,
    pub(super) post_load: Option<VersionHook<T>>,
}

impl<T: 'static> VmState<T> {
    /// Sends `fields` in order, as `version`; understands that version only.
    pub const fn new(name: &'static str, version: u32, fields: &'static [Field<T>]) -> Self {
        Self {
            name,
            version,
            minimum_version: version,
            priority: Priority::Default,
            early: false,
            fields,
            subsections: &[],
            condition: None,
            needed: None,
            pre_save: None,
            pre_load: None,
            post_load: None,
        }
    }

    /// Understands older versions too, down to this one.
    pub const fn minimum_version(mut self, version: u32) -> Self {
        self.minimum_version = version;
        self
    }

    /// Is saved and loaded before sections of lower priority.
    pub const fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// Is saved and loaded before RAM.
    pub const fn early(mut self) -> Self {
        self.early = true;
        self
    }

    /// Has subsections, each sent only when it is needed.
    pub const fn subsections(mut self, subsections: &'static [&'static Self]) -> Self {
        self.subsections = subsections;
        self
    }

    /// Is sent only while a property has this value.
    pub const fn when(mut self, property: &'static str, value: bool) -> Self {
        self.condition = Some((property, value));
        self
    }

    /// Is sent only if this says so. What is not sent stays what `pre_load` made it.
    pub const fn needed(mut self, needed: fn(&T) -> bool) -> Self {
        self.needed = Some(needed);
        self
    }

    /// Called before anything is saved.
    pub const fn pre_save(mut self, hook: Hook<T>) -> Self {
        self.pre_save = Some(hook);
        self
    }

    /// Called before anything is loaded, with the device's state as it is now: sets what may not
    /// come to its default.
    pub const fn pre_load(mut self, hook: Hook<T>) -> Self {
        self.pre_load = Some(hook);
        self
    }

    /// Called when all fields and subsections were loaded, with their version: recomputes what is
    /// derived and checks what the device relies on.
    pub const fn post_load(mut self, hook: VersionHook<T>) -> Self {
        self.post_load = Some(hook);
        self
    }
}

/// One field.
pub struct Field<T: 'static> {
    pub(super) name: &'static str,
    pub(super) since: u32,
    pub(super) condition: Option<(&'static str, bool)>,
    pub(super) kind: Kind<T>,
}

pub(super) enum Kind<T: 'static> {
    Bool(Access<T, bool>),
    U8(Access<T, u8>),
    U16(Access<T, u16>),
    U32(Access<T, u32>),
    U64(Access<T, u64>),
    I8(Access<T, i8>),
    I16(Access<T, i16>),
    I32(Access<T, i32>),
    I64(Access<T, i64>),
    F64(Access<T, f64>),
    Text(Text<T>),
    Bytes(Sequence<T, u8>),
    ArrayU16(Sequence<T, u16>),
    ArrayU32(Sequence<T, u32>),
    ArrayU64(Sequence<T, u64>),
    Bitmap(Sequence<T, u64>),
    Nested(&'static dyn Nested<T>),
    Unused(u64),
    Recomputed,
    NotSent,
}

/// Text, and the most bytes that it has.
pub(super) struct Text<T> {
    pub(super) limit: u32,
    pub(super) access: Access<T, String>,
}

impl<T: 'static> Field<T> {
    const fn of(name: &'static str, kind: Kind<T>) -> Self {
        Self { name, since: 0, condition: None, kind }
    }

    /// A byte that is 0 or 1.
    pub const fn bool(name: &'static str, access: Access<T, bool>) -> Self {
        Self::of(name, Kind::Bool(access))
    }

    /// A byte.
    pub const fn u8(name: &'static str, access: Access<T, u8>) -> Self {
        Self::of(name, Kind::U8(access))
    }

    /// 16 bits.
    pub const fn u16(name: &'static str, access: Access<T, u16>) -> Self {
        Self::of(name, Kind::U16(access))
    }

    /// 32 bits.
    pub const fn u32(name: &'static str, access: Access<T, u32>) -> Self {
        Self::of(name, Kind::U32(access))
    }

    /// 64 bits.
    pub const fn u64(name: &'static str, access: Access<T, u64>) -> Self {
        Self::of(name, Kind::U64(access))
    }

    /// A byte with a sign.
    pub const fn i8(name: &'static str, access: Access<T, i8>) -> Self {
        Self::of(name, Kind::I8(access))
    }

    /// 16 bits with a sign.
    pub const fn i16(name: &'static str, access: Access<T, i16>) -> Self {
        Self::of(name, Kind::I16(access))
    }

    /// 32 bits with a sign.
    pub const fn i32(name: &'static str, access: Access<T, i32>) -> Self {
        Self::of(name, Kind::I32(access))
    }

    /// 64 bits with a sign, such as a timer's nanoseconds.
    pub const fn i64(name: &'static str, access: Access<T, i64>) -> Self {
        Self::of(name, Kind::I64(access))
    }

    /// A floating-point number of 64 bits, with every bit as it is.
    pub const fn f64(name: &'static str, access: Access<T, f64>) -> Self {
        Self::of(name, Kind::F64(access))
    }

    /// Text: be32 bytes, and the bytes. More than `limit` bytes are refused.
    pub const fn text(name: &'static str, limit: u32, access: Access<T, String>) -> Self {
        Self::of(name, Kind::Text(Text { limit, access }))
    }

    /// Bytes as they are.
    pub const fn bytes(name: &'static str, count: Count<T>, access: SliceAccess<T, u8>) -> Self {
        Self::of(name, Kind::Bytes(Sequence { count, access }))
    }

    /// An array of 16 bits each.
    pub const fn array_u16(
        name: &'static str,
        count: Count<T>,
        access: SliceAccess<T, u16>,
    ) -> Self {
        Self::of(name, Kind::ArrayU16(Sequence { count, access }))
    }

    /// An array of 32 bits each.
    pub const fn array_u32(
        name: &'static str,
        count: Count<T>,
        access: SliceAccess<T, u32>,
    ) -> Self {
        Self::of(name, Kind::ArrayU32(Sequence { count, access }))
    }

    /// An array of 64 bits each.
    pub const fn array_u64(
        name: &'static str,
        count: Count<T>,
        access: SliceAccess<T, u64>,
    ) -> Self {
        Self::of(name, Kind::ArrayU64(Sequence { count, access }))
    }

    /// A bitmap of `bits`, in 64-bit words with the first bit in the lowest bit of the first.
    pub const fn bitmap(name: &'static str, bits: Count<T>, access: SliceAccess<T, u64>) -> Self {
        Self::of(name, Kind::Bitmap(Sequence { count: bits, access }))
    }

    /// A structure, or an array of them, with a description of its own. It has no version on the
    /// wire: its fields are those of the version that is described.
    pub const fn structure(name: &'static str, structure: &'static dyn Nested<T>) -> Self {
        Self::of(name, Kind::Nested(structure))
    }

    /// Bytes that an older release used, or a newer one will: zeros, passed over on load.
    pub const fn unused(len: u64) -> Self {
        Self::of("unused", Kind::Unused(len))
    }

    /// Something derived that is not sent at all; named so that `post_load` is not forgotten.
    pub const fn recomputed(name: &'static str) -> Self {
        Self::of(name, Kind::Recomputed)
    }

    /// A member that this description does not send, since it is in another section or belongs to
    /// this host. Named so that [`Members::missing`](super::Members::missing) knows of it.
    pub const fn not_sent(name: &'static str) -> Self {
        Self::of(name, Kind::NotSent)
    }

    /// Is there from this version of the section on.
    pub const fn since(mut self, version: u32) -> Self {
        self.since = version;
        self
    }

    /// Is there only while a property has this value, which the stream does not tell: both sides
    /// must have the same.
    pub const fn when(mut self, property: &'static str, value: bool) -> Self {
        self.condition = Some((property, value));
        self
    }

    pub(super) fn role(&self) -> Role {
        match &self.kind {
            Kind::Bool(access) => access.role(),
            Kind::U8(access) => access.role(),
            Kind::U16(access) => access.role(),
            Kind::U32(access) => access.role(),
            Kind::U64(access) => access.role(),
            Kind::I8(access) => access.role(),
            Kind::I16(access) => access.role(),
            Kind::I32(access) => access.role(),
            Kind::I64(access) => access.role(),
            Kind::F64(access) => access.role(),
            Kind::Text(text) => text.access.role(),
            Kind::Bytes(sequence) => sequence.access.role(),
            Kind::ArrayU16(sequence) => sequence.access.role(),
            Kind::ArrayU32(sequence) => sequence.access.role(),
            Kind::ArrayU64(sequence) | Kind::Bitmap(sequence) => sequence.access.role(),
            Kind::Nested(_) => Role::Mutable,
            Kind::Unused(_) => Role::Unused,
            Kind::Recomputed => Role::Derived,
            Kind::NotSent => Role::NotSent,
        }
    }
}
