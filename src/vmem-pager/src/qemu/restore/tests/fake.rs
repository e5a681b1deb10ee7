//! A destination that does what tests tell it to, good or bad.

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migration::stream::{
    BlockList, Command, Configuration, ListLimits, PageHeader, PageKind, ReturnMessage,
    TARGET_PAGE_SIZE, put_command, put_end_of_section, put_footer, put_header,
};
use parking_lot::Mutex;
use vmstate::wire::{WireRead, WireReader, WireWrite};

use crate::image::reader::sample::Sample;

const PAGE: u64 = TARGET_PAGE_SIZE;
/// Nothing that is waited for takes longer.
const PATIENCE: Duration = Duration::from_secs(30);

/// What arrived, by block and page.
#[derive(Debug, Default)]
pub struct Placed {
    pub pages: HashMap<(String, u64), Vec<u8>>,
    /// In their order on the main channel.
    pub order: Vec<(String, u64)>,
    /// Pages that came twice.
    pub twice: Vec<(String, u64)>,
    /// The main stream has ended as it should.
    pub ended: bool,
}

/// Where the pager connects.
pub struct Fake {
    listener: UnixListener,
    pub placed: Arc<Mutex<Placed>>,
}

/// One connection of the main channel.
pub struct Main {
    reader: Option<WireReader<UnixStream>>,
    pub back: UnixStream,
    pub placed: Arc<Mutex<Placed>>,
}

impl Fake {
    pub fn listen(dir: &Path) -> Self {
        let listener = UnixListener::bind(dir.join("vm.sock")).unwrap();
        Self { listener, placed: Arc::default() }
    }

