//! For programs.

use std::path::Path;

use migration::inspect::{
    Inspection, SavedField, SavedRamBlock, SavedSection, SavedVirtioMem, Structure, Value,
};
use serde_json::{Value as Json, json};

use super::{command_words, hex, layout};

/// All that is known of a file.
pub(super) fn inspection(path: &Path, inspection: &Inspection, error: Option<&str>) -> Json {
    let configuration = &inspection.configuration;
    let commands: Vec<Json> = inspection
        .commands
        .iter()
        .map(|(offset, command)| {
            let (name, detail) = command_words(command);
            json!({ "offset": offset, "command": name, "detail": detail })
        })
        .collect();
    json!({
        "file": path.to_string_lossy(),
        "size": inspection.len,
        "layout": layout(inspection),
        "machine": configuration.machine,
        "target_page_bits": configuration.target_page_bits,
        "capabilities": configuration.capabilities,
        "uuid": configuration.uuid.map(|uuid| hex(&uuid)),
        "ram_blocks": inspection.blocks.iter().map(block).collect::<Vec<_>>(),
        "virtio_mem": inspection.virtio_mem.iter().map(device).collect::<Vec<_>>(),
        "sections": inspection.sections.iter().map(section).collect::<Vec<_>>(),
        "commands": commands,
        "description": inspection.description.map(|(offset, size)| {
            json!({ "offset": offset, "size": size })
        }),
        "warnings": inspection.warnings.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "error": error,
    })
}

fn block(block: &SavedRamBlock) -> Json {
    json!({
        "id": block.id,
        "size": block.used_length,
        "addr": block.addr,
        "bitmap_offset": block.mapped.map(|mapped| mapped.bitmap_offset),
        "pages_offset": block.mapped.map(|mapped| mapped.pages_offset),
        "normal": block.normal,
        "zero": block.zero,
        "absent": block.absent,
        "sent": block.sent,
    })
}

fn device(device: &SavedVirtioMem) -> Json {
    let plugged = device.plugged();
    json!({
        "path": device.path,
        "instance_id": device.instance_id,
        "addr": device.addr,
        "region_size": device.region_size,
        "block_size": device.block_size,
        "node": device.node,
        "plugged_size": device.plugged_size,
        "usable_region_size": device.usable_region_size,
        "requested_size": device.requested_size,
        "ram_block": device.ram_block,
        "plugged": plugged.map(|range| {
            json!({ "offset": range.start(), "size": range.len() })
        }).collect::<Vec<_>>(),
    })
}

fn section(section: &SavedSection) -> Json {
    json!({
        "offset": section.offset,
        "id": section.header.idstr,
        "instance_id": section.header.instance_id,
        "version": section.header.version_id,
        "state": structure(&section.state),
    })
}

fn structure(state: &Structure) -> Json {
    let mut object = json!({
        "name": *state.vmsd_name,
        "version": state.version,
        "fields": state.fields.iter().map(field).collect::<Vec<_>>(),
    });
    if !state.subsections.is_empty() {
        object["subsections"] = state.subsections.iter().map(structure).collect();
    }
    object
}

fn field(field: &SavedField) -> Json {
    let mut object =
        json!({ "name": *field.name, "type": *field.kind, "value": value(&field.value) });
    if let Some(index) = field.index {
        object["index"] = index.into();
    }
    object
}

fn value(of: &Value) -> Json {
    match of {
        Value::Bool(value) => json!(value),
        Value::Unsigned { value, .. } => json!(value),
        Value::Signed { value, .. } => json!(value),
        // JSON has no infinity.
        Value::Float(value) if value.is_finite() => json!(value),
        Value::Float(value) => json!(value.to_string()),
        Value::Text(text) => json!(text),
        Value::Bytes(bytes) => json!(hex(bytes)),
        Value::Array(values) => values.iter().map(value).collect(),
        Value::Structure(state) => structure(state),
        _ => Json::Null,
    }
}
