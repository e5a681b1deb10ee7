//! What is in an image.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use migration::inspect::{Inspection, inspect};

use super::source::PAGE;

/// The pages of an image, by block and number; a page that it does not have is not there.
pub fn pages(file: &File) -> BTreeMap<(String, u64), Vec<u8>> {
    let mut pages = BTreeMap::new();
    for block in look(file).blocks {
        let mapped = block.mapped.expect("an image is mapped-ram");
        let nr_pages = block.used_length / PAGE as u64;
        let mut bits = vec![0; nr_pages.div_ceil(64) as usize * 8];
        file.read_exact_at(&mut bits, mapped.bitmap_offset).unwrap();
        for page in (0..nr_pages).filter(|page| bits[(page / 8) as usize] >> (page % 8) & 1 != 0) {
            let mut bytes = vec![0; PAGE];
            file.read_exact_at(&mut bytes, mapped.pages_offset + page * PAGE as u64).unwrap();
            pages.insert((block.id.clone(), page), bytes);
        }
    }
    pages
}

/// All of it.
pub fn bytes(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// What follows RAM, and some of that.
pub fn tail(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; 64 << 10];
    let from = file.metadata().unwrap().len() - bytes.len() as u64;
    file.read_exact_at(&mut bytes, from).unwrap();
    bytes
}

/// What `vmemctl inspect` sees. State that the tests make up ends it; RAM is read before that.
pub fn look(file: &File) -> Inspection {
    inspect(file)
}

/// Where an image holds anything in its pages that its bitmaps do not have.
pub fn held_for_nothing(file: &File) -> Vec<(String, u64)> {
    let present = pages(file);
    let mut held = Vec::new();
    for block in look(file).blocks {
        let mapped = block.mapped.expect("an image is mapped-ram");
        for page in 0..block.used_length / PAGE as u64 {
            let mut bytes = vec![0; PAGE];
            file.read_exact_at(&mut bytes, mapped.pages_offset + page * PAGE as u64).unwrap();
            let key = (block.id.clone(), page);
            if bytes.iter().any(|byte| *byte != 0) && !present.contains_key(&key) {
                held.push(key);
            }
        }
    }
    held
}
