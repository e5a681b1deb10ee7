//! What a migration to another host makes use of, under QEMU's names, and what excludes what.

use super::Parameters;
use crate::error::MigrationError;
use crate::steering;
use crate::stream::{CAPABILITY_IGNORE_SHARED, CAPABILITY_MAPPED_RAM};

/// A capability (QEMU's MigrationCapability).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Capability {
    IgnoreShared,
    MappedRam,
    PostcopyPreempt,
    PostcopyRam,
    ReturnPath,
}

use Capability::{IgnoreShared, MappedRam, PostcopyPreempt, PostcopyRam, ReturnPath};

impl Capability {
    const ALL: [Self; 5] = [IgnoreShared, MappedRam, PostcopyPreempt, PostcopyRam, ReturnPath];

    fn name(self) -> &'static str {
        match self {
            Self::IgnoreShared => CAPABILITY_IGNORE_SHARED,
            Self::MappedRam => CAPABILITY_MAPPED_RAM,
            Self::PostcopyPreempt => "postcopy-preempt",
            Self::PostcopyRam => "postcopy-ram",
            Self::ReturnPath => "return-path",
        }
    }
}

/// What is in use.
pub(super) struct Capabilities([bool; Capability::ALL.len()]);

/// Pairs of which both may not be in use.
const EXCLUDE: &[(Capability, Capability, &str)] = &[
    (PostcopyRam, IgnoreShared, "switch one of them off"),
    (MappedRam, ReturnPath, "it is the layout of a file: save a snapshot, or send one way"),
    (MappedRam, PostcopyRam, "switch one of them off"),
];

/// The first needs the second.
const REQUIRE: &[(Capability, Capability, &str)] = &[
    (PostcopyRam, ReturnPath, "and the stream goes one way"),
    (PostcopyPreempt, PostcopyRam, "and postcopy was not provided for"),
];

impl Capabilities {
    /// Of a migration with these parameters, with postcopy and its own channel for pages that are asked for.
    pub(super) fn of(parameters: &Parameters, postcopy: bool, preempt: bool) -> Self {
        Self(Capability::ALL.map(|capability| match capability {
            IgnoreShared | MappedRam => parameters.configuration.has(capability.name()),
            PostcopyPreempt => preempt,
            PostcopyRam => postcopy,
            ReturnPath => !parameters.one_way,
        }))
    }

    fn has(&self, capability: Capability) -> bool {
        let mut all = Capability::ALL.into_iter().zip(self.0);
        all.any(|(known, used)| known == capability && used)
    }

    /// Refuses what excludes each other, and what lacks something that it needs.
    fn check(&self) -> Result<(), MigrationError> {
        for &(one, other, remedy) in EXCLUDE {
            if self.has(one) && self.has(other) {
                let (one, other) = (one.name(), other.name());
                let what = format!("{one} and {other} exclude each other: {remedy}");
                return Err(MigrationError::NotPossible(what));
            }
        }
        for &(one, needed, why) in REQUIRE {
            if self.has(one) && !self.has(needed) {
                return Err(lacks(one, needed, why));
            }
        }
        Ok(())
    }
}

fn lacks(one: Capability, needed: Capability, why: &str) -> MigrationError {
    let what = format!("{} needs {}, {why}", one.name(), needed.name());
    MigrationError::NotPossible(what)
}

/// Refuses parameters that no migration can have, or not together, before anything is sent.
///
/// # Errors
///
/// Which, under QEMU's names, and what to do.
pub(super) fn check(
    parameters: &Parameters,
    postcopy: bool,
    preempt: bool,
) -> Result<(), MigrationError> {
    steering::check(parameters).map_err(|error| MigrationError::NotPossible(error.to_string()))?;
    Capabilities::of(parameters, postcopy, preempt).check()
}

/// Postcopy without a return path, which [`check`] has refused.
pub(super) fn no_way_back() -> MigrationError {
    lacks(PostcopyRam, ReturnPath, "and the stream goes one way")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::Configuration;

    /// What is said of all combinations, of which the numbers have a bit for each capability.
    #[test]
    fn what_excludes_each_other_or_lacks_something_is_refused_by_name() {
        let mut said = Vec::new();
        for bits in 0..1u32 << Capability::ALL.len() {
            let mut number = 0..;
            let used = Capability::ALL.map(|_| bits >> number.next().unwrap_or(0) & 1 != 0);
            let capabilities = Capabilities(used);
            let has = |capability| capabilities.has(capability);
            let fits = !(has(PostcopyRam) && (has(IgnoreShared) || !has(ReturnPath)))
                && !(has(MappedRam) && (has(ReturnPath) || has(PostcopyRam)))
                && (has(PostcopyRam) || !has(PostcopyPreempt));
            let checked = capabilities.check();
            assert_eq!(checked.is_ok(), fits, "{used:?}");
            said.extend(checked.err().map(|error| error.to_string()));
        }
        said.sort();
        said.dedup();
        let expected = [
            "mapped-ram and postcopy-ram exclude each other: switch one of them off",
            "mapped-ram and return-path exclude each other: it is the layout of a file: save a \
             snapshot, or send one way",
            "postcopy-preempt needs postcopy-ram, and postcopy was not provided for",
            "postcopy-ram and x-ignore-shared exclude each other: switch one of them off",
            "postcopy-ram needs return-path, and the stream goes one way",
        ];
        assert_eq!(said, expected);
    }

    #[test]
    fn what_is_in_use_is_found_in_the_parameters() {
        let mut parameters = Parameters::new(Configuration::new("test"));
        check(&parameters, true, true).unwrap();
        parameters.one_way = true;
        assert!(check(&parameters, true, false).is_err());
        check(&parameters, false, false).unwrap();
        parameters.throttle.max = 100;
        let error = check(&parameters, false, false).unwrap_err().to_string();
        assert!(error.contains("max-cpu-throttle: 100"), "{error}");
    }
}
