//! The machine's devices as sections of state.
//!
//! | section | what |
//! | --- | --- |
//! | `vmem0/virtio-mem-device-early`, `vmem0/virtio-mem` | QEMU's two sections of the memory device |
//! | `vmem0/vhost-user-back-end` | what the daemon says of itself, which only a daemon understands |
//! | `cpus` | which memory the vCPUs use, and what they wrote there |
//! | `vmem0/driver` | what the guest's driver knows, and where its ring stands |
//!
//! The device is in another process, so the machine keeps a [`Shadow`] of it: what the discard
//! channel tells on the source, what came before RAM on the destination. There the daemon is made to follow it, and
//! the daemon's own state, which comes last, must agree with it.

mod back_end;
mod cpus;
mod daemon_follower;
mod driver;
mod shadow;

use std::ops::ControlFlow;
use std::sync::Arc;

use anyhow::Context;
use migration::ram::MigrationBlock;
use migration::stream::SectionHeader;
use migration::{DevicePhase, DeviceRegistry, DeviceSection, Devices, MigrationError};
use ram_discard::{RamDiscardManager, Section};
use virtio_mem::discard_channel::RemoteRamDiscardManager;
use virtio_mem::sections::{self as sections, EARLY_MIGRATION};
use vmstate::Described;
use vmstate::wire::WireRead;

use super::blocks::REGION;
use super::{describe, source};
use crate::machine::Machine;
use back_end::BackEnd;
use cpus::Cpus;
use daemon_follower::DaemonFollower;
use driver::Driver;
use shadow::Shadow;

/// How often sizes may change while they are saved.
const RESIZES: usize = 100;

/// All devices of a machine.
pub(super) struct MachineDevices {
    machine: Arc<Machine>,
    registry: DeviceRegistry,
    shadow: Shadow,
    /// On the source: who knows how the device is now.
    manager: Option<Arc<RemoteRamDiscardManager>>,
    /// On the destination: has the daemon follow the shadow.
    follower: Option<DaemonFollower>,
    /// On the destination: whether devices are loaded before all memory is there.
    arriving: bool,
    /// On the destination: whether the engine knows what is discarded of the region while its pages come.
    guards: bool,
    /// On the destination: the region, where what is discarded of it is known only after its pages.
    late_region: Option<Arc<MigrationBlock>>,
}

impl MachineDevices {
    /// Devices that are to be saved, the memory device by what `manager` tells.
    pub(super) fn of_source(
        machine: &Arc<Machine>,
        manager: &Arc<RemoteRamDiscardManager>,
    ) -> anyhow::Result<Self> {
        let shadow = Shadow::new(*manager.geometry())?;
        Self::new(machine, shadow, Some(Arc::clone(manager)))
    }

    /// Devices that are to be loaded.
    ///
    /// When memory is still `arriving` then, the ring is not looked at, and the daemon not told of
    /// it: the start of the device does both, with the guest or when memory [has
    /// arrived](Machine::memory_arrived).
    pub(super) fn of_destination(machine: &Arc<Machine>, arriving: bool) -> anyhow::Result<Self> {
        let config = machine.frontend().config()?;
        config.check().map_err(anyhow::Error::msg).context("the daemon's configuration")?;
        let shadow = Shadow::of_config(&config, machine.frontend().features())?;
        let follower = match &machine.options().discard_socket {
            Some(_) => DaemonFollower::begin(source::attach(machine)?, shadow.controller())
                .context("have the daemon follow")?,
            None => None,
        };
        Ok(Self { arriving, follower, ..Self::new(machine, shadow, None)? })
    }

    fn new(
        machine: &Arc<Machine>,
        shadow: Shadow,
        manager: Option<Arc<RemoteRamDiscardManager>>,
    ) -> anyhow::Result<Self> {
        let mut properties = sections::properties();
        if let Some(level) = &machine.options().compat_level {
            properties.apply_level(sections::COMPAT_LEVELS, level)?;
        }
        let mut registry = DeviceRegistry::new(properties);
        for (idstr, section) in sections::of(REGION, shadow.controller()) {
            registry.register(&idstr, 0, section)?;
        }
        let frontend = machine.frontend().clone();
        let back_end = BackEnd { frontend, saves: manager.is_some() };
        let back_end = Described { vmstate: &back_end::VMSTATE, device: back_end };
        registry.register(&format!("{REGION}/vhost-user-back-end"), 0, Box::new(back_end))?;
        let cpus = Described { vmstate: &cpus::VMSTATE, device: Cpus(machine.vcpus().clone()) };
        registry.register("cpus", 0, Box::new(cpus))?;
        let driver = Described { vmstate: &driver::VMSTATE, device: Driver(machine.clone()) };
        registry.register(&format!("{REGION}/driver"), 0, Box::new(driver))?;
        let machine = machine.clone();
        Ok(Self {
            machine,
            registry,
            shadow,
            manager,
            follower: None,
            arriving: false,
            guards: false,
            late_region: None,
        })
    }

