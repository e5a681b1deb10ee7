//! A device that has to do with the memory before all of it has come.

use std::sync::Arc;

use virtio_mem::memory::BackingKind;
use virtio_mem::migration::MigrationError;
use virtio_mem::migration::devices::{DeviceSection, Devices};
use virtio_mem::migration::ram::MigrationBlock;
use virtio_mem::migration::stream::SectionHeader;
use virtio_mem::migration::wire::WireRead;

/// As one of another process, which knows nothing of the migration: when it has its state, it takes
/// huge pages for what is plugged, whether or not they are still to come.
pub struct Reserving(pub Arc<MigrationBlock>);

impl Devices for Reserving {
    fn save(&mut self, _early: bool) -> Result<Vec<DeviceSection>, MigrationError> {
        Ok(Vec::new())
    }

    fn load(
        &mut self,
        header: &SectionHeader,
        _early: bool,
        _reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        panic!("nobody saved {header:?}");
    }

    fn loaded(&mut self) -> Result<(), MigrationError> {
        let backing = self.0.ram().backing();
        if backing.kind() == BackingKind::Hugetlb {
            for range in self.0.populated().unwrap() {
                // As many as there are.
                let _ = backing.reserve(range);
            }
        }
        Ok(())
    }
}
