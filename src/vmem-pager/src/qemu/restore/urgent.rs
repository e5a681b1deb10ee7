//! The channel of pages that are waited for (postcopy-preempt), and how it is known that QEMU reads it.
//!
//! A QEMU without that capability accepts the connection all the same, sooner or later, and closes it without having
//! read anything. So nothing that matters goes there until it is proven that QEMU reads it: one page is sent there, and
//! the kernel is asked what is unread of it, until nothing is, or the connection is closed. Of TCP the kernel here does
//! not know what was read: there, nothing is sent.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::lost::Lost;
use super::page_writer::PageWriter;
use super::supply::{Page, Supply};
use crate::error::PagerError;
use crate::image::PageReader;
use crate::sys::unread;

/// Between two looks at what is unread.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(5);
/// How long QEMU may wait for the page that proves it, which it would long have read. It may be its main thread that
/// waits, which alone could close the connection.
const UNREAD: Duration = Duration::from_secs(1);

/// The channel, while there is one.
pub(super) struct Urgent<'a> {
    /// Looked at for every page, also while one is being written here.
    is_read: AtomicBool,
    state: Mutex<Option<Second<'a>>>,
}

struct Second<'a> {
    pages: PageWriter<'a>,
    proof: Proof,
}

/// Whether QEMU reads the channel.
#[derive(Debug)]
enum Proof {
    /// It does.
    Known,
    /// It is not known, and will not be.
    None,
    /// This page was sent there.
    Awaited {
        page: Page,
        sent: Instant,
        /// QEMU waits for the page.
        wanted: bool,
    },
}

impl<'a> Urgent<'a> {
    /// With a connection, if there is one; whether QEMU is known to read it.
    pub fn new(pages: Option<PageWriter<'a>>, known: bool) -> Self {
        let proof = if known { Proof::Known } else { Proof::None };
        let is_read = AtomicBool::new(known && pages.is_some());
        Self { is_read, state: Mutex::new(pages.map(|pages| Second { pages, proof })) }
    }

    /// Whether QEMU reads it.
    pub fn is_read(&self) -> bool {
        self.is_read.load(Ordering::Acquire)
    }

    /// Whether that will be known.
    pub fn is_awaited(&self) -> bool {
        matches!(&*self.state.lock(), Some(Second { proof: Proof::Awaited { .. }, .. }))
    }

    /// Sends what proves that it is read, unless that is known.
    ///
    /// # Errors
    ///
    /// When the image cannot be read. A channel that takes nothing is none.
    pub fn probe(&self, supply: &Supply<'_>, lost: &Lost<'_>) -> Result<(), PagerError> {
        let mut state = self.state.lock();
        let Some(Second { pages, proof: proof @ Proof::None }) = &mut *state else { return Ok(()) };
        let Some(page) = supply.take_any() else { return Ok(()) };
        put(pages, supply, page)?;
        *proof = Proof::Awaited { page, sent: Instant::now(), wanted: false };
        if pages.send(lost, "its second connection was tried").is_err() {
            *state = None;
            supply.ask_again(page);
        }
        Ok(())
    }

    /// Looks whether the page that proves it was read.
    ///
    /// # Errors
    ///
    /// When it is neither read nor given up for too long.
    pub fn look(&self, supply: &Supply<'_>, lost: &Lost<'_>) -> Result<(), PagerError> {
        let mut state = self.state.lock();
        let Some(Second { pages, proof }) = &mut *state else { return Ok(()) };
        let Proof::Awaited { page, sent, wanted } = *proof else { return Ok(()) };
        // In this order: what is unread of a connection that is closed is gone, and the closing is seen before that.
        let unread = pages.channel().descriptor().map(unread::bytes);
        if matches!(unread, Some(Ok(0))) && !pages.channel().is_hung_up() {
            *proof = Proof::Known;
            self.is_read.store(true, Ordering::Release);
            return Ok(());
        }
        if wanted && sent.elapsed() >= UNREAD {
            *state = None;
            drop(state);
            supply.ask_again(page);
            return Ok(());
        }
        let after = lost.run.silence();
        if sent.elapsed() >= after {
            let what = format!(
                "QEMU neither reads its second connection nor closes it; use --qmp, which tells whether it has \
                 postcopy-preempt; {}",
                lost.guest()
            );
            return Err(PagerError::TimedOut { what, after });
        }
        Ok(())
    }

    /// QEMU waits for a page that is on its way.
    pub fn wanted(&self, block: usize, number: u64) {
        if let Some(Second { proof: Proof::Awaited { page, wanted, .. }, .. }) =
            &mut *self.state.lock()
            && (page.block, page.page) == (block, number)
        {
            *wanted = true;
        }
    }

    /// Does without a connection that QEMU has closed; what proved nothing goes on the main channel.
    ///
    /// # Errors
    ///
    /// When it had been read, so that what was sent there may be lost.
    pub fn check(&self, supply: &Supply<'_>, lost: &Lost<'_>) -> Result<(), PagerError> {
        let mut state = self.state.lock();
        match state.take_if(|second| second.pages.channel().is_hung_up()) {
            None | Some(Second { proof: Proof::None, .. }) => Ok(()),
            Some(Second { proof: Proof::Awaited { page, .. }, .. }) => {
                supply.ask_again(page);
                Ok(())
            }
            Some(Second { proof: Proof::Known, .. }) => {
                Err(lost.closed("pages that it waits for were being sent"))
            }
        }
    }

    /// Sends a page that QEMU waits for, if it reads this channel; how many bytes it was.
    ///
    /// # Errors
    ///
    /// When the image cannot be read, or QEMU does not take it.
    pub fn answer(
        &self,
        page: Page,
        reader: &mut PageReader<'_>,
        lost: &Lost<'_>,
    ) -> Result<u64, PagerError> {
        let mut state = self.state.lock();
        let Some(Second { pages, .. }) = &mut *state else {
            return Err(lost.closed("a page that it waits for was being sent"));
        };
        put_with(pages, page, reader)?;
        pages.send(lost, "a page that it waits for was being sent")
    }
}

fn put(pages: &mut PageWriter<'_>, supply: &Supply<'_>, page: Page) -> Result<(), PagerError> {
    put_with(pages, page, &mut PageReader::new(supply.image()))
}

fn put_with(
    pages: &mut PageWriter<'_>,
    page: Page,
    reader: &mut PageReader<'_>,
) -> Result<(), PagerError> {
    let Page { block, page, content } = page;
    if content {
        return pages.pages(block, page..page + 1, reader);
    }
    pages.zeros(block, page);
    Ok(())
}