    /// Has `region` be held to what is discarded: while its pages come, or when all have come, for
    /// a source that tells it no sooner.
    pub(super) fn guard(&mut self, region: &Arc<MigrationBlock>) -> anyhow::Result<()> {
        if self.registry.properties().is_on(EARLY_MIGRATION) {
            region.set_discard_manager(0, self.manager())?;
            self.guards = true;
        } else {
            self.late_region = Some(Arc::clone(region));
        }
        Ok(())
    }

    /// Discards what came for discarded memory before that was known.
    fn sweep_late(&self) -> Result<(), MigrationError> {
        let (manager, mut result) = (self.manager(), Ok(()));
        let Some((region, all)) =
            self.late_region.as_ref().zip(Section::new(0, manager.region_size()))
        else {
            return Ok(());
        };
        let _ = manager.replay_discarded(all, &mut |range| {
            result = range.in_block(0).map_or(Ok(()), |range| region.sweep(range));
            if result.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        result.map_err(|error| device_error(&format!("cannot discard memory: {error}")))
    }

    /// Who knows what is discarded by what came before RAM.
    fn manager(&self) -> Arc<dyn RamDiscardManager> {
        Arc::clone(self.shadow.controller().manager()) as Arc<dyn RamDiscardManager>
    }

    /// The daemon has become what came with the early section, and what only it understands says
    /// the same; the ring is in memory where the driver left it, and waits for the guest.
    fn agree(&self) -> anyhow::Result<()> {
        let config = self.machine.frontend().config().context("ask the daemon")?;
        self.shadow.compare(&config)?;
        if self.arriving {
            return Ok(());
        }
        self.machine.with_driver(|driver| driver.driver().ring().check_idle())?;
        self.machine.set_up_ring().context("set up the ring")
    }
}

impl Devices for MachineDevices {
    fn save(&mut self, phase: DevicePhase) -> Result<Vec<DeviceSection>, MigrationError> {
        let Some(manager) = self.manager.clone() else { return self.registry.save(phase) };
        // Block state is frozen, what is requested is not: the section that the shadow makes and that
        // of the daemon have to say the same of it.
        for _ in 0..RESIZES {
            let sizes = manager.sizes()?;
            self.shadow.follow(&manager)?;
            let sections = self.registry.save(phase)?;
            if manager.sizes()? == sizes {
                return Ok(sections);
            }
        }
        Err(device_error("the requested size changes all the time"))
    }

    fn load(
        &mut self,
        header: &SectionHeader,
        phase: DevicePhase,
        reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        self.registry.load(header, phase, reader)
    }

    fn early_loaded(&mut self) -> Result<(), MigrationError> {
        self.registry.early_loaded()
    }

    fn abandon(&mut self) {
        self.registry.abandon();
        if let Some(follower) = self.follower.take() {
            follower.undo(self.shadow.controller());
        }
    }

    fn loaded(&mut self) -> Result<(), MigrationError> {
        if let Some(follower) = &self.follower {
            follower.check(self.shadow.controller())?;
        }
        self.registry.loaded()?;
        self.sweep_late()?;
        self.agree().map_err(|error| device_error(&describe(&error)))?;
        if let Some(follower) = &self.follower {
            let daemon = follower.end();
            // Without the early section the engine knows of no discarded memory.
            if self.arriving && self.guards {
                let shadow = Arc::clone(self.shadow.controller().manager());
                self.machine.serve_when_running(Arc::clone(daemon), shadow);
            }
        }
        Ok(())
    }
}

fn device_error(reason: &str) -> MigrationError {
    MigrationError::Device { section: REGION.to_owned(), reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use virtio_mem::sections::properties;

    use super::*;

    #[test]
    fn all_descriptions_are_valid() {
        assert_eq!(back_end::VMSTATE.validate(&properties()), []);
        assert_eq!(cpus::VMSTATE.validate(&properties()), []);
        assert_eq!(driver::VMSTATE.validate(&properties()), []);
    }
}
