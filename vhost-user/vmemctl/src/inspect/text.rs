//! For people.

use std::fmt::Write;
use std::path::Path;

use program::size::format_size;

use migration::inspect::{
    Inspection, SavedRamBlock, SavedSection, SavedVirtioMem, Structure, Value,
};

use super::{command_words, hex, layout};

/// Bytes of a buffer that are shown.
const BYTES_SHOWN: usize = 32;
/// Elements of an array that are shown on one line.
const ELEMENTS_SHOWN: usize = 16;

/// All that is known of a file.
pub(super) fn inspection(path: &Path, inspection: &Inspection) -> String {
    let mut text = String::new();
    let configuration = &inspection.configuration;
    let line = |text: &mut String, name: &str, value: &str| {
        let _ = writeln!(text, "{name:<13}{value}");
    };
    let size = |bytes: u64| format!("{} ({bytes} bytes)", format_size(bytes));
    line(&mut text, "file", &path.display().to_string());
    line(&mut text, "size", &size(inspection.len));
    line(&mut text, "machine", &safe(&configuration.machine));
    line(&mut text, "layout", layout(inspection));
    if !configuration.capabilities.is_empty() {
        line(&mut text, "capabilities", &safe(&configuration.capabilities.join(", ")));
    }
    if let Some(bits) = configuration.target_page_bits {
        line(&mut text, "page bits", &bits.to_string());
    }
    if let Some(uuid) = &configuration.uuid {
        line(&mut text, "UUID", &hex(uuid));
    }
    let description = inspection
        .description
        .map_or_else(|| "none".to_owned(), |(offset, len)| format!("{len} bytes at {offset:#x}"));
    line(&mut text, "description", &description);

    blocks(&mut text, &inspection.blocks);
    inspection.virtio_mem.iter().for_each(|of| device(&mut text, of));
    if !inspection.commands.is_empty() {
        text.push_str("\nCommands\n");
        for (offset, command) in &inspection.commands {
            let (name, detail) = command_words(command);
            let _ =
                writeln!(text, "  {offset:#x}  {}", safe(format!("{name} {detail}").trim_end()));
        }
    }
    if !inspection.sections.is_empty() {
        text.push_str("\nDevices\n");
        inspection.sections.iter().for_each(|of| section(&mut text, of));
    }
    let warnings = &inspection.warnings;
    if warnings.is_empty() {
        text.push_str("\nNo warnings\n");
    } else {
        text.push_str("\nWarnings\n");
        for warning in warnings {
            let _ = writeln!(text, "  {}", safe(&warning.to_string()));
        }
    }
    text
}

fn blocks(text: &mut String, blocks: &[SavedRamBlock]) {
    if blocks.is_empty() {
        return;
    }
    let ids: Vec<String> = blocks.iter().map(|block| safe(&block.id)).collect();
    let width = ids.iter().map(|id| id.chars().count()).max().unwrap_or(0).max(9);
    let _ = writeln!(
        text,
        "\n{:<width$}  {:>12}  {:>10}  {:>10}  {:>10}",
        "RAM block", "size", "normal", "zero", "absent"
    );
    for (block, id) in blocks.iter().zip(ids) {
        let SavedRamBlock { used_length, normal, zero, absent, .. } = block;
        let size = format_size(*used_length);
        let _ = write!(text, "{id:<width$}  {size:>12}  {normal:>10}  {zero:>10}  {absent:>10}");
        if let Some(addr) = block.addr {
            let _ = write!(text, "  at {addr:#x}");
        }
        text.push('\n');
    }
}

