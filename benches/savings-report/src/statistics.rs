//! Several runs of the same, as one figure.

/// What several runs gave: the one in the middle, and how far they lie apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The value in the middle; of an even number the mean of the two in the middle.
    pub median: f64,
    /// The smallest.
    pub least: f64,
    /// The largest.
    pub most: f64,
}

impl Spread {
    /// Of some values; `None` of none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len().is_multiple_of(2) {
            f64::midpoint(values[middle - 1], values[middle])
        } else {
            values[middle]
        };
        Some(Self { median, least, most })
    }

    /// The median, and the others where they look different.
    pub fn text(&self, words: impl Fn(f64) -> String) -> String {
        let [median, least, most] = [self.median, self.least, self.most].map(words);
        if least == median && median == most {
            median
        } else {
            format!("{median} ({least} – {most})")
        }
    }
}

/// How many times `one` is the median of `other`; `None` where there is no such number.
pub fn ratio(one: Spread, other: Spread) -> Option<f64> {
    (other.median > 0.0).then(|| one.median / other.median)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let spread = |values: &[f64]| Spread::of(values.iter().copied());
        let all = |median, least, most| Some(Spread { median, least, most });
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[3.0]), all(3.0, 3.0, 3.0));
        assert_eq!(spread(&[9.0, 1.0, 2.0]), all(2.0, 1.0, 9.0));
        assert_eq!(spread(&[9.0, 1.0, 2.0, 4.0]), all(3.0, 1.0, 9.0));
    }

    #[test]
    fn values_that_look_alike_are_written_once() {
        let words = |value: f64| format!("{value:.0}");
        assert_eq!(Spread::of([1.1, 1.2]).unwrap().text(words), "1");
        assert_eq!(Spread::of([1.0, 2.0, 4.0]).unwrap().text(words), "2 (1 – 4)");
    }

    #[test]
    fn nothing_is_a_multiple_of_nothing() {
        let spread = |value| Spread::of([value]).unwrap();
        assert_eq!(ratio(spread(3.0), spread(2.0)), Some(1.5));
        assert_eq!(ratio(spread(3.0), spread(0.0)), None);
    }
}
