//! What a guest's memory holds: noise, or what compresses as memory of guests does. The same in each run, and no
//! page of it is zero.

use serde::{Deserialize, Serialize};

use crate::units::PAGE;

/// What a guest has written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Content {
    /// What no compression makes small.
    #[default]
    Noise,
    /// Seven pages of sixteen are lines of words and numbers, as many are records of pointers, counters, times and
    /// flags, and two are noise, as what is compressed or encrypted already. zstd at level 1 makes it two to three
    /// times smaller.
    Mixed,
}

impl Content {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Mixed, Self::Noise];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Noise => "noise",
            Self::Mixed => "text, records and noise",
        }
    }
}

/// How many words there are.
const WORDS: usize = 1024;

/// Bytes of a record.
const RECORD: usize = 64;

/// Makes content.
pub struct Generator {
    content: Content,
    state: u64,
    words: Vec<Vec<u8>>,
    /// Of the records, which goes up.
    time: u64,
}

impl Generator {
    /// The same each time.
    pub fn new(content: Content) -> Self {
        let mut new = Self { content, state: 0x9e37_79b9_7f4a_7c15, words: Vec::new(), time: 0 };
        if content == Content::Mixed {
            new.words = (0..WORDS).map(|_| new.word()).collect();
        }
        new
    }

    fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }

    fn word(&mut self) -> Vec<u8> {
        let len = 3 + self.next() % 8;
        (0..len).map(|_| b'a' + (self.next() % 26) as u8).collect()
    }

    /// The next bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for page in bytes.chunks_mut(PAGE as usize) {
            match (self.content, self.next() >> 32 & 15) {
                (Content::Noise, _) | (Content::Mixed, 0..2) => self.noise(page),
                (Content::Mixed, 2..9) => self.text(page),
                (Content::Mixed, _) => self.records(page),
            }
        }
    }

    fn noise(&mut self, page: &mut [u8]) {
        for word in page.chunks_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes()[..word.len()]);
        }
    }

    /// Lines of words, each with a number before it.
    fn text(&mut self, page: &mut [u8]) {
        let mut text = Vec::with_capacity(page.len() + 128);
        while text.len() < page.len() {
            text.extend_from_slice(format!("{:08}", self.next() % 100_000_000).as_bytes());
            for _ in 0..12 {
                let word = self.next() as usize % self.words.len();
                text.push(b' ');
                text.extend_from_slice(&self.words[word]);
            }
            text.push(b'\n');
        }
        page.copy_from_slice(&text[..page.len()]);
    }

    /// Records as those of a kernel: where it is itself, two others that it refers to, a table of functions, a time,
    /// a count, flags, and the rest unused.
    fn records(&mut self, page: &mut [u8]) {
        const HEAP: u64 = 0xffff_8880_0000_0000;
        const CODE: u64 = 0xffff_ffff_8100_0000;
        let at = HEAP + self.next() % (1 << 21) * PAGE;
        for (index, record) in page.chunks_mut(RECORD).enumerate() {
            self.time += self.next() % (1 << 16);
            let random = self.next();
            let words = [
                at + (index * RECORD) as u64,
                HEAP + random % (1 << 27) * RECORD as u64,
                at + (random >> 32 & 63) * RECORD as u64,
                CODE + (random >> 40 & 15) * 0x1c0,
                self.time,
                random >> 44 & 0xff,
                1 << (random >> 52 & 7) | 0x100_0000,
            ];
            record.fill(0);
            for (place, word) in record.chunks_mut(8).zip(words) {
                place.copy_from_slice(&word.to_le_bytes()[..place.len()]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_the_same_each_time_and_has_no_page_of_zeros() {
        for content in Content::ALL {
            let made = [(); 2].map(|()| {
                let mut bytes = vec![0; 256 * PAGE as usize + 10];
                Generator::new(content).fill(&mut bytes);
                bytes
            });
            assert!(made[0] == made[1]);
            let (pages, _) = made[0].as_chunks::<{ PAGE as usize }>();
            assert!(pages.iter().all(|page| page.iter().any(|byte| *byte != 0)));
            let repeats = pages.windows(2).filter(|pair| pair[0] == pair[1]).count();
            assert_eq!(repeats, 0, "{content:?}");
        }
    }
}
