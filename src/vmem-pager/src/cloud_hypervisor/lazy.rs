//! Restoring on demand: boot memory is asked for page by page, first what the guest touches, then everything.
//!
//! Cloud Hypervisor asks over a connection of its own, for one page at a time. The page is written to the
//! memory that both share, then the answer is Ok. Between the two nothing but this side writes to the page: each
//! access waits for the answer. A page that was answered is never written with what the image has again: when it
//! is a hole once more, it was discarded, and is made present as zeros.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use migration::page_bitmap::PageBitmap;
use migration::stream::TARGET_PAGE_SIZE;
use parking_lot::Mutex;
use ram_discard::ByteRange;
use serde_json::json;
use vmstate::wire::WireWrite;

use super::channel::{Lost, Peer, Wait};
use super::giving::{Giving, WHO};
use super::image::SavedGuest;
use super::memory::{self, Memory};
use super::metrics::RestoreMetrics;
use super::protocol::{Answer, Command, RANGE_LEN, ROLE_FAULT};
use super::restore::{Plan, explain};
use crate::cli::report::Report;
use crate::error::PagerError;
use crate::image::PageReader;
use crate::run::{POLL, Run};
use crate::socket;

/// The largest page that is asked for, bytes.
const PAGE_MAX: u64 = 1 << 30;
/// Pages filled at a time while they are asked for one after the other, and otherwise.
const AHEAD: u64 = 256;
const AROUND: u64 = 16;

/// Serves pages that are asked for.
pub(super) struct Faults<'a> {
    guest: &'a SavedGuest,
    memories: &'a [Memory],
    metrics: &'a RestoreMetrics,
    /// Pages that have what the image has, by mapping.
    filled: Vec<Mutex<PageBitmap>>,
    /// Pages that were asked for, by mapping.
    asked: Vec<Mutex<PageBitmap>>,
    /// Absent pages that were made present, by mapping.
    zeroed: Vec<Mutex<PageBitmap>>,
    requests: AtomicU64,
}

/// How the requests ended.
#[derive(Debug)]
enum Served {
    /// Everything was asked for.
    All,
    Failed(PagerError),
}

impl<'a> Faults<'a> {
    pub fn new(guest: &'a SavedGuest, memories: &'a [Memory], metrics: &'a RestoreMetrics) -> Self {
        let bitmaps = || {
            let mappings = guest.layout().mappings.iter();
            let bitmap = |pages| Mutex::new(PageBitmap::new(pages));
            mappings.map(|mapping| bitmap(mapping.range.len() / TARGET_PAGE_SIZE)).collect()
        };
        let (filled, asked, zeroed) = (bitmaps(), bitmaps(), bitmaps());
        Self { guest, memories, metrics, filled, asked, zeroed, requests: AtomicU64::new(0) }
    }

    /// Answers requests until the connection ends. `ended` says why not to wait any longer.
    fn serve(&self, peer: &Peer, run: &Run, ended: &AtomicBool) -> Served {
        let mut reader = PageReader::new(self.guest.image());
        let mut next = u64::MAX;
        loop {
            // What the guest waits for is not bounded by silence: it may touch nothing for long.
            let wait = Wait::for_the_run("pages were being asked for");
            let request = match peer.request(run, wait) {
                Ok(Ok(request)) => request,
                Ok(Err(what)) => {
                    return self.fail(peer, PagerError::Protocol(format!("{WHO}: {what}")));
                }
                Err(Lost::Closed) => return self.whole(),
                Err(_) if ended.load(Ordering::Relaxed) => return Served::All,
                Err(lost) => return Served::Failed(lost.explain(WHO, "a request for a page")),
            };
            let begun = Instant::now();
            if request.command != Command::PageFault {
                let what =
                    format!("{WHO}: {:?} came where PageFault was expected", request.command);
                return self.fail(peer, PagerError::Protocol(what));
            }
            let wait = Wait::within(run.silence(), "the rest of a request for a page");
            let range = match peer.payload(RANGE_LEN as u64, run, wait) {
                Ok(range) => range,
                Err(lost) => return Served::Failed(lost.explain(WHO, "a request for a page")),
            };
            let word =
                |at: usize| u64::from_le_bytes(range[at..at + 8].try_into().expect("8 bytes"));
            let (gpa, len) = (word(0), word(8));
            if let Err(error) = self.make_present(&mut reader, gpa, len, gpa == next) {
                return self.fail(peer, error);
            }
            next = gpa.wrapping_add(len);
            self.requests.fetch_add(1, Ordering::Relaxed);
            let wait = Wait::within(run.silence(), "its reading an answer");
            match peer.answer(Answer::Ok, run, wait) {
                Ok(()) => self.metrics.answered(begun.elapsed().as_secs_f64()),
                Err(lost) => return Served::Failed(lost.explain(WHO, "reading an answer")),
            }
        }
    }

