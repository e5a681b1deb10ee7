//! Descriptions that leave no member of a state out.

use std::collections::BTreeSet;

use super::description::{Kind, VmState};
use super::properties::Properties;

/// The names of all members of a state `T`, made by [`members!`](crate::members).
///
/// [`missing`](Self::missing) tells those that no description has a field for, for a test next to
/// the description: a new member does not compile until it is listed, and the test fails until it
/// has a field of its name.
pub struct Members<T: 'static> {
    names: &'static [&'static str],
    /// Takes all members apart: does not compile when one is not listed.
    #[expect(dead_code, reason = "only the compiler looks at it")]
    all: fn(&T),
}

impl<T: 'static> Members<T> {
    /// For [`members!`](crate::members), which cannot forget one.
    #[doc(hidden)]
    pub const fn listed(names: &'static [&'static str], all: fn(&T)) -> Self {
        Self { names, all }
    }

    /// The members without a field in any of `descriptions`, with these properties.
    pub fn missing(
        &self,
        descriptions: &[&'static VmState<T>],
        properties: &Properties,
    ) -> Vec<&'static str> {
        let mut described = BTreeSet::new();
        for vmstate in descriptions {
            collect(vmstate, properties, &mut described);
        }
        self.names.iter().copied().filter(|name| !described.contains(name)).collect()
    }
}

fn collect<T: 'static>(
    vmstate: &'static VmState<T>,
    properties: &Properties,
    described: &mut BTreeSet<&'static str>,
) {
    if !properties.allow(vmstate.condition) {
        return;
    }
    let sent = vmstate.fields.iter().filter(|field| {
        properties.allow(field.condition) && !matches!(field.kind, Kind::Unused(_))
    });
    described.extend(sent.map(|field| field.name));
    vmstate.subsections.iter().for_each(|sub| collect(sub, properties, described));
}

/// The [`Members`](crate::Members) of a structure, all of them: one that is
/// left out does not compile.
///
/// ```
/// # use vmstate::*;
/// struct State { sector: u64, busy: bool }
///
/// static VMSTATE: VmState<State> = VmState::new("disk", 1, &[
///     Field::u64("sector", Access::Mutable(|s| s.sector, |s, sector| s.sector = sector)),
/// ]);
/// let missing = members!(State { sector, busy }).missing(&[&VMSTATE], &Properties::default());
/// assert_eq!(missing, ["busy"]);
/// ```
///
/// ```compile_fail,E0027
/// # use vmstate::members;
/// struct State { sector: u64, busy: bool }
/// let members = members!(State { sector });
/// ```
#[macro_export]
macro_rules! members {
    ($type:ident { $($member:ident),+ $(,)? }) => {
        $crate::Members::<$type>::listed(
            &[$(stringify!($member)),+],
            |state| {
                let $type { $($member: _),+ } = state;
            },
        )
    };
}
