//! What requests and answers carry.

use std::fmt;

use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use crate::Resize;

/// The device. All sizes are bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DeviceInfo {
    /// Guest-physical address of the region.
    pub addr: u64,
    /// Size of the region.
    pub region_size: u64,
    /// Size of a block.
    pub block_size: u64,
    /// NUMA node of the region, when one is offered.
    #[schema(required)]
    pub node_id: Option<u16>,
    /// Part of the region, from its start, in which the guest may plug blocks.
    pub usable_region_size: u64,
    /// What the guest has plugged.
    pub plugged_size: u64,
    /// What the guest is asked to plug.
    pub requested_size: u64,
    /// Whether a front-end is connected.
    pub connected: bool,
    /// Whether block state is frozen because migration is active.
    pub migration_active: bool,
    /// What the host really holds for the region; null when guest memory is not mapped.
    #[schema(required)]
    pub resident_size: Option<u64>,
    /// How the guest is doing with the requested size; null from daemons that do not tell.
    #[serde(default)]
    #[schema(required)]
    pub resize: Option<Resize>,
}

/// A part of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Range {
    /// Bytes from the start of the region.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub size: u64,
}

/// The whole region as maximal ascending ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Blocks {
    /// What the guest may use.
    pub plugged: Vec<Range>,
    /// What it may not, and the host holds nothing for.
    pub discarded: Vec<Range>,
}

/// Where the host holds memory for the region.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Resident {
    /// Maximal ascending ranges; null when guest memory is not mapped. A range consists of whole
    /// blocks, or of a power of two of them in a region of very many, each with memory in it: their
    /// sum may be more than resident_size.
    #[schema(required)]
    pub resident: Option<Vec<Range>>,
}

/// Body of `PUT /v1/device/requested-size`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RequestedSize {
    /// Bytes, a multiple of the block size and at most the region size.
    #[serde(deserialize_with = "requested_size")]
    pub requested_size: u64,
}

/// Body of `PUT /v1/migration`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationSetting {
    /// Whether block state is to be frozen.
    #[serde(deserialize_with = "active")]
    pub active: bool,
}

/// Body of `PUT /v1/log-level`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LogLevel {
    /// off, error, warn, info, debug or trace; or a list of them and of TARGET=LEVEL, as in `RUST_LOG`.
    pub level: String,
}

fn requested_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    deserializer.deserialize_any(SizeVisitor)
}

fn active<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    deserializer.deserialize_any(ActiveVisitor)
}

/// Takes whole numbers only, and says of anything else what is wrong with it.
struct SizeVisitor;

impl Visitor<'_> for SizeVisitor {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("requested_size to be a whole number of bytes")
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<u64, E> {
        Ok(value)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<u64, E> {
        u64::try_from(value)
            .map_err(|_| E::custom(format!("requested_size must not be negative, but is {value}")))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<u64, E> {
        // Integers of more than 64 bits arrive as floating point.
        if value.fract() == 0.0 && value < 0.0 {
            return Err(E::custom("requested_size must not be negative"));
        }
        if value.fract() == 0.0 && value >= 18_446_744_073_709_551_616.0 {
            return Err(E::custom("requested_size does not fit 64 bits"));
        }
        Err(E::invalid_type(Unexpected::Float(value), &self))
    }
}

struct ActiveVisitor;

impl Visitor<'_> for ActiveVisitor {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("active to be true or false")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<bool, E> {
        Ok(value)
    }
}
