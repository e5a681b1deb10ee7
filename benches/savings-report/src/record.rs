//! What came out of a case.

use serde::{Deserialize, Serialize};

use crate::case::Case;

/// A case and what came out of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// What was asked for.
    pub case: Case,
    /// What came of it.
    pub outcome: Outcome,
}

/// What became of a case.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It ran.
    Measured(Box<Figures>),
    /// It was left out, for this reason.
    NotRun(String),
    /// It ended with this error.
    Failed(String),
}

/// The figures of a run. Sizes are bytes, pages are of 4 KiB, times are milliseconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Figures {
    /// Bytes on the wire, or written to or read from the file, by the engine's count.
    pub wire: u64,
    /// The same, counted independently: by the kernel, in `/proc/self/io` (what the
    /// destination read) or as blocks of the file.
    pub counted: Option<u64>,
    /// Whether both counts agree; `None` without an independent one.
    pub agrees: Option<bool>,
    /// Pages with their bytes.
    pub normal: u64,
    /// Pages sent as zeros.
    pub zero: u64,
    /// Pages not sent: nothing was ever there.
    pub holes: u64,
    /// Pages not sent: not plugged.
    pub discarded: u64,
    /// Pages that the destination asked for.
    pub requests: u64,
    /// Writes that waited for a background snapshot.
    pub write_faults: u64,
    /// Until the first page was sent.
    pub setup: f64,
    /// From the beginning until all was moved.
    pub total: f64,
    /// While no guest ran; at a restore, until it could run.
    pub downtime: Option<f64>,
    /// Processor time of both sides together, with the guest's writes.
    pub cpu: f64,
    /// What was resident on the source before and after.
    pub source: [u64; 2],
    /// What was resident on the destination afterwards.
    pub destination: u64,
}

impl Figures {
    /// Compares the engine's count of bytes with an independent one, which also sees what is not
    /// memory: the return path, fault messages, a file's metadata.
    pub fn check(&mut self, counted: Option<u64>) {
        self.check_beside(counted, 0);
    }

    /// As [`check`](Self::check), where up to so many bytes `beside` are read ahead and not used.
    pub fn check_beside(&mut self, counted: Option<u64>, beside: u64) {
        const SLACK: u64 = 256 << 10;
        let allowed = SLACK + self.wire / 100 + beside;
        self.counted = counted;
        self.agrees = counted.map(|counted| counted.abs_diff(self.wire) <= allowed);
    }
}

impl Record {
    /// The figures, if it ran.
    pub fn figures(&self) -> Option<&Figures> {
        match &self.outcome {
            Outcome::Measured(figures) => Some(figures),
            Outcome::NotRun(_) | Outcome::Failed(_) => None,
        }
    }

    /// Whether the report cannot be trusted because of it.
    pub fn is_wrong(&self) -> bool {
        match &self.outcome {
            Outcome::Measured(figures) => figures.agrees == Some(false),
            Outcome::NotRun(_) => false,
            Outcome::Failed(_) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_agree_within_one_percent() {
        let mut figures = Figures { wire: 100 << 20, ..Figures::default() };
        figures.check(Some(101 << 20));
        assert_eq!(figures.agrees, Some(true));
        figures.check(Some(102 << 20));
        assert_eq!(figures.agrees, Some(false));
        figures.check_beside(Some(102 << 20), 1 << 20);
        assert_eq!(figures.agrees, Some(true));
        figures.check(None);
        assert_eq!(figures.agrees, None);
    }
}
