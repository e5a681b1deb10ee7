//! Devices that have to do with the memory before all of it has come.

use std::sync::Arc;

use migration::ram::MigrationBlock;
use migration::stream::SectionHeader;
use migration::{DevicePhase, DeviceSection, Devices, MigrationError, NoDevices};
use ram_discard::memory::BackingKind;
use virtio_mem::device::BlockBitmap;
use vmstate::wire::{WireRead, WireWrite};

use crate::memory::Device;

const IDSTR: &str = "blocks";

/// Sends which blocks are plugged, before memory, as a device of the VMM does.
pub struct Sending(pub Arc<Device>);

impl Devices for Sending {
    fn save(&mut self, phase: DevicePhase) -> Result<Vec<DeviceSection>, MigrationError> {
        if phase != DevicePhase::Early {
            return Ok(Vec::new());
        }
        let mut payload = Vec::new();
        self.0.plugged().words().iter().for_each(|&word| payload.put_be64(word));
        let (idstr, instance_id, version_id) = (IDSTR.to_owned(), 0, 1);
        let description = Default::default();
        Ok(vec![DeviceSection { idstr, instance_id, version_id, payload, description }])
    }

    fn load(
        &mut self,
        header: &SectionHeader,
        phase: DevicePhase,
        reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        NoDevices.load(header, phase, reader)
    }

    fn loaded(&mut self) -> Result<(), MigrationError> {
        Ok(())
    }
}

/// As one of another process, which knows nothing of the migration: when it has its state, it takes
/// huge pages for what is plugged, whether or not they are still to come.
pub struct Reserving(pub Arc<MigrationBlock>, pub Arc<Device>);

impl Devices for Reserving {
    fn save(&mut self, phase: DevicePhase) -> Result<Vec<DeviceSection>, MigrationError> {
        NoDevices.save(phase)
    }

    fn load(
        &mut self,
        header: &SectionHeader,
        phase: DevicePhase,
        reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        if header.idstr != IDSTR {
            return NoDevices.load(header, phase, reader);
        }
        let nr_blocks = self.1.plugged().nr_blocks();
        let words = (0..nr_blocks.div_ceil(64)).map(|_| reader.be64("blocks"));
        let words = words.collect::<Result<_, _>>()?;
        let plugged = BlockBitmap::from_words(nr_blocks, words);
        self.1.take_over(&plugged.expect("a source with the same region"));
        Ok(())
    }

    fn loaded(&mut self) -> Result<(), MigrationError> {
        let (backing, base) = (self.0.ram().backing(), self.0.file_base());
        if backing.kind() == BackingKind::Hugetlb {
            for range in self.0.populated().unwrap() {
                // As many as there are.
                let _ = backing.reserve(range.in_file(base).unwrap());
            }
        }
        Ok(())
    }
}
