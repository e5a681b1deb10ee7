//! A guest that runs once all of its memory is there: what QEMU takes for a plain migration, without the
//! holes that a plain one fills with zeros.

use std::sync::Arc;

use migration::stream::{ReturnMessage, TARGET_PAGE_SIZE, put_description};
use migration::{Bandwidth, Channel};
use serde_json::json;
use vmstate::wire::WireReader;

use super::figures::Figures;
use super::lost::{Lost, Stage};
use super::page_writer::PageWriter;
use super::preamble;
use super::supply::{Next, Supply};
use crate::cli::report::Report;
use crate::error::PagerError;
use crate::image::PageReader;
use crate::run::{POLL, Run};
use crate::socket::{self, Address};

/// Pages sent at a time.
const BATCH: u64 = 256;

/// A restore of all memory before the guest runs.
pub(super) struct Eager<'a> {
    pub run: &'a Run,
    pub report: &'a Report,
    pub address: &'a Address,
    pub supply: &'a Supply<'a>,
    pub figures: &'a Figures,
    /// Bytes a second.
    pub bandwidth: Option<u64>,
}

impl Eager<'_> {
    /// Sends everything, and waits until QEMU has loaded it.
    ///
    /// # Errors
    ///
    /// When QEMU fails, breaks off, or breaks the protocol.
    pub fn start(&self) -> Result<(), PagerError> {
        let image = self.supply.image();
        let lost = Lost { run: self.run, stage: Stage::Loading };
        let fd = socket::connect(self.address, self.run, None)?;
        self.figures.begin(image.present_bytes());
        let channel = Channel::new(fd, Arc::clone(&self.run.progress));
        let mut channel = channel.map_err(socket::failed("cannot set up", self.address))?;
        channel.set_write_patience(self.run.silence());
        let mut back = WireReader::new(channel.clone_handle());
        back.get_mut().set_read_patience(Some(self.run.silence()));
        self.report.event("connected", &json!({ "second_connection": false }));
        let mut main = PageWriter::new(image, channel);
        let mut bytes = Vec::new();
        preamble::put_start(&mut bytes, image);
        preamble::put_setup(&mut bytes, image);
        preamble::put_pages_start(&mut bytes, image);
        main.put(&bytes);
        main.send(&lost, "its devices were being sent")?;
        self.send_pages(&mut main, &lost)?;
        bytes.clear();
        preamble::put_pages_end(&mut bytes, image);
        bytes.extend_from_slice(image.device_state());
        preamble::put_end(&mut bytes);
        // It waits for a description, whatever is in it.
        put_description(&mut bytes, b"{}");
        main.put(&bytes);
        main.send(&lost, "its devices were being sent")?;
        self.wait_loaded(&mut back, &lost)?;
        self.figures.running();
        self.figures.complete();
        Ok(())
    }

    fn send_pages(&self, main: &mut PageWriter<'_>, lost: &Lost<'_>) -> Result<(), PagerError> {
        let image = self.supply.image();
        let mut reader = PageReader::new(image);
        let mut bandwidth = Bandwidth::new(self.bandwidth, main.written());
        loop {
            let pause = bandwidth.spent(main.written());
            let budget = (bandwidth.budget(main.written()) / TARGET_PAGE_SIZE).max(1);
            match self.supply.next(BATCH.min(budget), pause.is_zero()) {
                Next::Send(work) => {
                    let count = work.pages.end - work.pages.start;
                    reader.read(&image.blocks()[work.block], work.pages, |page, bytes| {
                        // Memory is zeros before anything arrives.
                        if bytes.is_some() {
                            main.page(work.block, page, bytes);
                        }
                    })?;
                    let bytes = main.send(lost, "memory was being sent")?;
                    self.figures.sent(work.source, count, bytes);
                }
                Next::Later => {
                    self.run.check("memory was being sent")?;
                    self.supply.wait(pause.min(POLL));
                }
                Next::Nothing => return Ok(()),
            }
        }
    }

    fn wait_loaded(
        &self,
        back: &mut WireReader<Channel>,
        lost: &Lost<'_>,
    ) -> Result<(), PagerError> {
        let what = "it was loading the guest";
        loop {
            match ReturnMessage::read(back).map_err(|error| lost.format(what, error))? {
                ReturnMessage::Shut(0) => return Ok(()),
                ReturnMessage::Shut(code) => {
                    return Err(PagerError::Peer(format!(
                        "QEMU could not load the guest (error {code}); {}",
                        lost.guest()
                    )));
                }
                ReturnMessage::Pong(_) => {}
                other => {
                    return Err(PagerError::Protocol(format!(
                        "QEMU sent {other:?} where the end of loading was expected; {}",
                        lost.guest()
                    )));
                }
            }
        }
    }
}
