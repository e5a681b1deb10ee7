//! How a field gets at its value, and what that says about its role.

use super::error::Problem;
use crate::wire::{WireRead, WireWrite};

/// What becomes of a value that is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Mutable,
    Immutable,
    Derived,
    DerivedChecked,
    Unused,
    NotSent,
}

/// Where a number or text of a state `T` is, and its role.
pub enum Access<T, V> {
    /// Saved and restored.
    Mutable(fn(&T) -> V, fn(&mut T, V)),
    /// Saved, and on load compared with what the device has.
    Immutable(fn(&T) -> V),
    /// Saved, dropped on load: `post_load` recomputes it.
    Derived(fn(&T) -> V),
    /// Saved, and on load compared with what `post_load` recomputed.
    DerivedChecked(fn(&T) -> V),
}

/// Where a sequence of numbers of a state `T` is, and its role; see [`Access`].
pub enum SliceAccess<T, V> {
    /// Saved and restored.
    Mutable(fn(&T) -> &[V], fn(&mut T, Vec<V>)),
    /// Saved, and on load compared with what the device has.
    Immutable(fn(&T) -> &[V]),
    /// Saved, dropped on load: `post_load` recomputes it.
    Derived(fn(&T) -> &[V]),
    /// Saved, and on load compared with what `post_load` recomputed.
    DerivedChecked(fn(&T) -> &[V]),
}

/// What both kinds of access tell: how the value is got, whose type is `$value`, and its role.
macro_rules! roles {
    ($access:ident, $value:ty) => {
        impl<T, V> $access<T, V> {
            pub(super) fn get(&self) -> fn(&T) -> $value {
                match *self {
                    Self::Mutable(get, _)
                    | Self::Immutable(get)
                    | Self::Derived(get)
                    | Self::DerivedChecked(get) => get,
                }
            }

            pub(super) fn role(&self) -> Role {
                match self {
                    Self::Mutable(..) => Role::Mutable,
                    Self::Immutable(_) => Role::Immutable,
                    Self::Derived(_) => Role::Derived,
                    Self::DerivedChecked(_) => Role::DerivedChecked,
                }
            }
        }
    };
}

roles!(Access, V);
roles!(SliceAccess, &[V]);

/// How many elements a sequence has, or bits a bitmap.
pub enum Count<T> {
    /// Always as many.
    Fixed(u64),
    /// As a field says that comes earlier, or the device; more than the limit are refused before
    /// anything is allocated.
    From {
        /// Tells the number. On load it sees the state as far as it was read.
        count: fn(&T) -> u64,
        /// The most that are possible.
        limit: u64,
    },
}

impl<T> Count<T> {
    /// The number, unless it exceeds its limit.
    pub(super) fn of(&self, state: &T) -> Result<u64, Problem> {
        match *self {
            Self::Fixed(count) => Ok(count),
            Self::From { count, limit } => {
                let count = count(state);
                if count > limit { Err(Problem::TooMany { count, limit }) } else { Ok(count) }
            }
        }
    }

    pub(super) fn limit(&self) -> u64 {
        match *self {
            Self::Fixed(count) => count,
            Self::From { limit, .. } => limit,
        }
    }
}

/// A sequence: its elements, or the 64-bit words of a bitmap.
pub(super) struct Sequence<T, V> {
    pub(super) count: Count<T>,
    pub(super) access: SliceAccess<T, V>,
}

/// A number on the wire.
pub(super) trait Number: Copy + Default + PartialEq + std::fmt::Display + 'static {
    /// Bytes on the wire.
    const SIZE: usize;
    /// QEMU's name for it.
    const TYPE: &'static str;

    fn put(self, out: &mut Vec<u8>);

    /// Reads one.
    fn take(reader: &mut dyn WireRead, what: &'static str) -> Result<Self, Problem>;

    /// Whether two are the same on the wire.
    fn same(&self, other: &Self) -> bool {
        self == other
    }
}

macro_rules! number {
    ($type:ty, $name:literal, $put:ident, $take:ident) => {
        number!($type, $name, $put, $take, |value| value, |value| value);
    };
    ($type:ty, $name:literal, $put:ident, $take:ident, $to_wire:expr, $from_wire:expr) => {
        impl Number for $type {
            const SIZE: usize = size_of::<$type>();
            const TYPE: &'static str = $name;

            fn put(self, out: &mut Vec<u8>) {
                out.$put(($to_wire)(self));
            }

            fn take(reader: &mut dyn WireRead, what: &'static str) -> Result<Self, Problem> {
                Ok(reader.$take(what).map($from_wire)?)
            }
        }
    };
}

number!(u8, "uint8", put_u8, u8);
number!(u16, "uint16", put_be16, be16);
number!(u32, "uint32", put_be32, be32);
number!(u64, "uint64", put_be64, be64);
number!(i8, "int8", put_u8, u8, i8::cast_unsigned, u8::cast_signed);
number!(i16, "int16", put_be16, be16, i16::cast_unsigned, u16::cast_signed);
number!(i32, "int32", put_be32, be32, i32::cast_unsigned, u32::cast_signed);
number!(i64, "int64", put_be64, be64, i64::cast_unsigned, u64::cast_signed);

impl Number for f64 {
    const SIZE: usize = 8;
    const TYPE: &'static str = "float64";

    fn put(self, out: &mut Vec<u8>) {
        out.put_be64(self.to_bits());
    }

    fn take(reader: &mut dyn WireRead, what: &'static str) -> Result<Self, Problem> {
        Ok(Self::from_bits(reader.be64(what)?))
    }

    /// What is not a number is the same as itself, and the two zeros differ.
    fn same(&self, other: &Self) -> bool {
        self.to_bits() == other.to_bits()
    }
}

impl Number for bool {
    const SIZE: usize = 1;
    const TYPE: &'static str = "bool";

    fn put(self, out: &mut Vec<u8>) {
        out.put_u8(self.into());
    }

    fn take(reader: &mut dyn WireRead, what: &'static str) -> Result<Self, Problem> {
        match reader.u8(what)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(Problem::NotBool(other)),
        }
    }
}
