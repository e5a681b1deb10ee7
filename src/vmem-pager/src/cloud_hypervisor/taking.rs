//! The receiving end: takes a guest of Cloud Hypervisor's, up to the request that hands it over.
//!
//! Whatever fails, the answer is Error: then, and when the connection ends, Cloud Hypervisor has its guest
//! run on. Only the Ok to Complete or CompletePaused makes it end.

use std::collections::BTreeMap;
use std::fs::File;

use super::channel::{Lost, Peer, Wait};
use super::layout::{Layout, MAPPINGS_MAX};
use super::protocol::{Answer, Command, Request, Stage};
use super::state::{self, Device};
use crate::error::PagerError;
use crate::run::Run;

/// What the peer is called.
const WHO: &str = "the Cloud Hypervisor that has the guest";

/// A guest whose sender waits to be told whether it was taken.
#[derive(Debug)]
pub struct Taken {
    /// Config, byte for byte.
    pub config: Vec<u8>,
    /// State, byte for byte.
    pub state: Vec<u8>,
    /// Its memory.
    pub layout: Layout,
    /// The files of the mappings, in the order of the layout.
    pub files: Vec<File>,
    /// Its virtio-mem devices, by mapping.
    pub devices: Vec<Option<Device>>,
    /// It was paused before.
    pub paused: bool,
}

/// What is done with a guest while it comes.
pub trait Along {
    /// Config and memory have come; the guest still runs, and its memory is not to be read.
    ///
    /// # Errors
    ///
    /// When the guest cannot be taken.
    fn configured(
        &mut self,
        config: &[u8],
        layout: &Layout,
        files: &[File],
    ) -> Result<(), PagerError>;

    /// State has come, and the guest is paused.
    ///
    /// # Errors
    ///
    /// When the guest cannot be taken.
    fn stated(&mut self, state: &[u8]) -> Result<(), PagerError>;
}

/// Nothing.
#[derive(Debug)]
pub struct Nothing;

impl Along for Nothing {
    fn configured(&mut self, _: &[u8], _: &Layout, _: &[File]) -> Result<(), PagerError> {
        Ok(())
    }

    fn stated(&mut self, _: &[u8]) -> Result<(), PagerError> {
        Ok(())
    }
}

/// Takes a guest. Its sender waits for an answer when this returns: [`accept`] or [`refuse`].
///
/// # Errors
///
/// Why it was not taken. Its sender has been told, and has it run on.
pub fn take(peer: &Peer, run: &Run, along: &mut dyn Along) -> Result<Taken, PagerError> {
    let taken = take_or_wait(peer, run, along);
    if taken.is_err() {
        refuse(peer);
    }
    taken
}

/// As [`take`], with a sender that has not been told of an error: it waits for [`refuse`].
///
/// # Errors
///
/// Why it was not taken.
pub fn take_or_wait(peer: &Peer, run: &Run, along: &mut dyn Along) -> Result<Taken, PagerError> {
    Taking { peer, run }.take(along)
}

/// Tells the sender that its guest was taken: it ends.
///
/// # Errors
///
/// When it could not be told.
pub fn accept(peer: &Peer, run: &Run) -> Result<(), PagerError> {
    let wait = Wait::within(run.silence(), "to read the last answer");
    peer.answer(Answer::Ok, run, wait).map_err(|lost| lost.explain(WHO, "reading the last answer"))
}

/// Tells the sender that its guest was not taken, as far as it can still be told.
pub fn refuse(peer: &Peer) {
    // A run that has ended would not write any more.
    let run = Run::new(None);
    let wait = Wait::within(super::LAST_WORD, "to read that it keeps the guest");
    // The end of the connection says the same.
    let _ = peer.answer(Answer::Error, &run, wait);
}

struct Taking<'a> {
    peer: &'a Peer,
    run: &'a Run,
}

impl Taking<'_> {
    fn take(&self, along: &mut dyn Along) -> Result<Taken, PagerError> {
        let mut stage = Stage::default();
        let mut memory = BTreeMap::new();
        let mut configured = None;
        let mut stated = None;
        loop {
            let request = self.request(stage)?;
            if request.command == Command::Abandon {
                // It is answered Ok, then it is over.
                self.answer(Answer::Ok)?;
                return Err(PagerError::Peer(format!("{WHO} has broken off: it keeps the guest")));
            }
            stage = stage.after(request.command).map_err(protocol)?;
            match request.command {
                Command::MemoryFd => self.memory_fd(&mut memory)?,
                Command::Config => {
                    let config = self.payload(request, "its Config")?;
                    let layout = Layout::parse(&config).map_err(protocol)?;
                    let files = layout.assign(std::mem::take(&mut memory)).map_err(protocol)?;
                    along.configured(&config, &layout, &files)?;
                    configured = Some((config, layout, files));
                }
                Command::State => {
                    let state = self.payload(request, "its State")?;
                    let (_, layout, _) = configured.as_ref().expect("State follows Config");
                    let devices = state::devices(&state, layout).map_err(protocol)?;
                    along.stated(&state)?;
                    stated = Some((state, devices));
                }
                Command::Complete | Command::CompletePaused => {
                    let paused = request.command == Command::CompletePaused;
                    let (config, layout, files) = configured.expect("Complete follows Config");
                    let (state, devices) = stated.expect("Complete follows State");
                    return Ok(Taken { config, state, layout, files, devices, paused });
                }
                _ => {}
            }
            self.answer(Answer::Ok)?;
        }
    }

    fn request(&self, stage: Stage) -> Result<Request, PagerError> {
        let what = match stage {
            Stage::Connected => "Start",
            Stage::Started => "MemoryFd or Config",
            Stage::Configured => "State",
            Stage::Stated | Stage::Completed => "Complete",
        };
        let request = self.peer.request(self.run, self.wait(what));
        request.map_err(|lost| explain(lost, what))
    }

    fn payload(&self, request: Request, what: &'static str) -> Result<Vec<u8>, PagerError> {
        let payload = self.peer.payload(request.length, self.run, self.wait(what));
        payload.map_err(|lost| explain(lost, what))
    }

    fn memory_fd(&self, memory: &mut BTreeMap<u32, File>) -> Result<(), PagerError> {
        let what = "a descriptor of its memory";
        let slot = self.peer.slot(self.run, self.wait(what));
        let (slot, file) = slot.map_err(|lost| explain(lost, what))?;
        let Some(file) = file else {
            return Err(protocol(format!(
                "slot {slot} came with no descriptor, or with more than one; expected one, in the message \
                 of the slot"
            )));
        };
        if memory.len() == MAPPINGS_MAX {
            return Err(protocol(format!("more than {MAPPINGS_MAX} mappings")));
        }
        match memory.insert(slot, file) {
            None => Ok(()),
            Some(_) => Err(protocol(format!("slot {slot} came twice"))),
        }
    }

    fn answer(&self, answer: Answer) -> Result<(), PagerError> {
        let what = "reading an answer";
        self.peer.answer(answer, self.run, self.wait(what)).map_err(|lost| explain(lost, what))
    }

    fn wait(&self, what: &'static str) -> Wait<'static> {
        Wait::within(self.run.silence(), what)
    }
}

fn explain(lost: Lost, what: &str) -> PagerError {
    lost.explain(WHO, what)
}

fn protocol(what: String) -> PagerError {
    PagerError::Protocol(format!("{WHO}: {what}"))
}
