//! Memory that both sides share (x-ignore-shared).

use super::*;
use crate::handler::LoadHandler;
use crate::stream::{
    CAPABILITY_IGNORE_SHARED, PageHeader, PageKind, RAM_VERSION, SectionKind, put_end_of_section,
    put_list,
};
use vmstate::wire::{WireReader, WireWrite};

fn configuration(capability: bool) -> Configuration {
    let mut configuration = Configuration::new("test");
    if capability {
        configuration.capabilities.push(CAPABILITY_IGNORE_SHARED.to_owned());
    }
    configuration
}

/// A side whose region is a file that the other side has, too.
fn side(region: &File) -> Side {
    let boot = memfd(BLOCK);
    let mut blocks = RamBlocks::new();
    let shared = BlockOptions { shared: true, ..BlockOptions::migratable() };
    blocks.register(Arc::new(migration_block("vmem0", region, 16 * BLOCK, shared))).unwrap();
    let own = BlockOptions::migratable();
    blocks.register(Arc::new(migration_block("ram", &boot, BLOCK, own))).unwrap();
    Side { region: region.try_clone().unwrap(), boot, blocks: Arc::new(blocks), manager: None }
}

/// Migrates with what each side has for the capability, and for the handler of its memory.
fn run(
    from: &Side,
    to: &Side,
    [sent, expected]: [(bool, bool); 2],
) -> (Outcome, Outcome, MigrationInfo) {
    let list = |ignore_shared| ListOptions { ignore_shared, postcopy: false };
    let (near, far) = UnixStream::pair().unwrap();
    let (configured, options) = (configuration(expected.0), list(expected.1));
    let there = receive_with(configured, options, to, &Arc::default(), far);
    let progress = Arc::new(Progress::new());
    let tracker = |_: &MigrationBlock| -> Box<dyn DirtyTracker> { Box::<Script>::default() };
    let ram = RamSave::new(&from.blocks, list(sent.1), Arc::clone(&progress), tracker).unwrap();
    let outgoing = Outgoing {
        parameters: Parameters::new(configuration(sent.0)),
        guest: &Witness::default(),
        handlers: vec![Box::new(ram)],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    let sent = outgoing.run(Channel::new(near, Arc::clone(&progress)).unwrap());
    let sent = sent.map_err(|failed| failed.error);
    (sent, there.join().unwrap(), progress.snapshot())
}

const ON: (bool, bool) = (true, true);
const OFF: (bool, bool) = (false, false);

#[test]
fn shared_memory_is_not_sent_and_stays_as_it_is() {
    let file = memfd(16 * BLOCK);
    fill(&file, 0..100, 7);
    let (from, to) = (side(&file), side(&file));
    fill(&from.boot, 3..5, 5);
    let (sent, received, seen) = run(&from, &to, [ON, ON]);
    sent.unwrap();
    received.unwrap();
    assert_eq!(seen.normal, 2);
    assert_eq!(to.page(99), [7; 4096]);
    assert_eq!(to.resident(), (100, 2));
}

#[test]
fn shared_memory_at_another_address_is_refused_by_name() {
    let file = memfd(16 * BLOCK);
    fill(&file, 0..1, 7);
    let (from, to) = (side(&file), side(&file));
    // The table is asked for each migration anew.
    to.blocks.set_memory_table(|id| (id == "vmem0").then_some(0x2_0000_0000));
    let (_, received, _) = run(&from, &to, [ON, ON]);
    let error = received.unwrap_err().to_string();
    let expected = "RAM block \"vmem0\": address 0x100000000 in the stream, 0x200000000 here";
    assert_eq!(error, expected);
    assert_eq!(to.page(0), [7; 4096]);
    from.blocks.set_memory_table(|id| (id == "vmem0").then_some(0x2_0000_0000));
    let (sent, received, _) = run(&from, &to, [ON, ON]);
    sent.unwrap();
    received.unwrap();
}

#[test]
fn a_handler_that_does_not_do_as_the_capability_says_is_refused() {
    let file = memfd(16 * BLOCK);
    let (from, to) = (side(&file), side(&file));
    let (sent, ..) = run(&from, &to, [(true, false), ON]);
    let error = sent.unwrap_err().to_string();
    assert_eq!(error, r#"x-ignore-shared: "on" in the stream, "off" here"#);
    let (_, received, _) = run(&from, &to, [OFF, (false, true)]);
    let error = received.unwrap_err().to_string();
    assert_eq!(error, r#"x-ignore-shared: "off" in the stream, "on" here"#);
    let (_, received, _) = run(&from, &to, [ON, OFF]);
    let error = received.unwrap_err().to_string();
    assert_eq!(error, r#"capabilities: "x-ignore-shared" in the stream, "" here"#);
}

#[test]
fn a_page_of_memory_that_both_sides_share_is_refused_and_not_written() {
    let file = memfd(16 * BLOCK);
    fill(&file, 0..1, 7);
    let to = side(&file);
    let options = ListOptions { ignore_shared: true, postcopy: false };
    let mut ram = RamLoad::new(Arc::clone(&to.blocks), options, Arc::new(Progress::new()));
    ram.load_setup().unwrap();
    let mut section = Vec::new();
    put_list(&mut section, &to.blocks.list(options).unwrap());
    for (id, byte) in [("ram", 5), ("vmem0", 6)] {
        section.put_be64(PageHeader::page_word(PageKind::Normal, 0, false));
        section.put_name(id);
        section.put(&[byte; PAGE as usize]);
    }
    put_end_of_section(&mut section);
    let mut reader = WireReader::new(&section[..]);
    let error = ram.load(SectionKind::Start, RAM_VERSION, &mut reader).unwrap_err().to_string();
    assert!(error.contains("a page of block \"vmem0\", which both sides share"), "{error}");
    assert_eq!(to.page(0), [7; 4096]);
}
