//! What to say of figures against the baseline.

use std::collections::BTreeSet;

use crate::figure::{Figure, Figures};

/// What became of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// About what it was.
    Same,
    /// It costs more than the bound allows.
    Slower,
    /// It costs so much less that the baseline would let the gain be lost again.
    Stale,
    /// The baseline does not have it.
    New,
    /// Only the baseline has it.
    Gone,
    /// The two count by different units.
    OtherUnit,
}

/// A path, what it was and what it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// The path.
    pub name: String,
    /// What the baseline says.
    pub baseline: Option<Figure>,
    /// What was measured.
    pub now: Option<Figure>,
    /// What that means.
    pub verdict: Verdict,
}

impl Verdict {
    /// Whether the program fails for it.
    pub fn is_error(self) -> bool {
        !matches!(self, Self::Same | Self::Stale)
    }

    /// What a reader is told, if anything.
    pub fn told(self) -> &'static str {
        match self {
            Self::Same => "",
            Self::Slower => "ABOVE THE BOUND",
            Self::Stale => "baseline is stale: run with --update",
            Self::New => "NOT IN THE BASELINE: run with --update",
            Self::Gone => "ONLY IN THE BASELINE: run with --update",
            Self::OtherUnit => "COUNTED BY ANOTHER UNIT: run with --update",
        }
    }
}

impl Comparison {
    /// Now to baseline, where both are known.
    pub fn ratio(&self) -> Option<f64> {
        Some(self.now.as_ref()?.instructions / self.baseline.as_ref()?.instructions)
    }
}

/// Compares every path of either; `bound` is a share, such as 0.25.
pub fn compare(baseline: &Figures, now: &Figures, bound: f64) -> Vec<Comparison> {
    let names: BTreeSet<&String> = baseline.keys().chain(now.keys()).collect();
    let compare = |name: &String| {
        let (baseline, now) = (baseline.get(name).cloned(), now.get(name).cloned());
        let verdict = verdict(baseline.as_ref(), now.as_ref(), bound);
        Comparison { name: name.clone(), baseline, now, verdict }
    };
    names.into_iter().map(compare).collect()
}

fn verdict(baseline: Option<&Figure>, now: Option<&Figure>, bound: f64) -> Verdict {
    match (baseline, now) {
        (None, _) => Verdict::New,
        (_, None) => Verdict::Gone,
        (Some(baseline), Some(now)) if baseline.per != now.per => Verdict::OtherUnit,
        (Some(baseline), Some(now)) => {
            // A baseline of nothing has no ratio, and is as wrong as one that was exceeded.
            let ratio = now.instructions / baseline.instructions;
            if ratio < 1.0 - bound {
                Verdict::Stale
            } else if ratio <= 1.0 + bound {
                Verdict::Same
            } else {
                Verdict::Slower
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(figures: &[(&str, u64, &str)]) -> Figures {
        let figure = |(name, instructions, per): &(&str, u64, &str)| {
            ((*name).to_owned(), Figure::new(*instructions, 1, per))
        };
        figures.iter().map(figure).collect()
    }

    fn verdict_of(before: u64, now: u64) -> Verdict {
        let (before, now) = (figures(&[("a", before, "page")]), figures(&[("a", now, "page")]));
        let [only] = &compare(&before, &now, 0.25)[..] else { panic!("one path") };
        only.verdict
    }

    #[test]
    fn only_what_is_above_the_bound_fails() {
        assert_eq!(verdict_of(100, 125), Verdict::Same);
        assert_eq!(verdict_of(100, 126), Verdict::Slower);
        assert!(Verdict::Slower.is_error());
        assert!(!Verdict::Same.is_error());
    }

    #[test]
    fn a_gain_is_told_and_does_not_fail() {
        assert_eq!(verdict_of(100, 75), Verdict::Same);
        assert_eq!(verdict_of(100, 74), Verdict::Stale);
        assert!(!Verdict::Stale.is_error());
    }

    #[test]
    fn a_path_that_only_one_side_has_is_an_error() {
        let baseline = figures(&[("both", 1, "page"), ("gone", 1, "page")]);
        let now = figures(&[("both", 1, "page"), ("new", 1, "page")]);
        let verdicts: Vec<_> = compare(&baseline, &now, 0.25)
            .into_iter()
            .map(|comparison| (comparison.name, comparison.verdict))
            .collect();
        let expected = [("both", Verdict::Same), ("gone", Verdict::Gone), ("new", Verdict::New)];
        assert_eq!(verdicts, expected.map(|(name, verdict)| (name.to_owned(), verdict)));
        assert!(Verdict::Gone.is_error() && Verdict::New.is_error());
    }

    #[test]
    fn another_unit_or_a_baseline_of_nothing_is_an_error() {
        let (before, now) = (figures(&[("a", 1, "page")]), figures(&[("a", 1, "range")]));
        assert_eq!(compare(&before, &now, 0.25)[0].verdict, Verdict::OtherUnit);
        assert!(Verdict::OtherUnit.is_error());
        assert_eq!(verdict_of(0, 1), Verdict::Slower);
        assert_eq!(verdict_of(0, 0), Verdict::Slower);
    }
}
