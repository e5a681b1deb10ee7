//! Inputs to start from, a few for each target.

/// The seeds of a target; none for a name that is no target's.
pub fn of(target: &str) -> Vec<Vec<u8>> {
    match target {
        "guest_requests" => guest_requests(),
        "guest_chains" => guest_chains(),
        "vhost_user_stream" => vhost_user_stream(),
        "api_bodies" => api_bodies(),
        "state_file" => state_file(),
        "migration_stream" => crate::migration_stream::seeds(),
        "page_channels" => crate::page_channels::seeds(),
        "postcopy_stream" => postcopy_stream(),
        "discard_channel" => discard_channel(),
        "pager_save" => crate::pager_save::seeds(),
        "pager_firecracker" => pager_firecracker(),
        "pager_restore" => crate::pager_restore::seeds(),
        "pager_cloud_hypervisor" => crate::pager_cloud_hypervisor::seeds(),
        _ => Vec::new(),
    }
}

fn guest_requests() -> Vec<Vec<u8>> {
    // A step: type, kind of request, how, block (2), number of blocks.
    let plug = [6, 0, 0, 0, 0, 64];
    let unplug = [6, 1, 0, 8, 0, 8];
    let state = [6, 3, 0, 0, 0, 64];
    let unplug_all = [6, 2, 0, 0, 0, 0];
    let requested = 100u16.to_le_bytes();
    vec![
        [&requested[..], &plug, &unplug, &state, &unplug_all].concat(),
        // A fault of the store, of a listener, and requests that come twice.
        [&requested[..], &[6, 0, 3, 0, 0, 4], &[6, 0, 12, 0, 0, 4], &[6, 0, 48, 0, 0, 4]].concat(),
        // Frozen and thawed with a reset in between; unmapped; resized.
        [&requested[..], &plug, &[3, 3], &plug, &[5], &[3, 2], &[4, 0], &plug, &[2, 0, 2]].concat(),
    ]
}

fn guest_chains() -> Vec<Vec<u8>> {
    // Head, block, kind, number of blocks, where the response goes, its length.
    let request = |head: u8, block: u8, kind: u8| vec![6, head, block, kind, 1, 1, 5];
    let kick = vec![7];
    vec![
        [vec![7], request(0, 8, 0), request(2, 8, 2), kick.clone(), request(4, 8, 1)].concat(),
        // An indirect table of two descriptors.
        [
            vec![0x87],
            vec![4, 0, 5, 0, 0x20, 3, 1, 1],
            vec![4, 1, 5, 0x40, 0x20, 5, 2, 0],
            vec![5, 9, 2],
            kick.clone(),
        ]
        .concat(),
        // Indirect tables in unplugged memory, first and after a good part.
        [
            vec![7],
            vec![0, 0, 1, 0x00, 0x30, 2, 4, 4, 0],
            vec![1, 0],
            vec![0, 1, 5, 0, 0x20, 3, 1, 2],
            vec![0, 2, 1, 0x08, 0x70, 2, 4, 4, 0],
            vec![1, 1],
            kick.clone(),
        ]
        .concat(),
        // A loop, a head that does not exist, an index far ahead.
        [
            vec![3],
            vec![0, 0, 5, 0, 0x20, 3, 1, 0],
            vec![1, 0],
            kick.clone(),
            vec![1, 200],
            kick.clone(),
            vec![2, 0xff, 0x7f],
            kick,
        ]
        .concat(),
    ]
}

fn vhost_user_stream() -> Vec<Vec<u8>> {
    vec![
        // A good start, then each request once, as it usually is.
        [vec![10], (0..48).flat_map(|request| [0x0b, request]).collect()].concat(),
        // Edited payloads from the beginning.
        [vec![0], [3, 16, 2, 5, 5, 0, 0x80, 8, 2, 9, 9].repeat(3)].concat(),
        // A ring in memory that is past the end of its file.
        vec![0, 3, 0xc5, 16, 2, 5, 5, 0xff, 1, 0x2f, 9, 9, 8, 0x2f],
        // Bytes.
        vec![0x80, 12, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 3, 15, 0, 0],
    ]
}

