//! Which cases there are.

use serde::{Deserialize, Serialize};

use crate::case::{Case, Mode, Way};
use crate::content::Content;
use crate::link::Link;
use crate::units::{GIB, MIB};

/// Percentages of the region that are plugged.
pub const PLUGGED: [u64; 5] = [1, 5, 25, 50, 100];
/// Percentages of what is plugged that hold data.
pub const TOUCHED: [u64; 4] = [0, 10, 50, 100];
/// Sizes of the region, bytes.
pub const REGIONS: [u64; 4] = [8 * GIB, 64 * GIB, 512 * GIB, 1024 * GIB];
/// What the guest writes, bytes a second.
pub const RATES: [u64; 3] = [0, 64 * MIB, 256 * MIB];

/// What a run of the report covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// One dimension at a time, on a region that even a discard-blind VMM moves in seconds.
    Quick,
    /// An idle guest in every shape, for the modes to which shapes matter; one that writes in the
    /// shape of the centre.
    Full,
}

impl Profile {
    /// The point that all sweeps go through, by the mode that knows everything.
    pub fn centre(self) -> Case {
        let region = match self {
            Self::Quick => GIB,
            Self::Full => 8 * GIB,
        };
        Case {
            region,
            plugged: share(region, 25),
            touched_percent: 50,
            dirty_rate: 0,
            way: Way::Precopy,
            mode: Mode::HoleAware,
            link: Link::default(),
            content: Content::default(),
        }
    }

    /// What is moved over each link: more than at the centre, so that what a link costs shows.
    pub fn linked(self, link: Link) -> Case {
        Case { touched_percent: 100, link, ..self.centre() }
    }

    /// What is moved over each link of [`Link::COMPRESSED`].
    pub fn compressed(self, link: Link, content: Content) -> Case {
        Case { content, ..self.linked(link) }
    }

    /// Bytes that one case may move, or read: more takes too long, however large the machine is.
    /// The region of the centre may be moved whole, or there was nothing to compare with; on the
    /// larger ones a guest that uses as much shows nothing new.
    pub fn limit(self, case: &Case) -> u64 {
        match self {
            Self::Quick => 2 * GIB,
            Self::Full if case.region == self.centre().region => case.region,
            Self::Full => 4 * GIB,
        }
    }

    /// All cases, each once, in the order in which they are run.
    pub fn cases(self) -> Vec<Case> {
        let mut cases = Vec::new();
        match self {
            Self::Quick => self.add_quick(&mut cases),
            Self::Full => self.add_full(&mut cases),
        }
        cases.extend(Link::ALL.map(|link| self.linked(link)));
        for content in Content::ALL {
            cases.extend(Link::COMPRESSED.map(|link| self.compressed(link, content)));
        }
        let mut once: Vec<Case> = Vec::with_capacity(cases.len());
        for case in cases {
            if !once.contains(&case) && makes_sense(&case) {
                once.push(case);
            }
        }
        once
    }

    /// All ways where that is what is compared, precopy along the other lines.
    fn add_quick(self, cases: &mut Vec<Case>) {
        for mode in Mode::ALL {
            let case = Case { mode, ..self.centre() };
            by_way(cases, case);
            cases.extend(plugged_line(case));
            cases.extend(touched_line(case));
            by_way(cases, Case { dirty_rate: RATES[2], ..case });
            region_line(case).for_each(|case| by_way(cases, case));
        }
    }

    /// What tells something, in an hour or two and not in days: how fast a guest writes matters for
    /// one shape, and a VMM that knows nothing reads the region whatever is in it.
    fn add_full(self, cases: &mut Vec<Case>) {
        let centre = self.centre();
        for mode in Mode::ALL {
            let case = Case { mode, ..centre };
            let lines = plugged_line(case).chain(region_line(case)).chain(rate_line(case));
            lines.for_each(|case| by_way(cases, case));
            cases.extend(touched_line(case));
        }
        for mode in Mode::ALL.into_iter().filter(|mode| mode.knows_blocks()) {
            for region in REGIONS {
                for case in plugged_line(Case { region, mode, ..centre }) {
                    touched_line(case).for_each(|case| by_way(cases, case));
                }
            }
        }
    }
}

fn plugged_line(case: Case) -> impl Iterator<Item = Case> {
    let plugged = PLUGGED.into_iter().map(move |percent| share(case.region, percent));
    plugged.map(move |plugged| Case { plugged, ..case })
}

fn touched_line(case: Case) -> impl Iterator<Item = Case> {
    TOUCHED.into_iter().map(move |touched_percent| Case { touched_percent, ..case })
}

/// What the guest uses stays the same.
fn region_line(case: Case) -> impl Iterator<Item = Case> {
    REGIONS.into_iter().map(move |region| Case { region, ..case })
}

