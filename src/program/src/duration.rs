//! Times as people write them.

use std::time::Duration;

/// Parses `30s`, `2m`, `1h` or plain seconds.
///
/// # Errors
///
/// What is wrong with `text`, as a sentence.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (digits, factor) = match text.char_indices().next_back() {
        Some((at, 's')) => (&text[..at], 1),
        Some((at, 'm')) => (&text[..at], 60),
        Some((at, 'h')) => (&text[..at], 3600),
        _ => (text, 1),
    };
    if digits.is_empty() || !digits.chars().all(|c| c.is_ascii_digit()) {
        return Err("expected a time such as 30s, 2m, 1h, or seconds".to_owned());
    }
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        // A century is far from the end of every clock that it is added to.
        .filter(|seconds| *seconds <= 100 * 366 * 24 * 3600)
        .map(Duration::from_secs)
        .ok_or_else(|| "the time is too long".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, seconds) in [("30s", 30), ("2m", 120), ("1h", 3600), ("5", 5), ("0", 0)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "s", "-1", "1.5s", "1 s", "2d", "+3", "99999999999999999999", "9999999h"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
