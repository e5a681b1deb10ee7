//! QEMU's own virtio-mem-pci: on the command line, and over its control socket.

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::qemu::REGION_ADDR;
use crate::qmp::Qmp;
use crate::sizes::MIB;

/// The geometry of the device, all in bytes.
pub struct OwnDevice {
    /// Memory that the guest boots with.
    pub ram: u64,
    /// Size of the region.
    pub region: u64,
    /// Size of a block.
    pub block: u64,
    /// What the guest is asked to plug.
    pub requested: u64,
    /// Whether it waits for a migration instead of booting.
    pub incoming: bool,
}

/// What QEMU says of the device.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemoryDevice {
    /// Where the region starts for the guest.
    pub memaddr: u64,
    /// Size of a block.
    pub block_size: u64,
    /// What is plugged.
    pub size: u64,
    /// Size of the region.
    pub max_size: u64,
    /// What the guest is asked to plug.
    pub requested_size: u64,
    /// NUMA node.
    pub node: u64,
}

impl OwnDevice {
    const ID: &str = "vm0";
    /// Id of its memory, and the name of its RAM block.
    pub const MEMORY: &str = "vmem";

    /// The options of a machine with this device. The region is where the daemon's is.
    pub(crate) fn options(&self) -> Vec<String> {
        let Self { ram, region, block, requested, incoming } = *self;
        let (id, memory) = (Self::ID, Self::MEMORY);
        // The largest memory backend goes first: some versions trip over a small one at address 0.
        let mut options: Vec<String> = [
            "-object".to_owned(),
            format!("memory-backend-memfd,id={memory},size={region},share=on"),
            "-m".to_owned(),
            format!("{}M,slots=2,maxmem={}M", ram / MIB, (ram + 2 * region) / MIB),
            "-object".to_owned(),
            format!("memory-backend-memfd,id=ram,size={ram},share=on"),
            "-machine".to_owned(),
            "memory-backend=ram".to_owned(),
            "-device".to_owned(),
            format!(
                "virtio-mem-pci,id={id},memdev={memory},memaddr={REGION_ADDR:#x},\
                 block-size={block},requested-size={requested}"
            ),
        ]
        .into();
        if incoming {
            options.extend(["-incoming", "defer"].map(str::to_owned));
        }
        options
    }

    /// All that QEMU says of it.
    pub fn state(qmp: &mut Qmp) -> Result<MemoryDevice> {
        let mut devices = qmp.execute("query-memory-devices", &json!({}))?;
        Ok(serde_json::from_value(devices[0]["data"].take())?)
    }

    /// What is plugged, bytes.
    pub fn plugged(qmp: &mut Qmp) -> Result<u64> {
        let property = json!({ "path": path(), "property": "size" });
        qmp.execute("qom-get", &property)?.as_u64().context("QEMU's device has no size")
    }

    /// Asks the guest to have `size` bytes.
    pub fn resize(qmp: &mut Qmp, size: u64) -> Result<()> {
        let change = json!({ "path": path(), "property": "requested-size", "value": size });
        qmp.execute("qom-set", &change).map(drop)
    }
}

fn path() -> Value {
    format!("/machine/peripheral/{}", OwnDevice::ID).into()
}
