//! The end of a stream that does not say where it ends.
//!
//! State of devices has no length, and with a return path QEMU does not close the channel after it. But
//! the last record is the JSON description of that state, which has one: the stream ends where a
//! description ends exactly with what has come, and nothing follows.

use migration::stream::DESCRIPTION_MAX;
use serde::Deserialize;
use serde::de::IgnoredAny;

/// End of sections, the type of the description, and its length (be32).
const HEAD: usize = 6;
const EOF: u8 = 0;
const DESCRIPTION: u8 = 6;

/// Where a description begins, and where it ends, bytes from the start of the state of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Where the end-of-sections byte stands: so long is the state.
    pub state_len: u64,
    /// Where the JSON starts.
    pub json: u64,
    /// Where it ends.
    pub end: u64,
}

/// Finds it while bytes come.
#[derive(Debug, Default)]
pub(super) struct DescriptionFinder {
    /// Bytes that have come.
    seen: u64,
    /// The last of them, as many as may begin a head with its first brace.
    last: Vec<u8>,
    /// What may be the description, if the stream ends there; in the order in which they begin.
    candidates: Vec<Found>,
}

impl DescriptionFinder {
    /// Takes the next bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        let kept = self.last.len();
        self.last.extend_from_slice(bytes);
        let base = self.seen - kept as u64;
        self.seen += bytes.len() as u64;
        for (index, head) in self.last.windows(HEAD + 1).enumerate() {
            let [EOF, DESCRIPTION, len @ .., b'{'] = head else { continue };
            let len = u64::from(u32::from_be_bytes(*len.first_chunk().expect("four bytes")));
            if len <= DESCRIPTION_MAX {
                let state_len = base + index as u64;
                let json = state_len + HEAD as u64;
                self.candidates.push(Found { state_len, json, end: json + len });
            }
        }
        self.last.drain(..self.last.len() - HEAD.min(self.last.len()));
        // What should have ended before was none.
        let seen = self.seen;
        self.candidates.retain(|found| found.end >= seen);
    }

    /// What would be descriptions if the stream ended now; the one that begins first, first.
    pub fn ends_now(&self) -> impl Iterator<Item = Found> {
        self.candidates.iter().filter(|found| found.end == self.seen).copied()
    }
}

/// Whether text is QEMU's description of a machine.
pub(super) fn is_description(json: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Description {
        #[serde(rename = "page_size")]
        _page_size: u64,
        #[serde(rename = "devices")]
        _devices: Vec<IgnoredAny>,
    }
    serde_json::from_slice::<Description>(json).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use migration::stream::{put_description, put_eof};
    use proptest::prelude::*;

    const JSON: &[u8] = br#"{"page_size": 4096, "devices": []}"#;

    fn ends(bytes: &[u8], step: usize) -> Vec<Found> {
        let mut finder = DescriptionFinder::default();
        bytes.chunks(step).for_each(|chunk| finder.push(chunk));
        finder.ends_now().collect()
    }

    #[test]
    fn a_description_is_told_from_what_only_looks_like_one() {
        assert!(is_description(JSON));
        for other in [&b"{}"[..], b"{\"devices\": []}", b"{\"page_size\": 1, \"devices\": 1}", b"{"]
        {
            assert!(!is_description(other));
        }
    }

    proptest! {
        #[test]
        fn the_end_is_found_however_the_stream_is_cut(
            state in prop::collection::vec(prop_oneof![Just(0u8), Just(6), Just(b'{'), any::<u8>()], 0..200),
            step in 1usize..60,
        ) {
            let mut bytes = state.clone();
            put_eof(&mut bytes);
            put_description(&mut bytes, JSON);
            let (state_len, end) = (state.len() as u64, bytes.len() as u64);
            let found = Found { state_len, json: state_len + 6, end };
            prop_assert!(ends(&bytes, step).contains(&found));
            for cut in state.len()..bytes.len() {
                prop_assert!(!ends(&bytes[..cut], step).contains(&found));
            }
            bytes.push(0);
            prop_assert!(!ends(&bytes, step).contains(&found));
        }
    }
}
