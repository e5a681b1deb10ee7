//! A device that has to do with the memory before all of it has come.

use std::sync::Arc;

use migration::ram::MigrationBlock;
use migration::stream::SectionHeader;
use migration::{DevicePhase, DeviceSection, Devices, MigrationError, NoDevices};
use ram_discard::memory::BackingKind;
use vmstate::wire::WireRead;

/// As one of another process, which knows nothing of the migration: when it has its state, it takes
/// huge pages for what is plugged, whether or not they are still to come.
pub struct Reserving(pub Arc<MigrationBlock>);

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
        NoDevices.load(header, phase, reader)
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
