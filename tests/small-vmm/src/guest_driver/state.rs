//! What the driver knows, to be moved to another VMM.

use std::collections::BTreeSet;

use super::GuestDriver;

/// A driver between two requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DriverState {
    /// Guest-physical address of the ring.
    pub ring: u64,
    /// Number of its descriptors.
    pub ring_size: u16,
    /// Where both its indices stand.
    pub ring_index: u16,
    /// Whether the driver knows what is plugged.
    pub probed: bool,
    /// Plugged blocks, as words: block 0 in the lowest bit of the first.
    pub plugged: Vec<u64>,
}

impl GuestDriver {
    /// What the driver knows.
    ///
    /// # Errors
    ///
    /// When a request is on its way that was never answered.
    pub fn state(&self) -> Result<DriverState, String> {
        if !self.driver.is_idle() {
            return Err("a request is on its way".to_owned());
        }
        let mut plugged = vec![0; self.plugged.last().map_or(0, |last| last / 64 + 1) as usize];
        for block in &self.plugged {
            plugged[(block / 64) as usize] |= 1 << (block % 64);
        }
        let ring = self.driver.ring();
        Ok(DriverState {
            ring: ring.desc_addr(),
            ring_size: ring.size(),
            ring_index: ring.next_avail(),
            probed: self.probed,
            plugged,
        })
    }

    /// Goes on with what another driver knows.
    pub fn take_over(&mut self, state: &DriverState) {
        self.driver.resume_at(state.ring_index);
        self.probed = state.probed;
        self.plugged = blocks(&state.plugged);
    }
}

fn blocks(words: &[u64]) -> BTreeSet<u64> {
    let bits = |(index, word): (usize, &u64)| {
        let word = *word;
        (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| index as u64 * 64 + bit)
    };
    words.iter().enumerate().flat_map(bits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_blocks() {
        assert!(blocks(&[1 << 63 | 1, 0, 2]).into_iter().eq([0, 63, 129]));
    }
}
