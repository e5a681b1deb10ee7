//! What becomes of a stream, in this process: against a model that keeps the last of each page.

mod common;

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;

use common::image;
use common::source::{DESCRIPTION, PAGE, Source, content, state};
use migration::Progress;
use migration::stream::{Command, ReturnMessage, SectionKind};
use proptest::prelude::*;
use vmem_pager::PagerError;
use vmem_pager::image::writer::WholeImage;
use vmem_pager::qemu::save::receive_stream;

const RAM: (&str, u64) = ("ram", 1 << 20);
const REGION: (&str, u64) = ("0000:00:01.0/vmem", 2 << 20);
const BLOCK: u64 = 1 << 18;
const BLOCKS: [(&str, u64); 3] = [REGION, RAM, ("pc.rom", 4096)];

fn receive(bytes: &[u8]) -> Result<WholeImage, PagerError> {
    receive_from(bytes).0
}

fn receive_from(stream: impl Read) -> (Result<WholeImage, PagerError>, Vec<ReturnMessage>) {
    let dir = tempfile::tempdir().unwrap();
    let received =
        receive_stream(stream, Vec::new(), &dir.path().join("image"), &Arc::new(Progress::new()));
    assert!(common::process::names(dir.path()).is_empty(), "an image has its name too early");
    received
}

fn refused(source: &Source) -> String {
    let error = receive(&source.bytes).unwrap_err();
    assert_eq!(error.exit_status(), 1, "{error}");
    error.to_string()
}

fn whole() -> Source {
    Source::new().ram(&BLOCKS)
}

/// One thing that a source sends.
#[derive(Clone, Debug)]
enum Sent {
    Page {
        block: usize,
        page: u64,
        seed: Option<u8>,
    },
    /// The section ends, and the next begins.
    Section,
    /// A command among the sections.
    Command(Command),
}

