//! Restoring on demand: boot memory is asked for page by page, first what the guest touches, then everything.
//!
//! Cloud Hypervisor asks over a connection of its own, for one page at a time. The page is written to the
//! memory that both share, then the answer is Ok. Between the two nothing but this side writes to the page: each
//! access waits for the answer. A page that was answered is never written with what the image has again: when it
//! is a hole once more, it was discarded, and is made present as zeros.
//!
//! What is not asked for is filled meanwhile, so that what is asked for later is there already.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use migration::page_bitmap::{PageBitmap, pages_touched};
use migration::stream::TARGET_PAGE_SIZE;
use parking_lot::Mutex;
use ram_discard::{ByteRange, GpaRange};
use serde_json::json;
use vmstate::wire::WireWrite;

use super::background::Background;
use super::channel::{Lost, Peer, Wait};
use super::filling::Filling;
use super::giving::{Giving, WHO};
use super::pace::Pace;
use super::protocol::{Answer, Command, ROLE_FAULT};
use super::restore::{Plan, explain};
use super::touches::Touches;
use crate::cli::report::Report;
use crate::error::PagerError;
use crate::image::PageReader;
use crate::run::{POLL, Run};
use crate::socket;
use crate::working_set::WorkingSet;

/// The largest page that is asked for, bytes.
const PAGE_MAX: u64 = 1 << 30;
/// How long after State was answered a page is asked for at the latest, by a host that is very busy.
const FIRST_REQUEST: Duration = Duration::from_secs(10);
/// Pages that follow one that the guest touches, and are filled before others.
const READ_AHEAD: u64 = 16;

