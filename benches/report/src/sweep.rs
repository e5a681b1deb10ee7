//! Which cases there are.

use crate::case::{Case, Mode, Way};
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// One dimension at a time, on a region that even a discard-blind VMM moves in seconds.
    Quick,
    /// Everything with everything.
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
        }
    }

    /// Bytes that one case may move, or read: more takes too long.
    pub fn limit(self) -> u64 {
        match self {
            Self::Quick => 2 * GIB,
            Self::Full => u64::MAX,
        }
    }

    /// All cases, each once, in the order in which they are run.
    pub fn cases(self) -> Vec<Case> {
        let mut cases = Vec::new();
        let centre = self.centre();
        for mode in Mode::ALL {
            let case = Case { mode, ..centre };
            by_way(&mut cases, case);
            cases.extend(
                PLUGGED.map(|plugged| Case { plugged: share(case.region, plugged), ..case }),
            );
            cases.extend(TOUCHED.map(|touched_percent| Case { touched_percent, ..case }));
            let rate = Case { dirty_rate: RATES[2], ..case };
            by_way(&mut cases, rate);
            // What the guest uses stays the same.
            for region in REGIONS {
                by_way(&mut cases, Case { region, ..case });
            }
        }
        if self == Self::Full {
            for region in REGIONS {
                for plugged in PLUGGED.map(|plugged| share(region, plugged)) {
                    for touched_percent in TOUCHED {
                        for dirty_rate in RATES {
                            for mode in Mode::ALL {
                                let case = Case {
                                    region,
                                    plugged,
                                    touched_percent,
                                    dirty_rate,
                                    mode,
                                    ..centre
                                };
                                by_way(&mut cases, case);
                            }
                        }
                    }
                }
            }
        }
        let mut once: Vec<Case> = Vec::with_capacity(cases.len());
        for case in cases {
            if !once.contains(&case) && makes_sense(&case) {
                once.push(case);
            }
        }
        once
    }
}

fn by_way(cases: &mut Vec<Case>, case: Case) {
    cases.extend(Way::ALL.map(|way| Case { way, ..case }));
}

/// So many percent of a region, whole blocks.
pub fn share(region: u64, percent: u64) -> u64 {
    region / Case::BLOCK * percent / 100 * Case::BLOCK
}

/// Nobody writes memory that was never touched, or a guest that is not there yet.
fn makes_sense(case: &Case) -> bool {
    case.dirty_rate == 0 || (case.touched() != 0 && case.way.has_running_source())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_full_profile_has_every_combination_once() {
        let cases = Profile::Full.cases();
        let idle = 5 * 4 * 4 * 5 * 4;
        // Neither a restore nor a guest that touched nothing is dirtied.
        let dirtied = 2 * 5 * 3 * 4 * 4 * 4;
        let swept = |case: &&Case| {
            PLUGGED.iter().any(|&percent| share(case.region, percent) == case.plugged)
        };
        assert_eq!(cases.iter().filter(swept).count(), idle + dirtied);
        assert!(Profile::Quick.cases().len() < 200);
    }

    #[test]
    fn everything_plugged_is_the_whole_region() {
        for region in REGIONS.into_iter().chain([GIB]) {
            assert_eq!(share(region, 100), region);
        }
    }
}
