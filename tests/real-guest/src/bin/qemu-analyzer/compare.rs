//! What QEMU's script reads in a file, against what is in it and what our inspection reads.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use migration::inspect::{SavedField, Structure, Value, Warning, inspect};
use serde_json::{Map, Value as Json};

use crate::files::Written;
use crate::script::Script;

/// Runs the script on a file, twice: for what it says, and for the memory that it extracts. How
/// many values were alike.
pub fn compare(script: &Script, written: &Written, folder: &Path) -> Result<usize> {
    let said = run(script, written, folder, &["-d", "state"])?;
    let said: Map<String, Json> = serde_json::from_slice(&said.stdout)
        .context("the script does not print one object of JSON")?;
    let ours = inspect(File::open(&written.path)?);
    if let Some(error) = &ours.error {
        return Err(anyhow::anyhow!("our own inspection fails: {error}"));
    }
    let odd = ours.warnings.iter().find(|warning| {
        // Before level 8.0 there was none.
        !matches!(warning, Warning::NoEarlySection { .. })
    });
    ensure!(odd.is_none(), "our own inspection warns: {odd:?}");
    let mut sections = Map::new();
    let mut values = 0;
    for section in &ours.sections {
        let name = format!("{} ({})", section.header.idstr, section.header.section_id);
        sections.insert(name, structure(&section.state, &mut values));
    }
    let sizes = ours.blocks.iter().map(|block| {
        values += 1;
        (block.id.clone(), format!("{:#018x}", block.used_length).into())
    });
    let sizes: Map<String, Json> = sizes.collect();
    let ram = said.keys().find(|name| name.starts_with("ram (")).context("no RAM section")?;
    sections.insert(ram.clone(), serde_json::json!({ "section sizes": sizes }));
    for (name, expected) in &sections {
        let found = said.get(name).with_context(|| format!("the script has no section {name}"))?;
        ensure!(found == expected, "section {name}: the script reads\n{found}\nand we\n{expected}");
    }
    ensure!(said.len() == sections.len(), "the script has sections that we have not: {said:?}");

    run(script, written, folder, &["-x"])?;
    for (id, expected) in &written.memory {
        let path = folder.join(id);
        let found = fs::read(&path).with_context(|| format!("no memory of block {id}"))?;
        fs::remove_file(&path)?;
        ensure!(found.len() == expected.len(), "block {id} has {} bytes", found.len());
        let differs = found.iter().zip(expected).position(|(found, expected)| found != expected);
        ensure!(differs.is_none(), "block {id} differs at {:#x}", differs.unwrap_or(0));
    }
    Ok(values)
}

fn run(script: &Script, written: &Written, folder: &Path, args: &[&str]) -> Result<Output> {
    let mut command = Command::new("python3");
    command.current_dir(folder).arg(&script.path).arg("-f").arg(&written.path).args(args);
    let output = command.output().context("there is no python3")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "the script fails:\n{said}");
    Ok(output)
}

/// As the script prints it.
fn structure(structure: &Structure, values: &mut usize) -> Json {
    let mut fields = Map::new();
    for SavedField { name, value, .. } in &structure.fields {
        let value = printed(value, values);
        match fields.get_mut(&**name) {
            None => drop(fields.insert(name.to_string(), value)),
            Some(Json::Array(list)) => list.push(value),
            Some(one) => *one = Json::Array(vec![one.take(), value]),
        }
    }
    for subsection in &structure.subsections {
        let name = subsection.vmsd_name.to_string();
        fields.insert(name, self::structure(subsection, values));
    }
    Json::Object(fields)
}

fn printed(value: &Value, values: &mut usize) -> Json {
    *values += 1;
    match value {
        Value::Bool(value) => (*value).into(),
        Value::Unsigned { value, size } => format!("0x{value:0width$x}", width = size * 2).into(),
        Value::Bytes(bytes) => {
            let bytes: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            bytes.join(" ").into()
        }
        Value::Structure(inner) => structure(inner, values),
        other => format!("{other:?}").into(),
    }
}
