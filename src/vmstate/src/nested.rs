//! Structures within a state, each with a description of its own.

use serde_json::Value;

use super::access::Count;
use super::describe;
use super::description::VmState;
use super::error::{Problem, VmStateError};
use super::load::Loader;
use super::properties::Properties;
use super::save::Saver;
use super::validate::Flaw;
use crate::wire::{WireError, WireWrite};

/// A structure, an optional one, or an array of them, within a state `T`. Implemented by
/// [`Struct`], [`OptionalStruct`] and [`StructArray`].
pub trait Nested<T>: Sync + private::Sealed {
    /// Name of the description.
    fn name(&self) -> &'static str;

    /// Appends it, and what it was to `described`.
    #[doc(hidden)]
    fn save(
        &self,
        field: &'static str,
        state: &mut T,
        saver: &mut Saver<'_>,
        described: &mut Vec<Value>,
    ) -> Result<(), Fault>;

    /// Reads it.
    #[doc(hidden)]
    fn load(&self, state: &mut T, loader: &mut Loader<'_>) -> Result<(), Fault>;

    /// What is wrong with the description.
    #[doc(hidden)]
    fn flaws(&self, properties: &Properties, flaws: &mut Vec<Flaw>);
}

/// What is wrong with a structure.
pub enum Fault {
    /// The field that it is: its mark, or its number of elements.
    Field(Problem),
    /// Something in it, which has its place already.
    Within(VmStateError),
}

impl From<Problem> for Fault {
    fn from(problem: Problem) -> Self {
        Self::Field(problem)
    }
}

impl From<WireError> for Fault {
    fn from(error: WireError) -> Self {
        Self::Field(error.into())
    }
}

impl From<VmStateError> for Fault {
    fn from(error: VmStateError) -> Self {
        Self::Within(error)
    }
}

mod private {
    pub trait Sealed {}
    impl<T, U> Sealed for super::Struct<T, U> {}
    impl<T, U> Sealed for super::OptionalStruct<T, U> {}
    impl<T, U> Sealed for super::StructArray<T, U> {}
}

/// Appends one structure, and describes it as field `name`, or as that of an array with this index.
fn save_one<U: 'static>(
    vmstate: &VmState<U>,
    state: &mut U,
    (name, index): (&'static str, Option<u64>),
    saver: &mut Saver<'_>,
) -> Result<Value, VmStateError> {
    let start = saver.out.len();
    let contents = vmstate.save_to(state, saver)?;
    let size = (saver.out.len() - start) as u64;
    Ok(describe::structure(name, size, index, contents))
}

/// A structure `U` within a state `T`.
pub struct Struct<T: 'static, U: 'static> {
    /// What is in it.
    pub vmstate: &'static VmState<U>,
    /// Where it is.
    pub get: fn(&mut T) -> &mut U,
}

impl<T, U> Nested<T> for Struct<T, U> {
    fn name(&self) -> &'static str {
        self.vmstate.name
    }

    fn save(
        &self,
        field: &'static str,
        state: &mut T,
        saver: &mut Saver<'_>,
        described: &mut Vec<Value>,
    ) -> Result<(), Fault> {
        described.push(save_one(self.vmstate, (self.get)(state), (field, None), saver)?);
        Ok(())
    }

    fn load(&self, state: &mut T, loader: &mut Loader<'_>) -> Result<(), Fault> {
        Ok(self.vmstate.load_from((self.get)(state), self.vmstate.version, loader)?)
    }

    fn flaws(&self, properties: &Properties, flaws: &mut Vec<Flaw>) {
        self.vmstate.inner_flaws(properties, flaws);
    }
}

/// What stands for a structure that is not there: QEMU's mark of a null pointer.
const ABSENT: u8 = b'0';
/// What stands before one that is.
const PRESENT: u8 = b'1';

/// A structure `U` within a state `T` that may not be there, as QEMU's pointers that may be null:
/// a byte that says so, and the structure.
pub struct OptionalStruct<T: 'static, U: 'static> {
    /// What is in it.
    pub vmstate: &'static VmState<U>,
    /// Where it is.
    pub get: fn(&mut T) -> Option<&mut U>,
    /// Makes one to load into.
    pub make: fn(&T) -> U,
    /// Takes over what was loaded.
    pub set: fn(&mut T, Option<U>),
}

impl<T, U> Nested<T> for OptionalStruct<T, U> {
    fn name(&self) -> &'static str {
        self.vmstate.name
    }

    fn save(
        &self,
        field: &'static str,
        state: &mut T,
        saver: &mut Saver<'_>,
        described: &mut Vec<Value>,
    ) -> Result<(), Fault> {
        let Some(inner) = (self.get)(state) else {
            saver.out.put_u8(ABSENT);
            described.push(describe::field(field, "nullptr", 1, None));
            return Ok(());
        };
        saver.out.put_u8(PRESENT);
        described.push(describe::field(&format!("{field}_present"), "uint8", 1, None));
        described.push(save_one(self.vmstate, inner, (field, None), saver)?);
        Ok(())
    }

    fn load(&self, state: &mut T, loader: &mut Loader<'_>) -> Result<(), Fault> {
        let inner = match loader.reader.u8("whether a structure is there")? {
            ABSENT => None,
            PRESENT => {
                let mut inner = (self.make)(state);
                self.vmstate.load_from(&mut inner, self.vmstate.version, loader)?;
                Some(inner)
            }
            other => return Err(Problem::NotMark(other).into()),
        };
        (self.set)(state, inner);
        Ok(())
    }

    fn flaws(&self, properties: &Properties, flaws: &mut Vec<Flaw>) {
        self.vmstate.inner_flaws(properties, flaws);
    }
}

/// An array of structures `U` within a state `T`.
pub struct StructArray<T: 'static, U: 'static> {
    /// What is in each.
    pub vmstate: &'static VmState<U>,
    /// How many there are.
    pub count: Count<T>,
    /// Where they are.
    pub get: fn(&mut T) -> &mut [U],
    /// Makes one to load into.
    pub make: fn(&T) -> U,
    /// Takes over those that were loaded.
    pub set: fn(&mut T, Vec<U>),
}

impl<T, U> Nested<T> for StructArray<T, U> {
    fn name(&self) -> &'static str {
        self.vmstate.name
    }

    fn save(
        &self,
        field: &'static str,
        state: &mut T,
        saver: &mut Saver<'_>,
        described: &mut Vec<Value>,
    ) -> Result<(), Fault> {
        let count = self.count.of(state)?;
        let elements = (self.get)(state);
        if elements.len() as u64 != count {
            return Err(Problem::Length { held: elements.len(), count }.into());
        }
        for (index, element) in (0..).zip(elements) {
            described.push(save_one(self.vmstate, element, (field, Some(index)), saver)?);
        }
        Ok(())
    }

    fn load(&self, state: &mut T, loader: &mut Loader<'_>) -> Result<(), Fault> {
        let count = self.count.of(state)?;
        let mut elements = Vec::new();
        for _ in 0..count {
            let mut element = (self.make)(state);
            self.vmstate.load_from(&mut element, self.vmstate.version, loader)?;
            elements.push(element);
        }
        (self.set)(state, elements);
        Ok(())
    }

    fn flaws(&self, properties: &Properties, flaws: &mut Vec<Flaw>) {
        if self.count.limit() == 0 {
            flaws.push(Flaw::new(self.vmstate.name, "an array of it has no elements"));
        }
        self.vmstate.inner_flaws(properties, flaws);
    }
}
