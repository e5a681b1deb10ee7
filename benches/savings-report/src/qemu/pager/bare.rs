//! What a lazy restore cannot beat: a writer that has the records of all pages ready in memory, and sends them to QEMU
//! as fast as it takes them. It answers requests, since the guest needs that, and does nothing else.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use migration::stream::{PageHeader, PageKind, ReturnMessage};
use real_guest::pager::vm::Vm;
use serde_json::json;
use vmem_pager::image::{GuestImage, PageReader};
use vmem_pager::qemu::restore::preamble;
use vmstate::wire::{WireReader, WireWrite};

use crate::units::PAGE;

/// A record of a page that continues its block: header and content.
const RECORD: usize = PageHeader::LEN + PAGE as usize;
/// Nothing takes longer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Records that are taken at a time.
const BATCH: usize = 64;

/// A guest, ready to be sent.
pub struct Bare {
    image: GuestImage,
    blocks: Vec<Block>,
}

/// The pages of a RAM block, each sent by who takes it first.
struct Block {
    /// One behind the other, ascending.
    records: Vec<u8>,
    /// The place in `records` of each page.
    places: HashMap<u64, usize>,
    taken: Vec<AtomicBool>,
}

impl Bare {
    /// Reads all of an image.
    pub fn read(path: &Path) -> Result<Self> {
        let image = GuestImage::open(path)?;
        let mut reader = PageReader::new(&image);
        let mut blocks = Vec::new();
        for block in image.blocks() {
            let (mut records, mut places) = (Vec::new(), HashMap::new());
            records.reserve(block.present().count() as usize * RECORD);
            for run in block.present().runs(0..block.nr_pages()) {
                reader.read(block, run, |page, content| {
                    places.insert(page, places.len());
                    records.put_be64(PageHeader::page_word(PageKind::Normal, page * PAGE, true));
                    records.put(content.unwrap_or(&[0; PAGE as usize]));
                })?;
            }
            let taken = (0..places.len()).map(|_| AtomicBool::new(false)).collect();
            blocks.push(Block { records, places, taken });
        }
        drop(reader);
        Ok(Self { image, blocks })
    }

    /// Has QEMU wait for the guest at `socket`.
    pub fn prepare(vm: &mut Vm, socket: &Path) -> Result<()> {
        vm.set_capabilities(&[("postcopy-ram", true), ("postcopy-preempt", true)])?;
        let uri = format!("unix:{}", socket.display());
        vm.qmp.execute("migrate-incoming", &json!({ "uri": uri })).map(drop)
    }

    /// Sends everything to QEMU, which waits at `socket`, until it says that it has it.
    pub fn send(&self, socket: &Path) -> Result<()> {
        let mut main = UnixStream::connect(socket)?;
        main.set_read_timeout(Some(PATIENCE))?;
        let mut back = WireReader::new(main.try_clone()?);
        let mut bytes = Vec::new();
        preamble::put_start(&mut bytes, &self.image);
        main.write_all(&bytes)?;
        let first = ReturnMessage::read(&mut back)?;
        ensure!(first == ReturnMessage::Pong(preamble::PING_FIRST), "QEMU sent {first:?}");
        let urgent = UnixStream::connect(socket)?;
        bytes.clear();
        preamble::put_advise(&mut bytes);
        preamble::put_setup(&mut bytes, &self.image);
        preamble::put_discard(&mut bytes, &self.image);
        preamble::put_package(&mut bytes, &self.image);
        preamble::put_pages_start(&mut bytes, &self.image);
        thread::scope(|scope| {
            let answering = scope.spawn(|| self.answer(back, urgent));
            main.write_all(&bytes)?;
            self.push(&mut main)?;
            bytes.clear();
            preamble::put_pages_end(&mut bytes, &self.image);
            preamble::put_end(&mut bytes);
            main.write_all(&bytes)?;
            answering.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Sends all that was not asked for before.
    fn push(&self, main: &mut UnixStream) -> Result<()> {
        for (block, of) in self.blocks.iter().zip(self.image.blocks()) {
            let take = |index: &usize| !block.taken[*index].swap(true, Ordering::Relaxed);
            let mut is_first = true;
            let mut next = 0;
            while let Some(start) = (next..block.taken.len()).find(take) {
                let end = block.taken.len().min(start + BATCH);
                let end = (start + 1..end).find(|index| !take(index)).unwrap_or(end);
                next = end;
                let records = &block.records[start * RECORD..end * RECORD];
                if is_first {
                    main.write_all(&named(records, of.id()))?;
                } else {
                    main.write_all(records)?;
                }
                is_first = false;
            }
        }
        Ok(())
    }

    /// Answers requests until QEMU has everything.
    fn answer(&self, mut back: WireReader<UnixStream>, mut urgent: UnixStream) -> Result<()> {
        let (mut asked, mut current) = (None, None);
        let mut zeros = HashSet::new();
        loop {
            let (id, start) = match ReturnMessage::read(&mut back)? {
                ReturnMessage::RequestPages { block, start, .. } => (block, start),
                ReturnMessage::Pong(_) => continue,
                ReturnMessage::Shut(0) => return Ok(()),
                other => anyhow::bail!("QEMU sent {other:?}"),
            };
            if let Some(id) = id {
                asked = self.image.blocks().iter().position(|block| block.id() == id);
            }
            let index = asked.context("a page of no block")?;
            let block = &self.blocks[index];
            let record = match block.places.get(&(start / PAGE)) {
                Some(place) if block.taken[*place].swap(true, Ordering::Relaxed) => continue,
                Some(place) => block.records[place * RECORD..][..RECORD].to_vec(),
                None if !zeros.insert((index, start)) => continue,
                None => {
                    let mut record = Vec::new();
                    record.put_be64(PageHeader::page_word(PageKind::Zero, start, true));
                    record.put_u8(0);
                    record
                }
            };
            let of = &self.image.blocks()[index];
            let is_other = current.replace(index) != Some(index);
            let record = if is_other { named(&record, of.id()) } else { record };
            if let Err(error) = urgent.write_all(&record) {
                // QEMU closes it before it says that it has everything.
                ensure!(error.kind() == std::io::ErrorKind::BrokenPipe, error);
            }
        }
    }
}

/// Records, of which the first tells its block.
fn named(records: &[u8], id: &str) -> Vec<u8> {
    /// In the last byte of a header: it continues the block before.
    const CONTINUED: u8 = 0x20;
    let mut bytes = records[..PageHeader::LEN].to_vec();
    bytes[PageHeader::LEN - 1] &= !CONTINUED;
    bytes.put_name(id);
    bytes.put(&records[PageHeader::LEN..]);
    bytes
}
