//! What a migration to another host makes use of, under QEMU's names, and what excludes what.

use super::Parameters;
use crate::error::MigrationError;
use crate::steering;
use crate::stream::{
    CAPABILITY_IGNORE_SHARED, CAPABILITY_MAPPED_RAM, CAPABILITY_MULTIFD, CAPABILITY_MULTIFD_ZSTD,
};

/// A capability (QEMU's MigrationCapability), and compression, which in QEMU is a parameter of both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Capability {
    IgnoreShared,
    MappedRam,
    Multifd,
    MultifdZstd,
    PostcopyPreempt,
    PostcopyRam,
    ReturnPath,
}

use Capability::{
    IgnoreShared, MappedRam, Multifd, MultifdZstd, PostcopyPreempt, PostcopyRam, ReturnPath,
};

impl Capability {
    const ALL: [Self; 7] =
        [IgnoreShared, MappedRam, Multifd, MultifdZstd, PostcopyPreempt, PostcopyRam, ReturnPath];

    fn name(self) -> &'static str {
        match self {
            Self::IgnoreShared => CAPABILITY_IGNORE_SHARED,
            Self::MappedRam => CAPABILITY_MAPPED_RAM,
            Self::Multifd => CAPABILITY_MULTIFD,
            Self::MultifdZstd => CAPABILITY_MULTIFD_ZSTD,
            Self::PostcopyPreempt => "postcopy-preempt",
            Self::PostcopyRam => "postcopy-ram",
            Self::ReturnPath => "return-path",
        }
    }
}

/// What is in use.
pub(super) struct Capabilities([bool; Capability::ALL.len()]);

/// What a migration has not got, and a snapshot has.
const OF_FILES: &[(Capability, &str)] = &[(
    MappedRam,
    "is the layout of a file, and pages go out as they are found: save a snapshot, or switch it off",
)];

/// Pairs of which both may not be in use.
const EXCLUDE: &[(Capability, Capability, &str)] =
    &[(PostcopyRam, IgnoreShared, "switch one of them off")];

/// The first needs the second.
const REQUIRE: &[(Capability, Capability, &str)] = &[
    (MultifdZstd, Multifd, "and pages go over the main channel, where none are compressed"),
    (PostcopyRam, ReturnPath, "and the stream goes one way"),
    (PostcopyPreempt, PostcopyRam, "and postcopy was not provided for"),
];

impl Capabilities {
    /// Of a migration with these parameters, with postcopy and its own channel for pages that are asked for.
    pub(super) fn of(parameters: &Parameters, postcopy: bool, preempt: bool) -> Self {
        Self(Capability::ALL.map(|capability| match capability {
            IgnoreShared | MappedRam | Multifd | MultifdZstd => {
                parameters.configuration.has(capability.name())
            }
            PostcopyPreempt => preempt,
            PostcopyRam => postcopy,
            ReturnPath => !parameters.one_way,
        }))
    }

    fn has(&self, capability: Capability) -> bool {
        let mut all = Capability::ALL.into_iter().zip(self.0);
        all.any(|(known, used)| known == capability && used)
    }

    /// Refuses what is for files, what excludes each other, and what lacks something that it needs.
    fn check(&self) -> Result<(), MigrationError> {
        for &(one, why) in OF_FILES {
            if self.has(one) {
                return Err(MigrationError::NotPossible(format!("{} {why}", one.name())));
            }
        }
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
                && !has(MappedRam)
                && (has(Multifd) || !has(MultifdZstd))
                && (has(PostcopyRam) || !has(PostcopyPreempt));
            let checked = capabilities.check();
            assert_eq!(checked.is_ok(), fits, "{used:?}");
            said.extend(checked.err().map(|error| error.to_string()));
        }
        said.sort();
        said.dedup();
        let expected = [
            "mapped-ram is the layout of a file, and pages go out as they are found: save a \
             snapshot, or switch it off",
            "postcopy-preempt needs postcopy-ram, and postcopy was not provided for",
            "postcopy-ram and x-ignore-shared exclude each other: switch one of them off",
            "postcopy-ram needs return-path, and the stream goes one way",
            "x-multifd-zstd needs multifd, and pages go over the main channel, where none are \
             compressed",
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
        for (capability, fits) in
            [("x-multifd-zstd", false), ("multifd", true), ("mapped-ram", false)]
        {
            parameters.configuration.capabilities.push(capability.to_owned());
            assert_eq!(check(&parameters, false, false).is_ok(), fits, "{capability}");
        }
        parameters.configuration.capabilities.clear();
        parameters.multifd_zstd_level = 21;
        let error = check(&parameters, false, false).unwrap_err().to_string();
        assert!(error.contains("multifd-zstd-level: 21 is not 1 to 20"), "{error}");
        parameters.multifd_zstd_level = 20;
        parameters.throttle.max = 100;
        let error = check(&parameters, false, false).unwrap_err().to_string();
        assert!(error.contains("max-cpu-throttle: 100"), "{error}");
    }
}