/// Serves pages that are asked for.
pub(super) struct Faults<'a> {
    filling: &'a Filling<'a>,
    background: Background<'a>,
    touches: Mutex<Touches>,
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
    /// Of a guest that has nothing yet; `known` was touched before.
    pub fn new(filling: &'a Filling<'a>, known: WorkingSet) -> Self {
        let guest = filling.guest();
        let mappings = 0..guest.layout().mappings.len();
        let pages = |mapping| guest.block(mapping).nr_pages();
        let blocks = mappings.clone().map(|mapping| (guest.block_index(mapping), pages(mapping)));
        Self {
            filling,
            background: Background::new(filling),
            touches: Mutex::new(Touches::new(blocks, known)),
            zeroed: mappings.map(|mapping| Mutex::new(PageBitmap::new(pages(mapping)))).collect(),
            requests: AtomicU64::new(0),
        }
    }

    /// Writes down what the guest has touched, if it has touched anything.
    pub fn record(&self, path: Option<&Path>, report: &Report) {
        let touches = self.touches.lock();
        let path = path.filter(|_| touches.touched().runs().next().is_some());
        let saved = path.map(|path| touches.touched().save(path, self.filling.guest().image()));
        if let Some(Err(error)) = saved {
            report.warn(&error.to_string());
        }
    }

    /// Answers requests until the connection ends. `ended` says why not to wait any longer.
    fn serve(&self, peer: &Peer, run: &Run, ended: &AtomicBool) -> Served {
        let mut reader = PageReader::new(self.filling.guest().image());
        loop {
            // What the guest waits for is not bounded by silence: it may touch nothing for long.
            let wait = Wait::for_the_run("pages were being asked for");
            let (request, range) = match peer.page_request(run, wait, run.silence()) {
                Ok(request) => request,
                Err(lost @ Lost::Invalid(_)) => {
                    return self.fail(peer, lost.explain(WHO, "a request for a page"));
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
            let word =
                |at: usize| u64::from_le_bytes(range[at..at + 8].try_into().expect("8 bytes"));
            let (gpa, len) = (word(0), word(8));
            if let Err(error) = self.make_present(&mut reader, gpa, len) {
                return self.fail(peer, error);
            }
            self.requests.fetch_add(1, Ordering::Relaxed);
            let wait = Wait::within(run.silence(), "its reading an answer");
            match peer.answer(Answer::Ok, run, wait) {
                Ok(()) => self.filling.metrics().answered(begun.elapsed()),
                Err(lost) => return Served::Failed(lost.explain(WHO, "reading an answer")),
            }
        }
    }

    /// The requests have ended: every page has to have been asked for.
    fn whole(&self) -> Served {
        let touches = self.touches.lock();
        let mappings = self.filling.guest().layout().mappings.iter().enumerate();
        let left = mappings
            .filter(|(_, mapping)| !mapping.virtio_mem)
            .map(|(index, _)| touches.left(index));
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
    ) -> Result<(), PagerError> {
        let layout = self.filling.guest().layout();
        let whole = len.is_power_of_two()
            && (TARGET_PAGE_SIZE..=PAGE_MAX).contains(&len)
            && gpa.is_multiple_of(len);
        let range = GpaRange::new(gpa, len).filter(|_| whole);
        let found = range.and_then(|range| Some((range, layout.find(range)?)));
        let Some((range, mapping)) = found else {
            return Err(PagerError::Protocol(format!(
                "{WHO} asked for {len:#x} bytes at {gpa:#x}; expected a page of the guest's memory"
            )));
        };
        let offset = range.start() - layout.mappings[mapping].range.start();
        let asked = pages_touched(ByteRange::new(offset, len).expect("a part of the mapping"));
        self.filling.fill_whole(reader, mapping, asked.clone())?;
        // Changes nothing that is there, and makes zeros of what is not: absent pages, zeros of the image, and
        // what was discarded since.
        self.filling.memories()[mapping]
            .make_present(offset, len)
            .map_err(|error| PagerError::System { action: "make memory present", source: error })?;
        if self.touches.lock().asked(mapping, asked.clone()) {
            self.background.read_ahead(mapping, asked.end..asked.end + READ_AHEAD);
        }
        let present = self.filling.guest().block(mapping).present();
        let mut zeroed = self.zeroed[mapping].lock();
        let absent = asked.filter(|page| !present.test(*page));
        let count = absent.filter(|page| zeroed.set(*page)).count();
        self.filling.metrics().zeroed(count as u64);
        Ok(())
    }

    /// Discards absent pages that were made present, of a guest that does not run.
    fn punch(&self) -> Result<(), PagerError> {
        for (index, mapping) in self.filling.guest().layout().mappings.iter().enumerate() {
            if mapping.huge_page.is_some() {
                // Of a huge page, a part that is absent does not matter.
                continue;
            }
            let zeroed = self.zeroed[index].lock();
            let mut count = 0;
            for page in zeroed.runs(0..zeroed.nr_pages()).flatten() {
                // A device may have written to it while State was loaded.
                let discarded =
                    self.filling.memories()[index].discard_zeros(page * TARGET_PAGE_SIZE);
                count += u64::from(discarded.map_err(PagerError::system("discard memory"))?);
            }
            self.filling.metrics().punched(count);
        }
        Ok(())
    }
}

/// Serves a guest that was configured until it has asked for all of its memory.
pub(super) fn restore(
    mut giving: Giving<'_>,
    faults: &Faults<'_>,
    pace: &Pace,
    plan: Plan<'_>,
    run: &Run,
    report: &Report,
) -> Result<(), PagerError> {
    let Plan { guest, address, replay, .. } = plan;
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
        // Without it, everything is filled when it is asked for; and so is what it could not fill.
        let fill = || faults.background.fill(replay, pace, &|| keep_on(&over, &ended, run));
        let builder = thread::Builder::new().name("background".to_owned());
        let _ = builder.spawn_scoped(scope, fill);
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
    let inflated = faults.filling.metrics().inflated() * TARGET_PAGE_SIZE;
    if inflated != 0 {
        report.warn(&format!(
            "Cloud Hypervisor asked for memory that the image does not have: {inflated} bytes of zeros were \
             allocated; --eager leaves them holes"
        ));
    }
    Ok(())
}

/// Whether what was not asked for is still worth being filled.
fn keep_on(over: &AtomicBool, ended: &AtomicBool, run: &Run) -> Result<(), PagerError> {
    run.check("memory was being filled")?;
    match over.load(Ordering::Acquire) || ended.load(Ordering::Relaxed) {
        true => Err(PagerError::Interrupted),
        false => Ok(()),
    }
}

/// Waits until a page was asked for, which a Cloud Hypervisor does before it answers State if it takes memory on
/// demand. One that does not leaves the connection alone, or closes it, and would run the guest on zeros.
fn wait_for_requests(faults: &Faults<'_>, over: &AtomicBool, run: &Run) -> Result<(), PagerError> {
    let begun = Instant::now();
    while faults.requests.load(Ordering::Relaxed) == 0 {
        run.check("no page was asked for")?;
        let bound = run.silence().min(FIRST_REQUEST);
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
