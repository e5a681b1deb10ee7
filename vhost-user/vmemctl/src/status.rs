//! The device in words.

use std::fmt::Write;

use management_api::{DeviceInfo, Event};
use program::size::format_size;

/// A table of everything.
pub(super) fn table(device: &DeviceInfo) -> String {
    let yes_no = |value: bool| if value { "yes" } else { "no" }.to_owned();
    let size = |bytes: u64| format!("{} ({bytes} bytes)", format_size(bytes));
    let rows = [
        ("address", format!("{:#x}", device.addr)),
        ("region", size(device.region_size)),
        ("block", size(device.block_size)),
        ("node", device.node_id.map_or_else(|| "none".to_owned(), |node| node.to_string())),
        ("usable", size(device.usable_region_size)),
        ("requested", size(device.requested_size)),
        ("plugged", size(device.plugged_size)),
        ("resident", device.resident_size.map_or_else(|| "unknown (not mapped)".to_owned(), size)),
        ("front-end", if device.connected { "connected" } else { "not connected" }.to_owned()),
        ("migrating", yes_no(device.migration_active)),
    ];
    let mut table = String::new();
    for (name, value) in rows {
        let _ = writeln!(table, "{name:<10} {value}");
    }
    table
}

/// What a resize is about, in a line.
pub(super) fn sizes(device: &DeviceInfo) -> String {
    let (requested, plugged) = (device.requested_size, device.plugged_size);
    format!("requested {}, plugged {}\n", format_size(requested), format_size(plugged))
}

/// An event, without its time.
pub(super) fn event(event: Event) -> String {
    match event {
        Event::RequestedSize(size) => format!("requested size: {}", format_size(size)),
        Event::PluggedSize(size) => format!("plugged size: {}", format_size(size)),
        Event::Migration(true) => "migration: active".to_owned(),
        Event::Migration(false) => "migration: not active".to_owned(),
        Event::Connected => "front-end: connected".to_owned(),
        Event::Disconnected => "front-end: not connected".to_owned(),
    }
}
