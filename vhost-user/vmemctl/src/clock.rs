//! The time of day, in UTC.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use management_api::rfc3339;

/// Now, as in `2026-01-31T23:59:59.999Z`.
pub(super) fn now() -> String {
    format(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn format(since_epoch: Duration) -> String {
    let whole = rfc3339(since_epoch);
    format!("{}.{:03}Z", whole.trim_end_matches('Z'), since_epoch.subsec_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milliseconds_are_shown() {
        assert_eq!(format(Duration::from_millis(951_782_400_007)), "2000-02-29T00:00:00.007Z");
    }
}