    /// The requests have ended: every page has to have been asked for.
    fn whole(&self) -> Served {
        let mappings = self.guest.layout().mappings.iter().zip(&self.asked);
        let left = mappings.filter(|(mapping, _)| !mapping.virtio_mem).map(|(_, asked)| {
            let asked = asked.lock();
            asked.nr_pages() - asked.count()
        });
        match left.sum() {
            0u64 => Served::All,
            left => Served::Failed(PagerError::Peer(format!(
                "{WHO} closed the connection, and has not asked for {left} pages: it has ended, or has stopped"
            ))),
        }
    }

    /// A page that cannot be had is never answered with zeros.
    fn fail(&self, peer: &Peer, error: PagerError) -> Served {
        let run = Run::new(None);
        let _ = peer.answer(Answer::Error, &run, Wait::within(super::LAST_WORD, "Error"));
        Served::Failed(error)
    }

    /// Makes a page present with what the image has, or as zeros.
    fn make_present(
        &self,
        reader: &mut PageReader<'_>,
        gpa: u64,
        len: u64,
        in_order: bool,
    ) -> Result<(), PagerError> {
        let whole = len.is_power_of_two()
            && (TARGET_PAGE_SIZE..=PAGE_MAX).contains(&len)
            && gpa.is_multiple_of(len);
        let range = ByteRange::new(gpa, len).filter(|_| whole);
        let found = range.and_then(|range| Some((range, self.guest.layout().find(range)?)));
        let Some((range, mapping)) = found else {
            return Err(PagerError::Protocol(format!(
                "{WHO} asked for {len:#x} bytes at {gpa:#x}; expected a page of the guest's memory"
            )));
        };
        let offset = range.start() - self.guest.layout().mappings[mapping].range.start();
        let first = offset / TARGET_PAGE_SIZE;
        let asked = first..first + len / TARGET_PAGE_SIZE;
        let present = self.guest.block(mapping).present();
        let mut filled = self.filled[mapping].lock();
        if present.runs(asked.clone()).next().is_some() {
            // Neighbours come along: they will be asked for, too.
            let ahead = if in_order { AHEAD } else { AROUND };
            let end = (asked.start + 1).next_multiple_of(ahead).max(asked.end);
            let end = end.min(present.nr_pages());
            let mut from = asked.start;
            while let Some(run) = present.next_run(from, end, AHEAD) {
                from = run.end;
                let mut page = run.start;
                while page < run.end {
                    if filled.test(page) {
                        page += 1;
                        continue;
                    }
                    let until = filled.next_set(page, run.end).unwrap_or(run.end);
                    memory::write(reader, self.guest, mapping, page..until, self.memories)?;
                    let count = filled.set_range(page..until);
                    self.metrics.filled(count);
                    page = until;
                }
            }
        }
        drop(filled);
        // Changes nothing that is there, and makes zeros of what is not: absent pages, zeros of the image, and
        // what was discarded since.
        self.memories[mapping]
            .make_present(offset, len)
            .map_err(|error| PagerError::System { action: "make memory present", source: error })?;
        self.asked[mapping].lock().set_range(asked.clone());
        let mut zeroed = self.zeroed[mapping].lock();
        let mut count = 0;
        for page in asked {
            if !present.test(page) && zeroed.set(page) {
                count += 1;
            }
        }
        self.metrics.zeroed(count);
        Ok(())
    }