fn sent() -> impl Strategy<Value = Sent> {
    let page = (0usize..3, any::<prop::sample::Index>(), prop::option::weighted(0.7, any::<u8>()));
    prop_oneof![
        12 => page.prop_map(|(block, page, seed)| {
            // Few, so that they come again.
            let pages = (BLOCKS[block].1 / PAGE as u64).min(200);
            Sent::Page { block, page: page.index(pages as usize) as u64, seed }
        }),
        2 => Just(Sent::Section),
        1 => prop_oneof![Just(Command::Ping(5)), Just(Command::SwitchoverStart)].prop_map(Sent::Command),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn the_last_of_each_page_is_in_the_image_and_nothing_of_discarded_memory(
        all in prop::collection::vec(sent(), 0..60),
        plugged in prop::collection::btree_set(0u64..8, 0..8),
    ) {
        let plugged: Vec<u64> = plugged.into_iter().collect();
        let mut source = Source::new()
            .device("0000:00:01.0", REGION.1, BLOCK, &plugged)
            .ram(&BLOCKS)
            .section(SectionKind::Part);
        let mut model: BTreeMap<(String, u64), Vec<u8>> = BTreeMap::new();
        for one in &all {
            source = match one {
                Sent::Page { block, page, seed } => {
                    let (id, offset) = (BLOCKS[*block].0, page * PAGE as u64);
                    let key = (id.to_owned(), *page);
                    let is_discarded = *block == 0 && !plugged.contains(&(offset / BLOCK));
                    match seed {
                        Some(seed) if !is_discarded => drop(model.insert(key, content(*seed).into())),
                        _ => drop(model.remove(&key)),
                    }
                    source.page(id, offset, seed.map(content).as_ref().map(|page| &page[..]))
                }
                Sent::Section => source.end_section().section(SectionKind::Part),
                Sent::Command(command) => {
                    source.end_section().command(command).section(SectionKind::Part)
                }
            };
        }
        let source = source.end_section().end(&state());
        let image = receive(&source.bytes).unwrap();
        prop_assert_eq!(image::pages(image.file()), model);
        prop_assert_eq!(image::held_for_nothing(image.file()), []);
    }

    #[test]
    fn bytes_that_are_changed_are_refused_or_taken_and_never_more(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        return_path: bool,
    ) {
        let source = if return_path { Source::new().return_path() } else { Source::new() };
        let source = source
            .device("0000:00:01.0", REGION.1, BLOCK, &[0, 1])
            .ram(&BLOCKS)
            .section(SectionKind::Part)
            .page("ram", 0, None)
            .page("ram", 4096, Some(&content(1)))
            .page(REGION.0, 4096, None)
            .end_section();
        let mut bytes = source.end(&state()).bytes;
        // The content of the page says nothing.
        let header = bytes.windows(PAGE).position(|page| page == content(1)).unwrap();
        for (at, byte) in changes {
            let at = at.index(bytes.len() - PAGE);
            let at = if at < header { at } else { at + PAGE };
            bytes[at] = byte;
        }
        let _ = receive(&bytes);
    }
}

#[test]
fn a_stream_that_is_cut_anywhere_gives_no_image() {
    let source = Source::new()
        .return_path()
        .device("0000:00:01.0", REGION.1, BLOCK, &[0])
        .ram(&BLOCKS)
        .section(SectionKind::Part)
        .page("ram", 0, None)
        .page("ram", 4096, None)
        .end_section();
    let bytes = source.end(&state()).bytes;
    for cut in 0..bytes.len() {
        assert!(receive(&bytes[..cut]).is_err(), "cut at {cut}");
    }
    receive(&bytes).unwrap();
}

#[test]
fn what_stands_around_ram_is_kept_byte_for_byte() {
    let early = Source::new().device("0000:00:01.0", REGION.1, BLOCK, &[0, 3, 7]);
    let header = Source::new().bytes;
    let state = state();
    let source = early.clone().ram(&BLOCKS).end(&state);
    let image = receive(&source.bytes).unwrap();
    let bytes = image::bytes(image.file());
    let find = |part: &[u8]| bytes.windows(part.len()).position(|bytes| bytes == part);
    let section = &early.bytes[header.len()..];
    assert!(find(section).is_some_and(|at| at > header.len()));
    let at = find(&state).expect("state is there");
    // END of RAM before it; the end of the stream and the description after it.
    assert_eq!(bytes[at - 18], 0x03);
    assert_eq!(bytes[at + state.len()..][..2], [0, 6]);
    let text = String::from_utf8_lossy(&bytes[at + state.len() + 6..]).into_owned();
    assert!(text.contains("mapped-ram") || text.contains("configuration/capabilities"), "{text}");
    let rest = DESCRIPTION.split_once("fields\": []}").unwrap().1;
    assert!(text.ends_with(rest), "{text}");
    let seen = image::look(image.file());
    assert_eq!(seen.configuration.machine, "pc-q35-11.1");
    assert_eq!(seen.configuration.capabilities, ["mapped-ram"]);
    assert_eq!(seen.virtio_mem[0].plugged().count(), 3);
}

#[test]
fn pages_in_discarded_memory_are_told_and_left_out() {
    let source = Source::new()
        .device("0000:00:01.0", REGION.1, BLOCK, &[1])
        .ram(&BLOCKS)
        .section(SectionKind::Part)
        .page(REGION.0, BLOCK - PAGE as u64, Some(&content(1)))
        .page(REGION.0, BLOCK, Some(&content(2)))
        .page(REGION.0, 2 * BLOCK, None)
        .end_section();
    let image = receive(&source.end(&state()).bytes).unwrap();
    assert_eq!(image.strays(), [(REGION.0, BLOCK - PAGE as u64)]);
    let only = BTreeMap::from([((REGION.0.to_owned(), BLOCK / PAGE as u64), content(2).into())]);
    assert_eq!(image::pages(image.file()), only);
}

#[test]
fn a_page_that_becomes_zeros_takes_no_room_in_the_file() {
    use std::os::unix::fs::MetadataExt;
    let page = |seed: Option<u8>| {
        let mut source = whole().section(SectionKind::Part);
        for index in 0..128 {
            source = source.page("ram", index * 4096, Some(&content(1)));
        }
        for index in 0..128 {
            source =
                source.page("ram", index * 4096, seed.map(content).as_ref().map(|page| &page[..]));
        }
        let image = receive(&source.end_section().end(&state()).bytes).unwrap();
        (image.file().metadata().unwrap().blocks() * 512, image::pages(image.file()).len())
    };
    let ((with, pages), (without, none)) = (page(Some(2)), page(None));
    assert_eq!((pages, none), (128, 0));
    assert!(with >= without + 128 * 4096, "{with} {without}");
}

#[test]
fn pings_are_answered_where_the_source_listens() {
    let source = Source::new().command(&Command::Ping(7)).return_path().ram(&BLOCKS);
    let (image, replies) = receive_from(&source.end(&state()).bytes[..]);
    assert_eq!(replies, [ReturnMessage::Pong(1)]);
    // With a return path, a source that closes before it is told has left.
    image.unwrap();
}

#[test]
fn pages_that_are_impossible_are_refused() {
    let part = || whole().section(SectionKind::Part);
    let cases = [
        (part().page("ram", RAM.1, None), "past its end"),
        (part().page("ram", u64::MAX << 12, Some(&content(1))), "past its end"),
        (part().page("rom", 0, None), "\"rom\" that is not in the list"),
        (part().page("\u{1b}[31m", 0, None), r"\u{1b}"),
    ];
    for (source, why) in cases {
        let error = refused(&source.end_section().end(&state()));
        assert!(error.contains(why) && error.contains("of the stream"), "{error}");
    }
    let mut first = part();
    first.put_page("ram", 0, None, true);
    assert!(refused(&first.end_section()).contains("continues"));
    let mut filled = part();
    filled.put_page("ram", 0, Some(&[7]), false);
    let word = filled.bytes.len() - 13;
    filled.bytes[word + 7] = 0x02;
    filled.bytes[word + 6] = 0;
    let error = refused(&filled);
    assert!(error.contains("filled with 0x7"), "{error}");
}

#[test]
fn lists_of_blocks_that_are_impossible_are_refused() {
    let mut twice = whole().section(SectionKind::Part);
    twice.bytes.extend((0x1000u64 | 4).to_be_bytes());
    assert!(refused(&twice).contains("second list of RAM blocks"));
    let mut again = whole();
    again.put_ram(&BLOCKS);
    assert!(refused(&again.end_section()).contains("ram"));
    assert!(refused(&Source::new().ram(&[("a", 4096), ("a", 4096)])).contains("twice"));
    let large = refused(&Source::new().ram(&[("a", 1 << 50)]));
    assert!(large.contains("no guest with more"), "{large}");
    let sum = refused(&Source::new().ram(&[("a", 40 << 40), ("b", 40 << 40)]));
    assert!(sum.contains("no guest with more"), "{sum}");
    // Many of them, of no size.
    let names: Vec<String> = (0..5000).map(|index| format!("block{index}")).collect();
    let many: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 4096)).collect();
    assert!(refused(&Source::new().ram(&many)).contains("number of RAM blocks"));
}