fn api_bodies() -> Vec<Vec<u8>> {
    let body = |choice: u8, text: &str| [&[choice], text.as_bytes()].concat();
    vec![
        body(8, r#"{"requested_size": 2097152}"#),
        body(8, r#"{"requested_size": -1, "requested_size": 1e9}"#),
        body(9, r#"{"active": true}"#),
        body(0, r#" {"requested_size":18446744073709551616} x"#),
        body(4, "\u{10}application/json{}"),
        body(0x88, r#"{"level": "debug"}"#),
        body(0x88, r#"{"level": "info,vhost_user_mem::backend=trace"}"#),
        body(0x88, r#"{"level": "inof"}"#),
    ]
}

fn state_file() -> Vec<Vec<u8>> {
    // A commit: journal, requested size (2), migration, change, first block (2), number of blocks
    // (2), and whether its request is answered.
    let commits = [
        &[3][..],
        &[2, 9, 0, 1, 5, 3, 0, 129, 0, 1],
        &[0, 9, 0, 0, 2, 64, 0, 0, 0, 0],
        &[2, 3, 0, 0, 5, 190, 0, 9, 0, 0],
    ]
    .concat();
    let blocks = 3 << 2;
    let edited = |edits: &[u8]| [&[blocks | 2], &commits[..], edits].concat();
    vec![
        edited(&[]),
        // A word of the bitmap changed, the sums made right again.
        edited(&[2, 6, 3, 0xff, 6, 0]),
        // The number of plugged blocks, the blocks of the change, the usable size; checksums right.
        edited(&[5, 1, 24, 77, 7]),
        edited(&[5, 1, 56, 255, 7]),
        edited(&[5, 1, 16, 0, 7]),
        // Killed before the blocks of the change were written, and a size that the device refuses.
        edited(&[2, 6, 23, 0, 5, 1, 16, 0, 7]),
        edited(&[0, 0, 0x30]),
        [&[blocks], &commits[..]].concat(),
        [&[blocks | 1][..], b"VMEMSTAT\x01\0\0\0\0\0\0\0"].concat(),
        // Commits with numbers that are not those of their places.
        [&[blocks | 2, 8, 2, 3, 0, 0x28, 0xff][..], &[0xc2; 6], &[0, 0x29, 0x0e]].concat(),
    ]
}

fn postcopy_stream() -> Vec<Vec<u8>> {
    // How (8: no urgent channel; 2: no edits; 1: no vCPU; 64: one recovery), the number of ranges
    // that are announced less one, each by page and number of pages, and what the package holds.
    let begin = |how: u8| vec![how, 0, 4, 3, 0];
    // Steps: all pages and the end; one page, and the channel breaks; what a recovery begins with.
    let (all, end) = ([4], [6]);
    let (one_page, breaks) = ([0, 0, 1, 4], [11, 0]);
    let resume = [7, 1, 8];
    vec![
        [begin(10), all.to_vec(), end.to_vec()].concat(),
        [begin(11), one_page.to_vec(), all.to_vec(), end.to_vec()].concat(),
        // RUN behind the package, pages on the urgent channel.
        [vec![2, 0, 4, 3, 2], vec![3, 1, 4, 1, 8, 1, 12, 0], end.to_vec()].concat(),
        // A channel that breaks, without and with a recovery.
        [begin(10), one_page.to_vec()].concat(),
        // The page of the vCPU never comes.
        [begin(10), vec![0, 0, 1, 8]].concat(),
        [
            begin(74),
            one_page.to_vec(),
            breaks.to_vec(),
            resume.to_vec(),
            all.to_vec(),
            end.to_vec(),
        ]
        .concat(),
        // A page that is zeros, one at no possible offset, one of discarded memory.
        [begin(10), vec![0, 0, 0, 4], vec![0, 0, 1, 0xff], all.to_vec()].concat(),
        [begin(10), vec![0, 0, 1, 0xf5], all.to_vec(), end.to_vec()].concat(),
        // An edited beginning.
        [begin(8), vec![1, 60, 0, 9], all.to_vec(), end.to_vec()].concat(),
    ]
}

/// As found by fuzzing: a listener was left with what it had been told to populate.
const NUMBER_WITHOUT_BITS: [u8; 30] = [
    1, 255, 44, 255, 255, 44, 44, 44, 44, 44, 44, 44, 46, 44, 179, 44, 44, 44, 44, 6, 0, 0, 0, 44,
    44, 44, 46, 44, 15, 1,
];

fn discard_channel() -> Vec<Vec<u8>> {
    // A hostile client. Steps: what and how, and whether the frame is edited (15: it is not).
    let hello = [0, 1, 15];
    let (plug, unplug, hear) = ([0, 5, 60], [0x10, 5, 60], [1]);
    let (ack, refuse, freeze) = ([3, 15], [5, 15], [6, 15]);
    let client = |steps: &[&[u8]]| [&hello[..], &steps.concat()].concat();
    // A hostile daemon. Calls of the client, the bitmap, the welcome, its descriptor; steps.
    let calls = [1, 4, 0x05, 0x03, 0x04, 0x07];
    let (populate, discard) = ([0, 5, 20, 15], [1, 9, 2, 15]);
    let (answer, settle, goodbye) = ([0x1b, 15], [6, 3], [15, 15]);
    let frozen = [0x1b, 200, 15];
    let renew = [0x16, 15];
    let daemon =
        |bitmap: &[u8], steps: &[&[u8]]| [&calls[..], bitmap, &[15, 1], &steps.concat()].concat();
    vec![
        client(&[&plug, &hear, &ack, &unplug, &hear, &ack]),
        client(&[&plug, &hear, &hear, &refuse, &plug, &hear, &ack, &freeze, &plug]),
        // A discard that is refused, an event that is none, a frame that is cut.
        client(&[&plug, &hear, &ack, &unplug, &hear, &hear, &refuse]),
        client(&[&plug, &hear, &[0x73, 15]]),
        client(&[&plug, &hear, &[3, 0x42]]),
        daemon(&[0], &[&populate, &answer, &settle, &answer, &discard, &answer, &goodbye]),
        // Freezes that are held, renewed and thawed, and one that the daemon ends.
        client(&[&freeze, &hear, &renew, &hear, &plug, &[0x26, 15], &hear]),
        daemon(&[0], &[&frozen, &answer, &answer, &frozen, &answer, &answer, &goodbye]),
        daemon(&[0], &[&frozen, &answer, &answer, &frozen, &[7, 15], &answer, &answer]),
        // Several sections at once.
        daemon(&[0], &[&[0xa0, 5, 20, 40, 2, 15], &answer, &[0xa1, 40, 2, 5, 20, 15], &answer]),
        // A bitmap that is made: good, in the middle of a change for ever, not sealed.
        daemon(&[1, 1, 0, 2, 0, 3, 0, 4, 0], &[&answer, &populate, &answer]),
        daemon(&[3, 1, 0, 2, 0, 3, 0, 4, 0, 4, 1, 0, 0, 0, 0, 0, 0, 0], &[&answer, &answer]),
        daemon(&[9, 1, 0, 2, 0, 3, 0, 4, 0], &[]),
        // A bitmap whose number goes past an event without its bits, and an event that comes twice.
        [&[1, 1, 0, 0, 15, 1][..], &populate, &[3, 0x0e, 0, 3, 3, 3, 3]].concat(),
        NUMBER_WITHOUT_BITS.to_vec(),
        daemon(&[0], &[&populate, &populate, &[3, 3, 3]]),
    ]
}

fn pager_firecracker() -> Vec<Vec<u8>> {
    let good = crate::pager_firecracker::GOOD.as_bytes();
    let fault = [&[0x12][..], &[0; 15], &[0, 0, 0x10], &[0; 13]].concat();
    let remove = [&[0x15][..], &[0; 7], &[0, 0x10], &[0; 6], &[0, 0x20], &[0; 14]].concat();
    // States as they are kept: magic, length of the text and of the memory file, messages, text.
    let mut left = b"VMEMFCJ1".to_vec();
    left.extend((good.len() as u64).to_le_bytes());
    left.extend(65536u64.to_le_bytes());
    left.resize(1024, 0);
    left.extend(&remove);
    left.resize(4096, 0);
    left.extend(good);
    left.resize(4 * 4096, 0);
    let layers = [[0xff; 32], [0b1010_1010; 32], [0; 32]].concat();
    // Removals: of the first pages, across the end of the first region, of nothing, of everything.
    let removals =
        [[0, 8, 16, 0], [0xf8, 0x2f, 16, 0x20], [0, 9, 0, 0], [0, 0, 0xff, 0xff]].concat();
    vec![
        [&[0, 15], good].concat(),
        [&[1, 15], &fault[..], &remove].concat(),
        [&[2, 15], &left[..]].concat(),
        [&[3, 15], &layers[..]].concat(),
        [&[4, 0, 0], &removals[..]].concat(),
        [&[4, 0, 1], &removals[..]].concat(),
    ]
}