    /// Discards absent pages that were made present, of a guest that does not run.
    fn punch(&self) -> Result<(), PagerError> {
        for (index, mapping) in self.guest.layout().mappings.iter().enumerate() {
            if mapping.huge_page.is_some() {
                // Of a huge page, a part that is absent does not matter.
                continue;
            }
            let zeroed = self.zeroed[index].lock();
            let mut count = 0;
            for page in zeroed.runs(0..zeroed.nr_pages()).flatten() {
                // A device may have written to it while State was loaded.
                let discarded = self.memories[index].discard_zeros(page * TARGET_PAGE_SIZE);
                count += u64::from(discarded.map_err(PagerError::system("discard memory"))?);
            }
            self.metrics.punched(count);
        }
        Ok(())
    }
}

/// Serves a guest that was configured until it has asked for all of its memory.
pub(super) fn restore(
    mut giving: Giving<'_>,
    faults: &Faults<'_>,
    plan: Plan<'_>,
    run: &Run,
    report: &Report,
) -> Result<(), PagerError> {
    let Plan { guest, address, .. } = plan;
    let fd = socket::try_connect(address, run)
        .map_err(socket::failed("cannot connect for page faults to", address))?;
    let peer = Peer::new(fd)?;
    let wait = Wait::within(run.silence(), "its reading the role of a connection");
    let mut role = Vec::new();
    role.put(&ROLE_FAULT);
    peer.send_bytes(&role, run, wait).map_err(|lost| lost.explain(WHO, "a fault connection"))?;
    let (over, ended) = (AtomicBool::new(false), AtomicBool::new(false));
    let served = thread::scope(|scope| {
        // The first requests come before State is answered.
        let serve = || {
            let served = faults.serve(&peer, run, &ended);
            over.store(true, Ordering::Release);
            served
        };
        let thread = thread::Builder::new().name("faults".to_owned()).spawn_scoped(scope, serve);
        let thread = thread.map_err(PagerError::system("start a thread"))?;
        let given = (|| {
            giving.state(guest.state())?;
            wait_for_requests(faults, &over, run)?;
            giving.complete(guest.is_paused()).map_err(explain)
        })();
        if let Err(error) = given {
            ended.store(true, Ordering::Relaxed);
            // Abandon has been sent, and the fault connection is of no use.
            let _ = rustix::net::shutdown(&peer, rustix::net::Shutdown::Both);
            let _ = thread.join();
            return Err(error);
        }
        report.event("running", &json!({ "paused": guest.is_paused() }));
        Ok(thread.join().unwrap_or_else(|_| {
            Served::Failed(PagerError::Peer("the thread that serves pages has panicked".to_owned()))
        }))
    })?;
    if let Served::Failed(error) = served {
        let lost = "the guest was running, and has not got all of its memory: it ends when it touches what is \
                    missing, and cannot be saved. Restore it again from the image";
        return Err(match error {
            PagerError::TimedOut { what, after } => {
                PagerError::TimedOut { what: format!("{what}; {lost}"), after }
            }
            error => PagerError::Peer(format!("{error}; {lost}")),
        });
    }
    if guest.is_paused() {
        faults.punch()?;
    }
    let inflated = faults.metrics.inflated() * TARGET_PAGE_SIZE;
    if inflated != 0 {
        report.warn(&format!(
            "Cloud Hypervisor asked for memory that the image does not have: {inflated} bytes of zeros were \
             allocated; --eager leaves them holes"
        ));
    }
    Ok(())
}

/// Waits until a page was asked for, which a Cloud Hypervisor does before it answers State if it takes memory on
/// demand. One that does not closes the connection, and would run the guest on zeros.
fn wait_for_requests(faults: &Faults<'_>, over: &AtomicBool, run: &Run) -> Result<(), PagerError> {
    let begun = Instant::now();
    while faults.requests.load(Ordering::Relaxed) == 0 {
        run.check("no page was asked for")?;
        let bound = run.silence();
        if over.load(Ordering::Acquire) && faults.requests.load(Ordering::Relaxed) == 0
            || begun.elapsed() >= bound
        {
            return Err(PagerError::Peer(format!(
                "{WHO} asks for no memory: start receive-migration with memory_mode=postcopy, or restore with \
                 --eager"
            )));
        }
        thread::sleep(POLL.min(Duration::from_millis(1)));
    }
    Ok(())
}
