//! A guest that runs once all of its memory is there: what QEMU takes for a plain migration, without the
//! holes that a plain one fills with zeros.

use std::sync::Arc;

use migration::stream::{ReturnMessage, TARGET_PAGE_SIZE, put_description};
use migration::{Bandwidth, Channel};
use serde_json::json;
use vmstate::wire::WireReader;

use super::Transfer;
use super::batch;
use super::lost::{Lost, Stage};
use super::page_writer::PageWriter;
use super::preamble;
use super::supply::Next;
use crate::error::PagerError;
use crate::image::PageReader;
use crate::run::POLL;
use crate::socket;

/// Pages sent at a time.
const BATCH: u64 = 256;

/// A restore of all memory before the guest runs.
pub(super) struct Eager<'a>(pub Transfer<'a>);

impl Eager<'_> {
    /// Sends everything, and waits until QEMU has loaded it.
    ///
    /// # Errors
    ///
    /// When QEMU fails, breaks off, or breaks the protocol.
    pub fn start(&self) -> Result<(), PagerError> {
        let image = self.0.supply.image();
        let lost = Lost { run: self.0.run, stage: Stage::Loading };
        let fd = socket::connect(self.0.address, self.0.run, self.0.report, None)?;
        self.0.figures.begin(image.present_bytes());
        let channel = Channel::new(fd, Arc::clone(&self.0.run.progress));
        let mut channel = channel.map_err(socket::failed("cannot set up", self.0.address))?;
        channel.set_write_patience(self.0.run.silence());
        let mut back = WireReader::new(channel.clone_handle());
        back.get_mut().set_read_patience(Some(self.0.run.silence()));
        self.0.report.event("connected", &json!({ "second_connection": false }));
        // Memory is zeros before anything arrives.
        let mut main = PageWriter::without_zeros(image, channel);
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
        self.0.figures.running();
        self.0.figures.complete();
        Ok(())
    }

    fn send_pages(&self, main: &mut PageWriter<'_>, lost: &Lost<'_>) -> Result<(), PagerError> {
        let mut reader = PageReader::new(self.0.supply.image());
        let mut bandwidth = Bandwidth::new(self.0.bandwidth, main.written());
        loop {
            let pause = bandwidth.spent(main.written());
            let budget = (bandwidth.budget(main.written()) / TARGET_PAGE_SIZE).max(1);
            match self.0.supply.next(BATCH.min(budget), pause.is_zero()) {
                Next::Send(work) => {
                    let from = (self.0.supply, &mut reader);
                    batch::send(work, BATCH.min(budget), from, main, self.0.figures, lost)?;
                }
                Next::Later => {
                    self.0.run.check("memory was being sent")?;
                    self.0.supply.wait(pause.min(POLL));
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
