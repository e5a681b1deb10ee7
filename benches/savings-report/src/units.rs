//! Sizes and times as people read them.

use std::time::Duration;

/// A target page, bytes.
pub const PAGE: u64 = 4096;
/// Bytes of a MiB.
pub const MIB: u64 = 1 << 20;
/// Bytes of a GiB.
pub const GIB: u64 = 1 << 30;

/// A size with three digits at most after rounding, or 0.
pub fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if bytes == 0 {
        "0".to_owned()
    } else if value >= 100.0 || value.fract() == 0.0 {
        format!("{value:.0} {}", units[unit])
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

/// A time in milliseconds.
pub fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Milliseconds as seconds.
pub fn millis_as_seconds(millis: f64) -> f64 {
    millis / 1e3
}

/// Milliseconds with three digits at most.
pub fn time(millis: f64) -> String {
    if millis >= 10_000.0 {
        format!("{:.1} s", millis / 1e3)
    } else if millis >= 10.0 {
        format!("{millis:.0} ms")
    } else {
        format!("{millis:.1} ms")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_short() {
        assert_eq!(
            [0, 512, 1536, GIB, 1300 * MIB].map(size),
            ["0", "512 B", "1.5 KiB", "1 GiB", "1.3 GiB"]
        );
        assert_eq!([0.25, 12.4, 12_345.0].map(time), ["0.2 ms", "12 ms", "12.3 s"]);
    }
}
