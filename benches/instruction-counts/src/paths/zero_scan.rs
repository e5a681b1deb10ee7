//! The look at a page for anything that is not zero.

use std::hint::black_box;

use anyhow::{Result, ensure};
use migration::stream::TARGET_PAGE_SIZE;
use ram_discard::memory::HostMapping;

use super::MIB;
use super::region::memfd;
use crate::counted::counted;

const SIZE: u64 = 16 * MIB;

/// What is in every page.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Page {
    /// Nothing.
    Zeros,
    /// Something in its first line, as in most pages that are in use.
    Early,
    /// Its last byte.
    Late,
}

/// Looks at every page.
pub fn scan(kind: Page) -> Result<u64> {
    let mapping = HostMapping::map(&memfd(SIZE)?, 0, SIZE)?;
    let pages = SIZE / TARGET_PAGE_SIZE;
    for page in 0..pages {
        let offset = match kind {
            Page::Zeros => continue,
            Page::Early => 40,
            Page::Late => TARGET_PAGE_SIZE - 1,
        };
        mapping.write(page * TARGET_PAGE_SIZE + offset, &[1]);
    }
    let zeros = counted(|| {
        let is_zero = |page: &u64| {
            let page = black_box(*page);
            mapping.page_is_zero(page * TARGET_PAGE_SIZE, TARGET_PAGE_SIZE)
        };
        (0..pages).filter(is_zero).count() as u64
    });
    ensure!(zeros == if kind == Page::Zeros { pages } else { 0 }, "{zeros} of {pages} are zero");
    Ok(pages)
}
