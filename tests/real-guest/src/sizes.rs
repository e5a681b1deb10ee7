//! Sizes of memory, in bytes, and how people read them.

/// 1024 bytes.
pub const KIB: u64 = 1 << 10;
/// 1024 KiB.
pub const MIB: u64 = 1 << 20;
/// 1024 MiB.
pub const GIB: u64 = 1 << 30;

/// A size in the largest unit that leaves it readable.
pub fn human(bytes: u64) -> String {
    match bytes {
        0 => "0".to_owned(),
        _ if bytes.is_multiple_of(GIB) => format!("{}G", bytes / GIB),
        _ if bytes.is_multiple_of(MIB) || bytes >= 10 * MIB => format!("{}M", bytes / MIB),
        _ => format!("{}K", bytes / KIB),
    }
}

/// A change of size, with its sign.
pub fn change(before: u64, after: u64) -> String {
    let sign = if after < before { '-' } else { '+' };
    format!("{sign}{}", human(after.abs_diff(before)))
}