fn device(text: &mut String, device: &SavedVirtioMem) {
    let size = |bytes: u64| format!("{} ({bytes} bytes)", format_size(bytes));
    let maybe = |bytes: Option<u64>| bytes.map_or_else(|| "unknown".to_owned(), size);
    let ranges = device.plugged().count();
    let plural = if ranges == 1 { "" } else { "s" };
    let rows = [
        ("address", format!("{:#x}", device.addr)),
        ("region", size(device.region_size)),
        ("block", size(device.block_size)),
        ("node", device.node.to_string()),
        ("usable", maybe(device.usable_region_size)),
        ("requested", maybe(device.requested_size)),
        ("plugged", format!("{} in {ranges} range{plural}", size(device.plugged_size))),
        ("RAM block", device.ram_block.as_deref().map_or_else(|| "unknown".to_owned(), safe)),
    ];
    let _ = writeln!(text, "\n{}", safe(format!("virtio-mem {}", device.path).trim_end()));
    for (name, value) in rows {
        let _ = writeln!(text, "  {name:<11}{value}");
    }
    for range in device.plugged() {
        let _ = writeln!(text, "    {:#014x}  {}", range.start(), size(range.len()));
    }
}

fn section(text: &mut String, section: &SavedSection) {
    let header = &section.header;
    let _ = writeln!(
        text,
        "  {:#x}  {}, instance {}, version {}",
        section.offset,
        safe(&header.idstr),
        header.instance_id,
        header.version_id
    );
    structure(text, &section.state, 2);
}

fn structure(text: &mut String, state: &Structure, depth: usize) {
    let indent = 2 * depth;
    for field in &state.fields {
        let index = field.index.map(|index| format!("[{index}]")).unwrap_or_default();
        let _ = write!(text, "{:indent$}{}{index}", "", safe(&field.name));
        value(text, &field.value, depth);
    }
    for subsection in &state.subsections {
        let name = safe(&subsection.vmsd_name);
        let _ = writeln!(text, "{:indent$}{name}, version {}", "", subsection.version);
        structure(text, subsection, depth + 1);
    }
}

/// What follows the name of a field, to the end of its last line.
fn value(text: &mut String, of: &Value, depth: usize) {
    let one_line = |values: &[Value]| {
        !values.iter().any(|value| matches!(value, Value::Array(_) | Value::Structure(_)))
    };
    match of {
        Value::Structure(state) => {
            text.push('\n');
            structure(text, state, depth + 1);
        }
        Value::Array(values) if one_line(values) => {
            let shown: Vec<String> = values.iter().take(ELEMENTS_SHOWN).map(scalar).collect();
            let more = values.len().saturating_sub(ELEMENTS_SHOWN);
            let more = if more == 0 { String::new() } else { format!(" and {more} more") };
            let _ = writeln!(text, " = [{}]{more}", shown.join(", "));
        }
        Value::Array(values) => {
            text.push('\n');
            let indent = 2 * (depth + 1);
            for (index, element) in values.iter().enumerate() {
                let _ = write!(text, "{:indent$}[{index}]", "");
                value(text, element, depth + 1);
            }
        }
        _ => {
            let _ = writeln!(text, " = {}", scalar(of));
        }
    }
}

fn scalar(value: &Value) -> String {
    match value {
        Value::Bool(value) => value.to_string(),
        Value::Unsigned { value, .. } => format!("{value:#x}"),
        Value::Signed { value, .. } => value.to_string(),
        Value::Float(value) => value.to_string(),
        Value::Text(name) => safe(name),
        Value::Bytes(bytes) if bytes.iter().all(|byte| *byte == 0) => {
            format!("{} bytes, all 0", bytes.len())
        }
        Value::Bytes(bytes) if bytes.len() <= BYTES_SHOWN => hex(bytes),
        Value::Bytes(bytes) => {
            format!("{}... {} bytes", hex(&bytes[..BYTES_SHOWN]), bytes.len())
        }
        _ => "null".to_owned(),
    }
}

/// A name of a file's, which must not reach a terminal as it is.
pub(super) fn safe(name: &str) -> String {
    name.chars()
        .flat_map(|c| match c.is_control() {
            true => c.escape_default().collect::<Vec<_>>(),
            false => vec![c],
        })
        .collect()
}
