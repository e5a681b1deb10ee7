//! What is printed.

use crate::compare::Comparison;
use crate::figure::{Figure, Figures};

/// Prints what was counted.
pub fn print(figures: &Figures) {
    println!("{:<34} {:<10} {:>12}", "instructions", "per", "now");
    for (name, figure) in figures {
        println!("{name:<34} {:<10} {:>12.2}", figure.per, figure.instructions);
    }
}

/// Prints what was counted beside the baseline, and what that means.
pub fn print_compared(comparisons: &[Comparison]) {
    println!(
        "{:<34} {:<10} {:>12} {:>12} {:>8}",
        "instructions", "per", "baseline", "now", "ratio"
    );
    for comparison in comparisons {
        let Comparison { name, baseline, now, verdict } = comparison;
        let per = now.as_ref().or(baseline.as_ref()).map_or("", |figure| &figure.per);
        let number = |figure: &Option<Figure>| {
            figure.as_ref().map_or("-".to_owned(), |figure| format!("{:.2}", figure.instructions))
        };
        let ratio = comparison.ratio().map_or("-".to_owned(), |ratio| format!("{ratio:.3}x"));
        let told = verdict.told();
        println!(
            "{name:<34} {per:<10} {:>12} {:>12} {ratio:>8}{}{told}",
            number(baseline),
            number(now),
            if told.is_empty() { "" } else { "  " },
        );
    }
}
