//! The device in words.

use std::fmt::Write;

use management_api::{DeviceInfo, Direction, Event, Resize, ResizeState};
use program::size::format_size;
use vmstate::printable;

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
    let told = device.resize.as_ref().map(|told| ("resize", resize(told)));
    let mut table = String::new();
    for (name, value) in rows.into_iter().chain(told) {
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
pub(super) fn event(event: &Event) -> String {
    match event {
        Event::RequestedSize(size) => format!("requested size: {}", format_size(*size)),
        Event::PluggedSize(size) => format!("plugged size: {}", format_size(*size)),
        Event::Migration(true) => "migration: active".to_owned(),
        Event::Migration(false) => "migration: not active".to_owned(),
        Event::Connected => "front-end: connected".to_owned(),
        Event::Disconnected => "front-end: not connected".to_owned(),
        Event::Resize(told) => format!("resize: {}", resize(told)),
        Event::Stray(size) => {
            format!("discarded {} that the guest had in unplugged memory", format_size(*size))
        }
    }
}

/// How a resize stands, in a line.
pub(super) fn resize(resize: &Resize) -> String {
    let left = format_size(resize.remaining_size);
    let way = match resize.direction {
        Some(Direction::Grow) => "to plug",
        Some(Direction::Shrink) => "to unplug",
        None => "left",
    };
    let since = resize.since.as_deref().unwrap_or_default();
    match resize.state {
        ResizeState::Done => "done".to_owned(),
        ResizeState::Waiting => {
            format!("the guest was asked at {}; {left} {way}", printable(since))
        }
        ResizeState::Progressing => format!("{left} {way}{}", pace(resize)),
        ResizeState::Stalled => {
            let reason = resize.reason.as_ref().map_or("no reason is known", |told| &told.text);
            let (since, reason) = (printable(since), printable(reason));
            format!("stands still since {since}, {left} {way}: {reason}")
        }
    }
}

/// Rate and expected end, as far as there are any.
pub(super) fn pace(resize: &Resize) -> String {
    let rate = resize.rate.map(|rate| format!(", {}/s", format_size(rate)));
    let end = resize.expected_seconds.map(|seconds| format!(", about {seconds} s"));
    rate.into_iter().chain(end).collect()
}