    pub fn accept(&self) -> UnixStream {
        let stream = self.listener.accept().unwrap().0;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    pub fn accept_main(&self) -> Main {
        let stream = self.accept();
        let back = stream.try_clone().unwrap();
        let reader = Some(WireReader::new(stream));
        Main { reader, back, placed: Arc::clone(&self.placed) }
    }

    /// Accepts the channel of pages that are waited for, and places what comes there.
    pub fn accept_urgent(&self) -> JoinHandle<()> {
        let stream = self.accept();
        let placed = Arc::clone(&self.placed);
        thread::spawn(move || {
            let mut reader = WireReader::new(stream);
            let mut block = None;
            while !reader.is_at_end().unwrap_or(true) {
                let header = record(&mut reader, &mut block, &placed, false);
                assert!(
                    matches!(header, PageHeader::Page { .. }),
                    "{header:?} on the urgent channel"
                );
            }
        })
    }

    /// Goes through all that comes before pages, with the second connection.
    pub fn load(&self, sample: &Sample) -> (Main, JoinHandle<()>) {
        let mut main = self.accept_main();
        main.greet();
        main.setup(sample);
        // It listens once this is there.
        let urgent = self.accept_urgent();
        main.say(&ReturnMessage::Pong(4));
        (main, urgent)
    }

    /// The same for a pager that knows of the second connection.
    pub fn load_known(&self, sample: &Sample) -> (Main, JoinHandle<()>) {
        let mut main = self.accept_main();
        main.greet();
        let urgent = self.accept_urgent();
        main.setup(sample);
        (main, urgent)
    }

    /// What arrived, without the one page of zeros at most that was only there to see whether the second
    /// connection is read.
    pub fn pages_without_probe(
        &self,
        expected: &HashMap<(String, u64), Vec<u8>>,
    ) -> HashMap<(String, u64), Vec<u8>> {
        let mut pages = self.placed.lock().pages.clone();
        let more = pages.keys().filter(|page| !expected.contains_key(*page));
        let more: Vec<_> = more.cloned().collect();
        if let [(block, page)] = &more[..] {
            let probe = pages.remove(&(block.clone(), *page));
            assert!(block == "ram" && probe.is_some_and(|bytes| bytes == vec![0; PAGE as usize]));
        }
        pages
    }

    pub fn has(&self, block: &str, page: u64) -> bool {
        self.placed.lock().pages.contains_key(&(block.to_owned(), page))
    }

    pub fn wait_for(&self, block: &str, page: u64) {
        let begun = Instant::now();
        while !self.has(block, page) {
            assert!(begun.elapsed() < PATIENCE, "page {page} of {block} does not come");
            thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn wait_ended(&self) {
        let begun = Instant::now();
        while !self.placed.lock().ended {
            assert!(begun.elapsed() < PATIENCE, "the stream does not end");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Main {
    /// The next bytes, which must be these.
    pub fn expect(&mut self, expected: &[u8], what: &str) {
        let mut found = vec![0; expected.len()];
        self.reader.as_mut().unwrap().read_exact(&mut found, "bytes").unwrap();
        assert_eq!(found, expected, "{what}");
    }

    pub fn say(&mut self, message: &ReturnMessage) {
        let mut bytes = Vec::new();
        message.put(&mut bytes);
        // The pager may have gone, which is what some tests are about.
        let _ = self.back.write_all(&bytes);
    }

    pub fn ask(&mut self, block: Option<&str>, page: u64) {
        let (block, start, len) = (block.map(str::to_owned), page * PAGE, PAGE as u32);
        self.say(&ReturnMessage::RequestPages { block, start, len });
    }

    /// Header, return path and the first PING.
    pub fn greet(&mut self) {
        let mut expected = Vec::new();
        put_header(&mut expected, &Configuration::new("pc-q35-11.1"));
        expected.extend(b"\x08\0\x01\0\0\x08\0\x02\0\x04\0\0\0\x01");
        self.expect(&expected, "header, OPEN_RETURN_PATH, PING 1");
        self.say(&ReturnMessage::Pong(1));
    }

    /// ADVISE, early sections, the list of blocks, a discard, and the package.
    pub fn setup(&mut self, sample: &Sample) {
        self.expect(b"\x08\0\x03\0\x10\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x10\0", "ADVISE");
        self.blocks(sample);
        let id = &sample.blocks[0].id;
        let mut discard = b"\x08\0\x06\0".to_vec();
        discard.put_u8(3 + id.len() as u8 + 16);
        discard.put_u8(0);
        discard.put_name(id);
        discard.put_u8(0);
        discard.put_be64(0);
        discard.put_be64(PAGE);
        self.expect(&discard, "RAM_DISCARD");
        let mut package = b"\x08\0\x04\0\0\x08\0\x02\0\x04\0\0\0\x04".to_vec();
        package.extend(sample.device_state());
        package.extend(b"\x08\0\x02\0\x04\0\0\0\x03\x08\0\x02\0\x04\0\0\0\x42\x08\0\x05\0\0");
        let mut command = b"\x08\0\x07\0\x04".to_vec();
        command.put_be32(package.len() as u32);
        command.extend(package);
        self.expect(b"\x08\0\x02\0\x04\0\0\0\x05", "PING 5");
        self.expect(&command, "PACKAGED");
        self.say(&ReturnMessage::Pong(5));
    }

    pub fn blocks(&mut self, sample: &Sample) {
        self.expect(&sample.early(), "early sections");
        self.expect(b"\x01\0\0\0\x07\x03ram\0\0\0\0\0\0\0\x04", "RAM START");
        let reader = self.reader.as_mut().unwrap();
        let header = PageHeader::parse(reader.be64("a list").unwrap(), 0).unwrap();
        let PageHeader::List { total } = header else { panic!("{header:?}") };
        let list =
            BlockList::read(reader, total, ListLimits::default(), &mut |_, _| Ok(())).unwrap();
        let found: Vec<_> = list.entries.iter().map(|e| (e.id.clone(), e.used_length)).collect();
        let blocks = sample.blocks.iter().map(|block| (block.id.clone(), block.pages * PAGE));
        assert_eq!(found, blocks.collect::<Vec<_>>());
        let mut end = Vec::new();
        put_end_of_section(&mut end);
        put_footer(&mut end, 7);
        self.expect(&end, "the end of RAM START");
    }

    /// Places all pages, up to the end of the stream or the channel.
    pub fn place(&mut self) -> JoinHandle<()> {
        let mut reader = self.reader.take().unwrap();
        let placed = Arc::clone(&self.placed);
        thread::spawn(move || place_all(&mut reader, &placed))
    }

    /// Places pages up to the end of RAM, and gives the rest of the stream.
    pub fn place_eager(&mut self) -> WireReader<UnixStream> {
        let mut reader = self.reader.take().unwrap();
        assert!(
            place_section(&mut reader, 2, &self.placed)
                && place_section(&mut reader, 3, &self.placed)
        );
        reader
    }

    /// Answers what was received of a block.
    pub fn tell_received(&mut self, block: &str, pages: u64, received: &[u64]) {
        let mut expected = Vec::new();
        put_command(&mut expected, &Command::RecvBitmap { block: block.to_owned() });
        self.expect(&expected, "RECV_BITMAP");
        tell_received(&mut self.back, block, pages, received);
    }

    /// Tells what is placed of each block, and resumes.
    pub fn resume(&mut self, sample: &Sample) {
        for block in &sample.blocks {
            let received: Vec<u64> = {
                let placed = self.placed.lock();
                let of_block = placed.pages.keys().filter(|(id, _)| *id == block.id);
                of_block.map(|(_, page)| *page).collect()
            };
            self.tell_received(&block.id, block.pages, &received);
        }
    }

    pub fn resumed(&mut self) {
        self.expect(b"\x08\0\x02\0\x04\0\0\0\x05", "PING 5");
        self.expect(b"\x08\0\x09\0\0\x08\0\x02\0\x04\0\0\0\x04", "RESUME, PING 4");
        self.say(&ReturnMessage::Pong(5));
        self.say(&ReturnMessage::ResumeAck);
    }
}

fn tell_received(back: &mut UnixStream, block: &str, pages: u64, received: &[u64]) {
    let mut bytes = Vec::new();
    ReturnMessage::RecvBitmap { block: block.to_owned() }.put(&mut bytes);
    let mut bitmap = vec![0u8; pages.div_ceil(64) as usize * 8];
    received.iter().for_each(|page| bitmap[*page as usize / 8] |= 1 << (page % 8));
    bytes.put_be64(bitmap.len() as u64);
    bytes.extend(bitmap);
    bytes.put_be64(0x0123_4567_89ab_cdef);
    // The pager may have gone.
    let _ = back.write_all(&bytes);
}

fn place_all(reader: &mut WireReader<UnixStream>, placed: &Mutex<Placed>) {
    if place_section(reader, 2, placed)
        && place_section(reader, 3, placed)
        && reader.u8("the end").is_ok_and(|end| end == 0)
    {
        placed.lock().ended = true;
    }
}

/// Places the pages of a section; false when the channel ends before.
fn place_section(reader: &mut WireReader<UnixStream>, kind: u8, placed: &Mutex<Placed>) -> bool {
    let Ok(found) = reader.u8("a section") else { return false };
    assert_eq!((found, reader.be32("its id").unwrap()), (kind, 7));
    let mut block = None;
    loop {
        if reader.peek(8, "a page").is_err() {
            return false;
        }
        let is_whole = |reader: &mut WireReader<UnixStream>| {
            let word = u64::from_be_bytes(reader.peek(8, "a page").unwrap().try_into().unwrap());
            let len = if word & 0x08 != 0 { 8 + PAGE as usize } else { 8 };
            reader.peek(len, "a page").is_ok()
        };
        if !is_whole(reader) {
            return false;
        }
        if record(reader, &mut block, placed, true) == PageHeader::EndOfSection {
            let mut footer = Vec::new();
            put_footer(&mut footer, 7);
            let mut found = [0; 5];
            return reader.read_exact(&mut found, "a footer").is_ok_and(|()| found == footer[..]);
        }
    }
}

/// Places a page.
fn record(
    reader: &mut WireReader<UnixStream>,
    block: &mut Option<String>,
    placed: &Mutex<Placed>,
    main: bool,
) -> PageHeader {
    let Ok(word) = reader.be64("a page") else { return PageHeader::Flush };
    let header = PageHeader::parse(word, 0).unwrap();
    let PageHeader::Page { kind, offset, continued } = header else { return header };
    if !continued {
        *block = Some(reader.name("a block").unwrap());
    }
    let mut bytes = vec![0; PAGE as usize];
    match kind {
        PageKind::Normal => match reader.read_exact(&mut bytes, "a page") {
            Ok(()) => {}
            // The pager died within it.
            Err(_) => return header,
        },
        PageKind::Zero => assert_eq!(reader.u8("a fill").unwrap(), 0),
    }
    let key = (block.clone().expect("a block was named"), offset / PAGE);
    let mut placed = placed.lock();
    if main {
        placed.order.push(key.clone());
    }
    if placed.pages.insert(key.clone(), bytes).is_some() {
        placed.twice.push(key);
    }
    header
}
