//! Two machines compared bit by bit.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::api::ApiClient;
use crate::memory::{PAGE_SIZE, data_ranges};
use crate::process::Vmm;

const PIECE: u64 = 1 << 20;

/// Everything in which two machines differ; how many bytes of memory were compared.
pub(super) fn memory(left: &mut Vmm, right: &mut Vmm) -> anyhow::Result<(u64, Vec<String>)> {
    memory_beside(left, right, 0..0)
}

/// As [`memory`], beside a part of boot memory that either has used since.
pub(super) fn memory_beside(
    left: &mut Vmm,
    right: &mut Vmm,
    used: Range<u64>,
) -> anyhow::Result<(u64, Vec<String>)> {
    let (mut compared, mut differences) = (0, Vec::new());
    for (index, (name, beside)) in
        [("boot memory", used), ("the region", 0..0)].into_iter().enumerate()
    {
        let (left, right) = (open(left, index)?, open(right, index)?);
        let (bytes, different) = files(&left, &right, &beside)?;
        compared += bytes;
        differences.extend(different.map(|at| format!("{name} differs at {at:#x}")));
    }
    Ok((compared, differences))
}

/// The file behind a VMM's memory, which is looked at without touching what it does not hold.
fn open(vmm: &mut Vmm, index: usize) -> anyhow::Result<File> {
    let fd = vmm.report()?.memory.context("no memory")?[index];
    let path = format!("/proc/{}/fd/{fd}", vmm.pid());
    File::open(&path).with_context(|| format!("cannot open {path}"))
}

/// How many bytes either file has data for, and the first page in which they differ `beside` a range.
fn files(left: &File, right: &File, beside: &Range<u64>) -> anyhow::Result<(u64, Option<u64>)> {
    let len = left.metadata()?.len();
    ensure!(right.metadata()?.len() == len, "the files have different lengths");
    let mut bytes = 0;
    for at in pieces(left, right, len)? {
        let (mut one, mut other) = (vec![0; PIECE as usize], vec![0; PIECE as usize]);
        let size = PIECE.min(len - at) as usize;
        left.read_exact_at(&mut one[..size], at)?;
        right.read_exact_at(&mut other[..size], at)?;
        bytes += size as u64;
        let part = beside.start.clamp(at, at + PIECE) - at..beside.end.clamp(at, at + PIECE) - at;
        let part = part.start as usize..part.end as usize;
        one[part.clone()].fill(0);
        other[part].fill(0);
        if let Some(byte) = one.iter().zip(&other).position(|(one, other)| one != other) {
            return Ok((bytes, Some((at + byte as u64) / PAGE_SIZE * PAGE_SIZE)));
        }
    }
    Ok((bytes, None))
}

/// The starts of the pieces in which either has data; what neither has is zeros in both.
fn pieces(left: &File, right: &File, len: u64) -> anyhow::Result<Vec<u64>> {
    let mut pieces = Vec::new();
    for file in [left, right] {
        for data in data_ranges(file, 0..len)? {
            pieces
                .extend((data.start / PIECE..data.end.div_ceil(PIECE)).map(|piece| piece * PIECE));
        }
    }
    pieces.sort_unstable();
    pieces.dedup();
    Ok(pieces)
}

/// Everything in which block state and configuration of two devices differ.
pub(super) fn devices(left: &ApiClient, right: &ApiClient) -> anyhow::Result<Vec<String>> {
    let mut differences = Vec::new();
    let (one, other) = (left.device()?, right.device()?);
    for name in [
        "addr",
        "region_size",
        "block_size",
        "node_id",
        "usable_region_size",
        "plugged_size",
        "requested_size",
    ] {
        ensure!(one.get(name).is_some(), "no {name} in {one}");
        differ(name, &one[name], &other[name], &mut differences);
    }
    let (one, other) = (blocks(left)?, blocks(right)?);
    for name in ["plugged", "discarded"] {
        differ(name, &one[name], &other[name], &mut differences);
    }
    Ok(differences)
}

fn blocks(api: &ApiClient) -> anyhow::Result<Value> {
    let response = api.get("/v1/device/blocks")?;
    ensure!(response.is_success(), "the daemon does not tell its blocks: {}", response.text);
    Ok(response.json())
}

fn differ(name: &str, left: &Value, right: &Value, differences: &mut Vec<String>) {
    if left != right {
        differences.push(format!("{name} differs: {left} and {right}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::memfd;
    use rustix::fs::MemfdFlags;

    #[test]
    fn a_hole_equals_zeros_and_one_bit_is_a_difference() {
        let file = || memfd("compare", 8 * PIECE, MemfdFlags::empty()).unwrap();
        let (left, right) = (file(), file());
        let files = |beside| files(&left, &right, &beside).unwrap();
        assert_eq!(files(0..0), (0, None));
        left.write_all_at(&[0; 4096], 3 * PIECE).unwrap();
        right.write_all_at(&[0; 4096], 5 * PIECE).unwrap();
        assert_eq!(files(0..0), (2 * PIECE, None));
        right.write_all_at(&[1], 5 * PIECE + 0x2001).unwrap();
        assert_eq!(files(0..0).1, Some(5 * PIECE + 0x2000));
        assert_eq!(files(5 * PIECE + 0x2001..8 * PIECE), (2 * PIECE, None));
        assert_eq!(files(0..5 * PIECE + 0x2001).1, Some(5 * PIECE + 0x2000));
    }
}
