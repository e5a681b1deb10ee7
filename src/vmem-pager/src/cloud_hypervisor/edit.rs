//! Changing paths in a Config: all other bytes stay as they are.

use std::collections::BTreeMap;
use std::str::FromStr;

use serde_json::value::RawValue;
use vmstate::printable;

/// Parts of the configuration whose values the layout of memory or the state of devices relies on.
const FIXED: [&str; 3] = ["cpus", "memory", "platform"];

/// `PATH=VALUE`: a text in the VM's configuration, as `disks[0].path=/new/disk`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edit {
    path: String,
    steps: Vec<Step>,
    value: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Key(String),
    Index(usize),
}

impl FromStr for Edit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((path, value)) = text.split_once('=') else {
            return Err("expected PATH=VALUE, as disks[0].path=/new/disk".to_owned());
        };
        let malformed = || format!("{path:?} is not a path as disks[0].path or serial.file");
        let mut steps = Vec::new();
        for part in path.split('.') {
            let (key, mut indices) = part.split_at(part.find('[').unwrap_or(part.len()));
            if key.is_empty() {
                return Err(malformed());
            }
            steps.push(Step::Key(key.to_owned()));
            while !indices.is_empty() {
                let inner = indices.strip_prefix('[').and_then(|rest| rest.split_once(']'));
                let (index, rest) = inner.ok_or_else(malformed)?;
                steps.push(Step::Index(index.parse().map_err(|_| malformed())?));
                indices = rest;
            }
        }
        match &steps[0] {
            Step::Key(first) if FIXED.contains(&first.as_str()) => {
                Err(format!("{first} cannot be changed: the saved state relies on it"))
            }
            _ => Ok(Self { path: path.to_owned(), steps, value: value.to_owned() }),
        }
    }
}

/// Applies edits to a Config.
///
/// # Errors
///
/// When one names what is not in it, or is not a text.
pub fn apply(config: &[u8], edits: &[Edit]) -> Result<Vec<u8>, String> {
    let mut text =
        str::from_utf8(config).map_err(|error| format!("the Config: {error}"))?.to_owned();
    for edit in edits {
        let (start, end) = edit.find(&text)?;
        let value = serde_json::to_string(&edit.value).map_err(|error| error.to_string())?;
        text.replace_range(start..end, &value);
    }
    Ok(text.into_bytes())
}

impl Edit {
    /// Where the text is, quotes included: bytes from the start of `config`.
    fn find(&self, config: &str) -> Result<(usize, usize), String> {
        let missing = || {
            let path = printable(&self.path);
            format!("--set {path}: the saved configuration has no such value")
        };
        let root = Step::Key("vm_config".to_owned());
        let mut at: &str = config;
        for step in [&root].into_iter().chain(&self.steps) {
            let value = match step {
                Step::Key(key) => {
                    let object: BTreeMap<String, &RawValue> =
                        serde_json::from_str(at).map_err(|_| missing())?;
                    object.get(key).copied()
                }
                Step::Index(index) => {
                    let array: Vec<&RawValue> = serde_json::from_str(at).map_err(|_| missing())?;
                    array.get(*index).copied()
                }
            };
            at = value.ok_or_else(missing)?.get();
        }
        if !at.starts_with('"') {
            let path = printable(&self.path);
            return Err(format!(
                "--set {path}: the value is not a text; only texts, as paths, are changed"
            ));
        }
        let start = at.as_ptr().addr() - config.as_ptr().addr();
        Ok((start, start + at.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r#"{ "vm_config" :{"disks":[ {"path":"\/old\u002fa", "n":1.50},{"path":"b"}],
        "serial":{"file":null,"mode":"File"},"memory":{"size":18446744073709551615}}, "x": [1,2 ]}"#;

    fn edits(texts: &[&str]) -> Vec<Edit> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn only_the_named_text_changes() {
        let edits = edits(&["disks[0].path=/new/\"a\"", "disks[1].path=", "serial.mode=Off"]);
        let changed = String::from_utf8(apply(CONFIG.as_bytes(), &edits).unwrap()).unwrap();
        let expected = CONFIG
            .replace(r#""\/old\u002fa""#, r#""/new/\"a\"""#)
            .replace(r#""path":"b""#, r#""path":"""#)
            .replace(r#""mode":"File""#, r#""mode":"Off""#);
        assert_eq!(changed, expected);
        assert_eq!(apply(CONFIG.as_bytes(), &[]).unwrap(), CONFIG.as_bytes());
    }

    #[test]
    fn what_is_not_there_or_not_a_text_is_refused() {
        for (text, what) in [
            ("disks[2].path=x", "no such value"),
            ("disks.path=x", "no such value"),
            ("nets[0].tap=x", "no such value"),
            ("serial.file=x", "not a text"),
            ("disks[0].n=x", "not a text"),
            ("disks=x", "not a text"),
        ] {
            let error = apply(CONFIG.as_bytes(), &edits(&[text])).unwrap_err();
            assert!(error.contains(what), "{text}: {error}");
        }
        for text in ["disks[0].path", "=x", "a..b=x", "a[x]=y", "a[0=y", "[0]=y", "memory.size=1"] {
            assert!(text.parse::<Edit>().is_err(), "{text}");
        }
    }
}