#[test]
fn what_stands_where_it_cannot_is_refused() {
    let ends = |source: Source| refused(&source.end(&state()));
    assert!(ends(whole().command(&Command::PostcopyRun)).contains("PostcopyRun"));
    assert!(ends(whole().command(&Command::PostcopyResume)).contains("recovery"));
    let bitmap = Command::RecvBitmap { block: "ram".into() };
    assert!(ends(whole().command(&bitmap)).contains("recovery"));
    assert!(ends(Source::new()).contains("an END section with the number 2 before RAM"));
    let stale =
        Command::PostcopyRamDiscard { block: "ram".into(), ranges: vec![(0, RAM.1 + 4096)] };
    assert!(ends(whole().command(&stale)).contains("past its end"));
    let mut cap = Vec::new();
    let shared = migration::stream::Configuration {
        capabilities: vec!["x-ignore-shared".into()],
        ..migration::stream::Configuration::new("q35")
    };
    migration::stream::put_header(&mut cap, &shared);
    // What follows a configuration tells where it ends.
    cap.push(0);
    assert!(receive(&cap).unwrap_err().to_string().contains("x-ignore-shared"));
    assert!(receive(b"GET / HTTP/1.1").unwrap_err().to_string().contains("not a migration stream"));
}

#[test]
fn state_of_devices_without_an_end_is_refused_and_not_kept() {
    let stream = whole().section(SectionKind::End).end_section().bytes;
    let endless = (&stream[..]).chain(std::io::repeat(0x7e));
    let error = receive_from(endless).0.unwrap_err().to_string();
    assert!(error.contains("state of devices"), "{error}");
}

#[test]
fn a_guest_that_is_given_away_in_postcopy_is_taken_whole() {
    let stale = |start, len| Command::PostcopyRamDiscard {
        block: "ram".into(),
        ranges: vec![(start, len)],
    };
    let source = Source::new()
        .return_path()
        .advise()
        .ram(&BLOCKS)
        .section(SectionKind::Part)
        .page("ram", 0, Some(&content(1)))
        .page("ram", 4096, Some(&content(2)))
        .page("ram", 8192, Some(&content(3)))
        .end_section()
        // Pages 1 to 3 come again, or are zeros.
        .command(&stale(4096, 3 * 4096))
        .package(&state())
        .section(SectionKind::Part)
        .page("ram", 8192, Some(&content(4)))
        .page("ram", 12288, None)
        .end_section();
    let (image, replies) = receive_from(&source.end_postcopy().bytes[..]);
    assert_eq!(replies, [1, 3, 0x42].map(ReturnMessage::Pong));
    let image = image.unwrap();
    let page = |page, seed| (("ram".to_owned(), page), content(seed).to_vec());
    assert_eq!(image::pages(image.file()), BTreeMap::from([page(0, 1), page(2, 4)]));
    let bytes = image::bytes(image.file());
    let mut end = state();
    end.push(0);
    assert!(bytes.ends_with(&end));
}

#[test]
fn packages_that_are_impossible_are_refused() {
    let begun = || Source::new().return_path().advise().ram(&BLOCKS);
    let error = refused(&begun().package(&state()).package(&state()));
    assert!(error.contains("a package, of which there is one at most"), "{error}");
    let mut nested = Source::default();
    nested = nested.package(&state());
    let error = refused(&begun().package(&nested.bytes[..4]));
    assert!(error.contains("section of a device"), "{error}");
    let huge = begun().command(&Command::Packaged { len: u32::MAX });
    assert!(refused(&huge).contains("package"));
    assert!(refused(&begun().package(&[])).contains("no section of a device"));
}
