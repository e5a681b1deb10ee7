//! Sizes as people write them.

use thiserror::Error;

/// Suffixes and their powers of two, ascending.
const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

/// What is wrong with a size.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SizeError {
    /// Nothing was given.
    #[error("the size is empty")]
    Empty,
    /// A minus sign.
    #[error("a size must not be negative")]
    Negative,
    /// A decimal point; `1536M` says what `1.5G` would.
    #[error("a size must be a whole number; use a smaller unit for a fraction")]
    Fraction,
    /// More than 64 bits.
    #[error("the size does not fit 64 bits")]
    Overflow,
    /// Anything else.
    #[error("not a size: expected a number, 0x-hex, or a number with suffix K, M, G or T")]
    Malformed,
}

/// Parses a plain number, 0x-hex, or a decimal number with suffix K, M, G or T (powers of 1024,
/// either case).
///
/// # Errors
///
/// See [`SizeError`].
///
/// # Examples
///
/// ```
/// use program::size::parse_size;
/// assert_eq!(parse_size("2M"), Ok(2 << 20));
/// assert_eq!(parse_size("0x1000"), Ok(4096));
/// ```
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    if text.is_empty() {
        return Err(SizeError::Empty);
    }
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return parse_digits(hex, 16);
    }
    if text.starts_with('-') {
        return Err(SizeError::Negative);
    }
    let unit = |c: char| UNITS.iter().find(|(suffix, _)| *suffix == c.to_ascii_uppercase());
    let (number, shift) = match text.char_indices().next_back() {
        Some((at, last)) => unit(last).map_or((text, 0), |(_, shift)| (&text[..at], *shift)),
        None => (text, 0),
    };
    let is_fraction = number.split_once('.').is_some_and(|(whole, rest)| {
        !(whole.is_empty() && rest.is_empty())
            && whole.chars().chain(rest.chars()).all(|c| c.is_ascii_digit())
    });
    if is_fraction {
        return Err(SizeError::Fraction);
    }
    let size = parse_digits(number, 10)?;
    size.checked_mul(1 << shift).ok_or(SizeError::Overflow)
}

/// `from_str_radix` alone would take a plus sign.
fn parse_digits(digits: &str, radix: u32) -> Result<u64, SizeError> {
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return Err(SizeError::Malformed);
    }
    u64::from_str_radix(digits, radix).map_err(|_| SizeError::Overflow)
}

/// A size for people: at most two decimals, cut rather than rounded, so that what is not full
/// never looks full.
///
/// # Examples
///
/// ```
/// use program::size::format_size;
/// assert_eq!(format_size(3 << 29), "1.5 GiB");
/// assert_eq!(format_size((1 << 30) - 1), "1023.99 MiB");
/// assert_eq!(format_size(512), "512 B");
/// ```
pub fn format_size(bytes: u64) -> String {
    let Some((suffix, shift)) = UNITS.iter().rev().find(|(_, shift)| bytes >> shift != 0) else {
        return format!("{bytes} B");
    };
    let whole = bytes >> shift;
    let rest = u128::from(bytes - (whole << shift));
    let hundredths = (rest * 100) >> shift;
    match (hundredths / 10, hundredths % 10) {
        (0, 0) => format!("{whole} {suffix}iB"),
        (tenths, 0) => format!("{whole}.{tenths} {suffix}iB"),
        (tenths, digit) => format!("{whole}.{tenths}{digit} {suffix}iB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_notation() {
        for (text, size) in [
            ("0", 0),
            ("4096", 4096),
            ("0x1000", 4096),
            ("0XfF", 255),
            ("1K", 1 << 10),
            ("3m", 3 << 20),
            ("0G", 0),
            ("16T", 16 << 40),
            ("18446744073709551615", u64::MAX),
            ("0xffffffffffffffff", u64::MAX),
            ("16777215T", 16_777_215 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
    }

    #[test]
    fn every_refusal() {
        use SizeError::*;
        for (text, error) in [
            ("", Empty),
            ("-1", Negative),
            ("-1G", Negative),
            ("1.5G", Fraction),
            ("0.5", Fraction),
            (".5M", Fraction),
            ("1.", Fraction),
            ("18446744073709551616", Overflow),
            ("0x10000000000000000", Overflow),
            ("16777216T", Overflow),
            ("+1", Malformed),
            ("0x", Malformed),
            ("0x1G", Malformed),
            ("0x+1", Malformed),
            ("G", Malformed),
            (".", Malformed),
            ("1 G", Malformed),
            (" 1", Malformed),
            ("1GB", Malformed),
            ("1P", Malformed),
            ("1e9", Malformed),
            ("1_000", Malformed),
            ("\u{661}", Malformed),
            ("1\u{212a}", Malformed),
        ] {
            assert_eq!(parse_size(text), Err(error), "{text:?}");
        }
    }

    /// Digit by digit in 128 bits, as slow as it is plain.
    fn naive(text: &str) -> Option<u64> {
        let lower = text.to_ascii_lowercase();
        let (digits, radix, factor) = match lower.strip_prefix("0x") {
            Some(hex) => (hex, 16, 1u128),
            None => match lower.chars().last()? {
                'k' => (&lower[..lower.len() - 1], 10, 1024),
                'm' => (&lower[..lower.len() - 1], 10, 1024 * 1024),
                'g' => (&lower[..lower.len() - 1], 10, 1024 * 1024 * 1024),
                't' => (&lower[..lower.len() - 1], 10, 1024 * 1024 * 1024 * 1024),
                _ => (lower.as_str(), 10, 1),
            },
        };
        if digits.is_empty() {
            return None;
        }
        let mut value = 0u128;
        for c in digits.chars() {
            value = value.checked_mul(u128::from(radix))? + u128::from(c.to_digit(radix)?);
        }
        u64::try_from(value.checked_mul(factor)?).ok()
    }

    proptest! {
        #[test]
        fn parses_as_the_naive_one(text in "(0[xX])?[0-9a-fA-F]{0,20}[kKmMgGtT. +-]?") {
            prop_assert_eq!(parse_size(&text).ok(), naive(&text));
        }

        #[test]
        fn never_panics(text in ".*") {
            prop_assert_eq!(parse_size(&text).ok(), naive(&text));
        }

        #[test]
        fn formats_no_more_than_there_is(bytes: u64) {
            let text = format_size(bytes);
            let (number, unit) = text.split_once(' ').unwrap();
            let factor = match unit {
                "B" => 1.0,
                "KiB" => 1024.0,
                "MiB" => 1024f64.powi(2),
                "GiB" => 1024f64.powi(3),
                "TiB" => 1024f64.powi(4),
                other => panic!("{other}"),
            };
            let value = number.parse::<f64>().unwrap() * factor;
            prop_assert!(value <= bytes as f64 * (1.0 + 1e-12));
            prop_assert!(value >= bytes as f64 - factor * 0.0101);
        }
    }
}
