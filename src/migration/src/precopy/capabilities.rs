//! What a migration to another host makes use of, under QEMU's names, and what excludes what.

use super::Parameters;
use crate::channel::Channel;
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
    channels: &InUse<'_>,
) -> Result<(), MigrationError> {
    steering::check(parameters).map_err(|error| MigrationError::NotPossible(error.to_string()))?;
    Capabilities::of(parameters, postcopy, channels.urgent.is_some()).check()?;
    channels.check()
}

/// The channels of a side.
pub(crate) struct InUse<'a> {
    pub(crate) main: &'a Channel,
    /// For pages that are asked for.
    pub(crate) urgent: Option<&'a Channel>,
    /// Whether each of those for pages is encrypted.
    pub(crate) pages: Vec<bool>,
}

impl InUse<'_> {
    /// Refuses channels of which some are encrypted, and others are not: what goes over those could be read, and a page
    /// that was changed on its way would be the guest's. QEMU has `tls-creds` for all of them or for none.
    pub(crate) fn check(&self) -> Result<(), MigrationError> {
        let main = self.main.is_encrypted();
        let urgent = self.urgent.map(|urgent| ("the channel for urgent pages".to_owned(), urgent));
        let urgent = urgent.map(|(name, urgent)| (name, urgent.is_encrypted()));
        let pages = self.pages.iter().enumerate();
        let pages = pages.map(|(number, is)| (format!("channel {number} for pages"), *is));
        match urgent.into_iter().chain(pages).find(|(_, is)| *is != main) {
            None => Ok(()),
            Some((other, _)) if main => Err(differ("the main channel", &other)),
            Some((other, _)) => Err(differ(&other, "the main channel")),
        }
    }

    /// Also refuses them when those that they follow on were not as they are.
    pub(crate) fn check_as_before(&self, encrypted: bool) -> Result<(), MigrationError> {
        match (encrypted, self.main.is_encrypted()) {
            (true, false) => Err(differ("the main channel before the break", "the new one")),
            (false, true) => Err(differ("the new main channel", "the one before the break")),
            _ => self.check(),
        }
    }
}

fn differ(encrypted: &str, plain: &str) -> MigrationError {
    let what = format!(
        "tls-creds is for all channels of a migration or for none: {encrypted} is encrypted, and {plain} is \
         not; connect them alike"
    );
    MigrationError::NotPossible(what)
}

/// Postcopy without a return path, which [`check`] has refused.
pub(super) fn no_way_back() -> MigrationError {
    lacks(PostcopyRam, ReturnPath, "and the stream goes one way")
}

#[cfg(test)]
mod tests {
    use super::check as check_with;
    use super::*;
    use crate::channel::faulty::Faulty;
    use crate::progress::Progress;
    use crate::stream::Configuration;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    fn channel(encrypted: bool) -> Channel {
        let faulty = Faulty::new(UnixStream::pair().unwrap().0, 1);
        let transport = if encrypted { faulty.encrypted() } else { faulty };
        Channel::over(Arc::new(transport), Arc::new(Progress::new()))
    }

    #[test]
    fn channels_that_are_not_all_encrypted_or_none_are_refused_by_name() {
        let (tls, plain) = (channel(true), channel(false));
        let said = |main, urgent, pages: &[bool]| {
            let checked = InUse { main, urgent, pages: pages.to_vec() }.check();
            checked.err().map(|error| error.to_string()).unwrap_or_default()
        };
        for (main, is) in [(&tls, true), (&plain, false)] {
            assert_eq!(said(main, None, &[]), "");
            assert_eq!(said(main, Some(main), &[is; 3]), "");
        }
        let error = said(&tls, Some(&plain), &[true]);
        let expected =
            "the main channel is encrypted, and the channel for urgent pages is not; connect";
        assert!(error.contains(expected), "{error}");
        assert!(error.starts_with("tls-creds is for all channels"), "{error}");
        let error = said(&tls, Some(&tls), &[true, true, false]);
        assert!(
            error.contains("main channel is encrypted, and channel 2 for pages is not"),
            "{error}"
        );
        let error = said(&plain, None, &[false, true]);
        assert!(
            error.contains("channel 1 for pages is encrypted, and the main channel is not"),
            "{error}"
        );
        let error = said(&plain, Some(&tls), &[]);
        assert!(
            error.contains("urgent pages is encrypted, and the main channel is not"),
            "{error}"
        );

        let again = |main, urgent, before| {
            let checked = InUse { main, urgent, pages: Vec::new() }.check_as_before(before);
            checked.err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert_eq!(again(&tls, Some(&tls), true), "");
        assert_eq!(again(&plain, Some(&plain), false), "");
        assert!(again(&tls, Some(&plain), true).contains("urgent pages is not"));
        let error = again(&plain, None, true);
        assert!(error.contains("before the break is encrypted, and the new one is not"), "{error}");
        let error = again(&tls, None, false);
        assert!(error.contains("the new main channel is encrypted, and the one before"), "{error}");
    }

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
        let channel = channel(false);
        let check = |parameters: &Parameters, postcopy, preempt: bool| {
            let urgent = preempt.then_some(&channel);
            check_with(parameters, postcopy, &InUse { main: &channel, urgent, pages: Vec::new() })
        };
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
