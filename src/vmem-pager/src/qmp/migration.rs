//! What QMP knows of a migration.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::Qmp;
use crate::error::PagerError;

/// Capabilities that were set, and what they had been.
#[derive(Clone, Debug, Default)]
pub struct Capabilities(Vec<(String, bool)>);

impl Capabilities {
    /// Sets capabilities that are not as wanted already; remembers what they were.
    ///
    /// # Errors
    ///
    /// When QEMU refuses, or does not know one that is wanted.
    pub fn set(qmp: &mut Qmp, wanted: &[(&str, bool)]) -> Result<Self, PagerError> {
        let known = qmp.execute("query-migrate-capabilities", &json!({}))?;
        let state = |name: &str| {
            let mut all = known.as_array().into_iter().flatten();
            all.find(|one| one["capability"] == name).and_then(|one| one["state"].as_bool())
        };
        let changed: Vec<(&str, bool)> = wanted
            .iter()
            // One that QEMU does not have is off.
            .filter(|(name, wanted)| state(name).unwrap_or(false) != *wanted)
            .copied()
            .collect();
        if !changed.is_empty() {
            qmp.execute("migrate-set-capabilities", &capabilities(changed.iter().copied()))?;
        }
        Ok(Self(changed.into_iter().map(|(name, now)| (name.to_owned(), !now)).collect()))
    }

    /// Puts back what they had been, as far as QEMU lets it.
    pub fn put_back(self, qmp: &mut Qmp, patience: Duration) {
        if !self.0.is_empty() {
            let all = self.0.iter().map(|(name, state)| (name.as_str(), *state));
            let _ = qmp.execute_at_end("migrate-set-capabilities", &capabilities(all), patience);
        }
    }
}

fn capabilities<'a>(all: impl Iterator<Item = (&'a str, bool)>) -> Value {
    let all = all.map(|(name, state)| json!({ "capability": name, "state": state }));
    json!({ "capabilities": all.collect::<Vec<Value>>() })
}

/// How a migration stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Migration {
    /// As "active"; "none" when there was none.
    pub status: String,
    /// Why it failed, in QEMU's words.
    pub error: Option<String>,
    /// All that QEMU says.
    pub info: Map<String, Value>,
}

impl Migration {
    /// What `query-migrate` says.
    ///
    /// # Errors
    ///
    /// As [`Qmp::execute`].
    pub fn query(qmp: &mut Qmp) -> Result<Self, PagerError> {
        Ok(Self::from_answer(qmp.execute("query-migrate", &json!({}))?))
    }

    /// As [`Migration::query`], also when the run has ended.
    ///
    /// # Errors
    ///
    /// As [`Qmp::execute_at_end`].
    pub fn query_at_end(qmp: &mut Qmp, patience: Duration) -> Result<Self, PagerError> {
        Ok(Self::from_answer(qmp.execute_at_end("query-migrate", &json!({}), patience)?))
    }

    fn from_answer(answer: Value) -> Self {
        let text = |name: &str| answer[name].as_str().map(str::to_owned);
        let status = text("status").unwrap_or_else(|| "none".to_owned());
        let error = text("error-desc");
        let Value::Object(info) = answer else { return Self { status, error, info: Map::new() } };
        Self { status, error, info }
    }

    /// Whether it has come to an end that is not a good one.
    pub fn has_failed(&self) -> bool {
        matches!(self.status.as_str(), "failed" | "cancelled" | "failing" | "cancelling")
    }

    /// The end that was not a good one, in QEMU's words.
    pub fn failure(&self) -> PagerError {
        let status = vmstate::printable(&self.status);
        PagerError::Peer(match &self.error {
            Some(error) => format!("QEMU's migration is {status}: {}", vmstate::printable(error)),
            None => format!("QEMU's migration is {status}"),
        })
    }
}
