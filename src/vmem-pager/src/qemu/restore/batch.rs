//! Pages that are sent together: a write costs more than a page.

use std::time::Instant;

use super::figures::Figures;
use super::lost::Lost;
use super::page_writer::PageWriter;
use super::supply::{Next, Source, Supply, Work};
use crate::error::PagerError;
use crate::image::PageReader;

/// Sends `first`, and with it what is next, `max` pages in all. What is needed sooner does not wait for what is needed
/// later, and after what was asked for it ends.
///
/// # Errors
///
/// When the image cannot be read, or QEMU does not take it.
pub(super) fn send(
    first: Work,
    max: u64,
    (supply, reader): (&Supply<'_>, &mut PageReader<'_>),
    main: &mut PageWriter<'_>,
    figures: &Figures,
    lost: &Lost<'_>,
) -> Result<(), PagerError> {
    let mut left = max;
    // Of each: why it is sent, pages, bytes, and when it was asked for.
    let mut put: Vec<(Source, u64, u64, Option<Instant>)> = Vec::new();
    let what = "memory was being sent";
    let mut next = Next::Send(first);
    while let Next::Send(Work { source, block, pages, content, since }) = next {
        if put.last().is_some_and(|(before, ..)| *before != source) {
            main.send(lost, what)?;
        }
        let (count, before) = (pages.end - pages.start, main.unsent());
        if content {
            main.pages(block, pages, reader)?;
        } else {
            pages.for_each(|page| main.zeros(block, page));
        }
        put.push((source, count, main.unsent() - before, since));
        left = left.saturating_sub(count);
        if left == 0 || source == Source::Request {
            break;
        }
        next = supply.next(left, true);
    }
    main.send(lost, what)?;
    for (source, count, bytes, since) in put {
        figures.sent(source, count, bytes);
        if let Some(since) = since {
            figures.served(since.elapsed());
        }
    }
    Ok(())
}
