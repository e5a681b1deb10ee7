//! The records as sweeps: lines through the centre along which one thing changes.

use crate::case::{Case, Mode, Way};
use crate::content::Content;
use crate::link::Link;
use crate::record::Record;
use crate::sweep::{Profile, RATES};
use crate::units::{GIB, size};

/// What changes along a sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dimension {
    /// How much of the region is plugged.
    Plugged,
    /// How much of what is plugged was touched.
    Touched,
    /// How fast the guest writes.
    Rate,
    /// How large the region is; what is plugged stays the same.
    Region,
}

impl Dimension {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Plugged, Self::Touched, Self::Rate, Self::Region];

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plugged => "plugged share",
            Self::Touched => "touched share of plugged",
            Self::Rate => "dirty rate",
            Self::Region => "size of the region",
        }
    }

    /// Where a case is on an axis.
    pub fn value(self, case: &Case) -> f64 {
        match self {
            Self::Plugged => case.plugged_percent(),
            Self::Touched => case.touched_percent as f64,
            Self::Rate => case.dirty_rate as f64 / f64::from(1 << 20),
            Self::Region => case.region as f64 / GIB as f64,
        }
    }

    /// The unit of the axis.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Plugged => "% of the region plugged",
            Self::Touched => "% of what is plugged touched",
            Self::Rate => "MiB/s written by the guest",
            Self::Region => "GiB of region (logarithmic)",
        }
    }

    /// The value in words.
    pub fn label(self, case: &Case) -> String {
        match self {
            Self::Plugged => format!("{:.0} % ({})", case.plugged_percent(), size(case.plugged)),
            Self::Touched => format!("{} % ({})", case.touched_percent, size(case.touched())),
            Self::Rate => format!("{}/s", size(case.dirty_rate)),
            Self::Region => size(case.region),
        }
    }

    /// The case, brought back to the centre along this dimension.
    fn centred(self, case: &Case, centre: &Case) -> Case {
        let mut case = *case;
        match self {
            Self::Plugged => case.plugged = centre.plugged,
            Self::Touched => case.touched_percent = centre.touched_percent,
            Self::Rate => case.dirty_rate = centre.dirty_rate,
            Self::Region => case.region = centre.region,
        }
        case
    }
}

/// All that was measured.
pub struct View<'a> {
    /// How.
    pub profile: Profile,
    /// What came out.
    pub records: &'a [Record],
}

impl<'a> View<'a> {
    /// The records of `way` and `mode` along a dimension, ascending.
    pub fn sweep(&self, dimension: Dimension, way: Way, mode: Mode) -> Vec<&'a Record> {
        let centre = Case { way, mode, ..self.profile.centre() };
        let on_line = |record: &&Record| dimension.centred(&record.case, &centre) == centre;
        let mut found: Vec<_> = self.records.iter().filter(on_line).collect();
        found.sort_by(|a, b| dimension.value(&a.case).total_cmp(&dimension.value(&b.case)));
        found
    }

    /// The record of `way` and `mode` at the centre, with the guest idle or writing fast.
    pub fn centre(&self, way: Way, mode: Mode, writing: bool) -> Option<&'a Record> {
        let dirty_rate = if writing { RATES[2] } else { 0 };
        let case = Case { way, mode, dirty_rate, ..self.profile.centre() };
        self.records.iter().find(|record| record.case == case)
    }

    /// The record of `content` that is moved over `link`.
    pub fn compressed(&self, link: Link, content: Content) -> Option<&'a Record> {
        let case = self.profile.compressed(link, content);
        self.records.iter().find(|record| record.case == case)
    }

    /// The record of what is moved over `link`.
    pub fn linked(&self, link: Link) -> Option<&'a Record> {
        let case = self.profile.linked(link);
        self.records.iter().find(|record| record.case == case)
    }
}
