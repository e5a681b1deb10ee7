//! What this crate itself writes.

use std::sync::Arc;

use serde_json::Value as Json;
use vmstate::wire::WireWrite;

use super::sample::device;
use super::*;
use crate::MigrationError;
use crate::devices::{DevicePhase, DeviceSection, Devices};
use crate::progress::Progress;
use crate::snapshot::{self, StoppedGuest};
use crate::test_support::{BLOCK, PAGE, Side, fill};

const ADDR: u64 = 1 << 32;
const BLOCKS: u64 = 16;

/// The device of a [`Side`].
struct Device {
    plugged: u64,
}

impl Devices for Device {
    fn save(&mut self, phase: DevicePhase) -> Result<Vec<DeviceSection>, MigrationError> {
        let size = u64::from(self.plugged.count_ones()) * BLOCK;
        let mut payload = Vec::new();
        let idstr = if phase == DevicePhase::Early {
            "vm0/virtio-mem-device-early"
        } else {
            "vm0/virtio-mem"
        };
        let names = if phase == DevicePhase::Early {
            [ADDR, BLOCKS * BLOCK, BLOCK].iter().for_each(|value| payload.put_be64(*value));
            payload.put_be32(0);
            [size, self.plugged].iter().for_each(|value| payload.put_be64(*value));
            &[("tmp", 28), ("size", 8), ("bitmap", 8)][..]
        } else {
            [BLOCKS * BLOCK, size].iter().for_each(|value| payload.put_be64(*value));
            &[("usable_region_size", 8), ("requested_size", 8)]
        };
        let field = |(name, size): &(&str, u64)| {
            let kind = if *name == "tmp" || *name == "bitmap" { "buffer" } else { "uint64" };
            json!({ "name": name, "type": kind, "size": size })
        };
        let fields: Json = names.iter().map(field).collect();
        let (idstr, description) = (idstr.to_owned(), device(idstr, fields));
        Ok(vec![DeviceSection { idstr, instance_id: 0, version_id: 1, payload, description }])
    }

    fn load(
        &mut self,
        _: &SectionHeader,
        _: DevicePhase,
        _: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        Ok(())
    }

    fn loaded(&mut self) -> Result<(), MigrationError> {
        Ok(())
    }
}

#[test]
fn a_snapshot_is_read() {
    let plugged = [1, 4, 5];
    let side = Side::new(&plugged);
    fill(&side.region, 64..96, 7);
    // Zeros that were written are no content; memory that is discarded is not saved.
    fill(&side.region, 300..314, 0);
    fill(&side.region, 640..643, 9);
    fill(&side.boot, 3..5, 5);
    let file = tempfile::tempfile().unwrap();
    let mut device = Device { plugged: plugged.iter().map(|block| 1 << block).sum() };
    let saved = StoppedGuest {
        configuration: Configuration::new("test"),
        blocks: &side.blocks,
        devices: &mut device,
        io: snapshot::FileIo::default(),
        progress: Arc::new(Progress::new()),
    };
    snapshot::save(saved, &file).unwrap();

    let seen = inspect(&file);
    assert!(seen.error.is_none(), "{:?}", seen.error);
    assert_eq!(seen.warnings, []);
    let (region, boot) = (BLOCKS * BLOCK / PAGE, BLOCK / PAGE);
    let blocks: Vec<_> = seen.blocks.iter().map(summary).collect();
    assert_eq!(
        blocks,
        [("vmem0", BLOCKS * BLOCK, 32, 0, region - 32, 0), ("ram", BLOCK, 2, 0, boot - 2, 0)]
    );
    let device = &seen.virtio_mem[0];
    let found: Vec<_> = device.plugged().collect();
    assert_eq!(found, [range(BLOCK, 2 * BLOCK), range(4 * BLOCK, 6 * BLOCK)]);
    assert_eq!(device.ram_block.as_deref(), Some("vmem0"));
    assert_eq!(device.requested_size, Some(3 * BLOCK));
}