fn rate_line(case: Case) -> impl Iterator<Item = Case> {
    RATES.into_iter().map(move |dirty_rate| Case { dirty_rate, ..case })
}

fn by_way(cases: &mut Vec<Case>, case: Case) {
    cases.extend(Way::ALL.map(|way| Case { way, ..case }));
}

/// So many percent of a region, whole blocks.
pub fn share(region: u64, percent: u64) -> u64 {
    region / Case::BLOCK * percent / 100 * Case::BLOCK
}

/// A vCPU that writes memory which was never touched, or has no guest yet, does not exist.
fn makes_sense(case: &Case) -> bool {
    case.dirty_rate == 0 || (case.touched() != 0 && case.way.has_running_source())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_full_profile_has_every_shape_of_an_idle_guest_once() {
        let cases = Profile::Full.cases();
        for mode in Mode::ALL {
            let idle =
                |case: &&Case| case.mode == mode && case.way == Way::Hybrid && case.dirty_rate == 0;
            let swept = |case: &&Case| {
                PLUGGED.iter().any(|&percent| share(case.region, percent) == case.plugged)
            };
            let shapes = match mode {
                // Along one line, since that of the region leaves the sweep.
                Mode::DiscardBlind | Mode::ZeroDetecting => PLUGGED.len(),
                Mode::BlockAware | Mode::HoleAware => PLUGGED.len() * TOUCHED.len() * REGIONS.len(),
            };
            let found = cases.iter().filter(idle).filter(swept).count();
            assert_eq!(found, shapes, "{mode:?}");
        }
    }

    #[test]
    fn every_mode_has_a_line_for_every_dimension() {
        for profile in [Profile::Quick, Profile::Full] {
            let (cases, centre) = (profile.cases(), profile.centre());
            for mode in Mode::ALL {
                let case = Case { mode, ..centre };
                let mut lines = plugged_line(case).chain(touched_line(case));
                assert!(lines.all(|case| cases.contains(&case)), "{profile:?} {mode:?}");
                assert!(
                    region_line(case).all(|case| cases.contains(&case)),
                    "{profile:?} {mode:?}"
                );
            }
        }
    }

    #[test]
    fn a_guest_that_writes_has_the_shape_of_the_centre() {
        let cases = Profile::Full.cases();
        let writing: Vec<_> = cases.iter().filter(|case| case.dirty_rate != 0).collect();
        let ways = Way::ALL.iter().filter(|way| way.has_running_source()).count();
        assert_eq!(writing.len(), ways * Mode::ALL.len() * (RATES.len() - 1));
        let centre = Profile::Full.centre();
        assert!(writing.iter().all(|case| case.touched() == centre.touched()));
    }

    #[test]
    fn only_the_region_of_the_centre_may_be_moved_whole() {
        for profile in [Profile::Quick, Profile::Full] {
            let centre = profile.centre();
            assert!(profile.limit(&centre) >= centre.region);
            let larger = REGIONS.into_iter().filter(|region| *region > centre.region);
            for region in larger {
                assert!(profile.limit(&Case { region, ..centre }) < region);
            }
        }
    }

    #[test]
    fn every_link_has_the_same_guest_in_each_profile() {
        for profile in [Profile::Quick, Profile::Full] {
            let (cases, centre) = (profile.cases(), profile.centre());
            for link in Link::ALL {
                let linked =
                    cases.iter().filter(|case| (case.link, case.content) == (link, Content::Noise));
                let linked: Vec<_> = linked.collect();
                let guest = |case: &&&Case| {
                    case.way == Way::Precopy
                        && case.mode == Mode::HoleAware
                        && (case.region, case.plugged) == (centre.region, centre.plugged)
                        && (case.touched_percent, case.dirty_rate) == (100, 0)
                };
                assert_eq!(linked.iter().filter(guest).count(), 1, "{profile:?} {link:?}");
                assert!(link == Link::default() || linked.len() == 1, "{profile:?} {link:?}");
            }
        }
    }

    #[test]
    fn each_content_goes_plain_and_compressed_in_each_profile() {
        for profile in [Profile::Quick, Profile::Full] {
            let cases = profile.cases();
            for content in Content::ALL {
                for link in Link::COMPRESSED {
                    let case = profile.compressed(link, content);
                    assert_eq!(cases.iter().filter(|found| **found == case).count(), 1, "{case}");
                }
            }
        }
    }

    #[test]
    fn the_quick_profile_stays_small() {
        assert!(Profile::Quick.cases().len() < 200);
    }

    #[test]
    fn everything_plugged_is_the_whole_region() {
        for region in REGIONS.into_iter().chain([GIB]) {
            assert_eq!(share(region, 100), region);
        }
    }
}
