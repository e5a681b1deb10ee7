//! Sizes and maps as people read them.

use std::env;
use std::io::IsTerminal;

use crate::guest::Cell;

pub(super) fn human(bytes: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")];
    match UNITS.iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) if bytes.is_multiple_of(*unit) => format!("{}{name}", bytes / unit),
        Some((unit, name)) => format!("{:.1}{name}", bytes as f64 / *unit as f64),
        None => bytes.to_string(),
    }
}

/// A time of so many microseconds at most.
pub(super) fn latency(micros: Option<u64>) -> String {
    match micros {
        None => "-".to_owned(),
        Some(micros) if micros < 10_000 => format!("< {micros} us"),
        Some(micros) => format!("< {} ms", micros / 1000),
    }
}

pub(super) fn print_rows(title: &str, rows: &[(&str, String)]) {
    println!("{title}");
    for (name, value) in rows {
        println!("{name:<32}{value:>15}");
    }
}

pub(super) fn paint(map: &[Cell]) -> String {
    let coloured = std::io::stdout().is_terminal() && env::var_os("NO_COLOR").is_none();
    let mut text = String::new();
    for run in map.chunk_by(|left, right| left == right) {
        let (symbol, colour) = match run[0] {
            Cell::Discarded => ("·", 90),
            Cell::Untouched => ("░", 36),
            Cell::Resident => ("█", 32),
            Cell::Leaked => ("!", 31),
        };
        let symbols = symbol.repeat(run.len());
        if coloured {
            text += &format!("\x1b[{colour}m{symbols}\x1b[0m");
        } else {
            text += &symbols;
        }
    }
    text
}

/// Reads a size: plain, hexadecimal with 0x, or with K, M, G or T.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size such as 4096, 0x1000, 512M or 8G");
    if let Some(digits) = text.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).map_err(|_| wrong());
    }
    let (digits, shift) = match text.chars().last() {
        Some('K') => (&text[..text.len() - 1], 10),
        Some('M') => (&text[..text.len() - 1], 20),
        Some('G') => (&text[..text.len() - 1], 30),
        Some('T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written_in_the_same_units() {
        for text in ["0", "512K", "256M", "8G"] {
            assert_eq!(human(parse_size(text).unwrap()), text);
        }
        assert_eq!(parse_size("0x1000"), Ok(4096));
        for text in ["", "G", "-1", "8X", "99999999999T", "1.5G"] {
            assert!(parse_size(text).is_err(), "{text:?}");
        }
    }
}
