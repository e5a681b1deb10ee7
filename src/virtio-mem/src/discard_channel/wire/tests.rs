use super::*;
use crate::device::Geometry;
use proptest::prelude::*;
use ram_discard::MemoryState;

fn geometry() -> Geometry {
    Geometry::new(0x1_4000_0000, 0x4000_0000, 0x20_0000, Some(3)).unwrap()
}

fn sections() -> Sections {
    Sections::from_elem(Section::new(0x20_0000, 0x40_0000).unwrap(), 1)
}

/// As many as there can be, each of a page.
fn most_sections() -> Sections {
    (0..SECTIONS_MAX as u64).map(|n| Section::new(n << 13, 4096).unwrap()).collect()
}

/// Frames in hexadecimal, fields separated by spaces.
fn golden<M: Message + PartialEq + std::fmt::Debug>(message: &M, hex: &str) {
    let digits: Vec<char> = hex.chars().filter(|c| !c.is_whitespace()).collect();
    let byte = |pair: &[char]| u8::from_str_radix(&String::from_iter(pair), 16).unwrap();
    let bytes: Vec<u8> = digits.chunks(2).map(byte).collect();
    assert_eq!(message.to_frame(), bytes, "{message:?}");
    let (decoded, len) = decode::<M>(&bytes).unwrap().unwrap();
    assert_eq!((&decoded, len), (message, bytes.len()));
}

#[test]
fn golden_frames_of_a_client() {
    golden(
        &ClientMessage::Hello { min_version: 1, max_version: 2 },
        "01000000 10000000 564d454d44495343 0100 0200 00000000",
    );
    golden(&ClientMessage::Ack { event: 7 }, "02000000 08000000 0700000000000000");
    golden(
        &ClientMessage::Refuse { event: 7, reason: "no".to_owned() },
        "03000000 0a000000 0700000000000000 6e6f",
    );
    golden(&ClientMessage::Freeze { id: 1 }, "04000000 08000000 0100000000000000");
    golden(
        &ClientMessage::Thaw { id: 2, freeze: 9 },
        "05000000 10000000 0200000000000000 0900000000000000",
    );
    golden(
        &ClientMessage::Renew { id: 4, freeze: 9 },
        "07000000 10000000 0400000000000000 0900000000000000",
    );
    golden(&ClientMessage::Serve { id: 5 }, "0a000000 08000000 0500000000000000");
    golden(&ClientMessage::GetSizes { id: 3 }, "06000000 08000000 0300000000000000");
    for (state, kind) in [(MemoryState::Populated, "08"), (MemoryState::Discarded, "09")] {
        let sections = "0500000000000000 0000200000000000 0000400000000000";
        golden(
            &ClientMessage::Follow { id: 5, state, sections: self::sections() },
            &format!("{kind}000000 18000000 {sections}"),
        );
    }
}

#[test]
fn golden_frames_of_a_server() {
    golden(
        &ServerMessage::Welcome(Welcome {
            version: 2,
            generation: 0xfeed,
            geometry: geometry(),
            bitmap_size: 128,
            event: 5,
            patience_ms: 1000,
        }),
        "81000000 48000000 564d454d44495343 0200 0100 0300 0000 0000004001000000 \
         0000004000000000 0000200000000000 8000000000000000 0500000000000000 e8030000 00000000 \
         edfe000000000000",
    );
    golden(
        &ServerMessage::Goodbye {
            cause: Farewell::Silent,
            min_version: 1,
            max_version: 1,
            reason: "slow".to_owned(),
        },
        "82000000 0c000000 04000000 0100 0100 736c6f77",
    );
    golden(
        &ServerMessage::Populate { event: 6, sections: sections() },
        "83000000 18000000 0600000000000000 0000200000000000 0000400000000000",
    );
    golden(
        &ServerMessage::Discard { event: 7, sections: sections() },
        "84000000 18000000 0700000000000000 0000200000000000 0000400000000000",
    );
    let two = [Section::new(0x20_0000, 0x40_0000).unwrap(), Section::new(0, 0x1000).unwrap()];
    golden(
        &ServerMessage::Discard { event: 8, sections: Sections::from_slice(&two) },
        "84000000 28000000 0800000000000000 0000200000000000 0000400000000000 \
         0000000000000000 0010000000000000",
    );
    golden(
        &ServerMessage::Frozen { id: 1, freeze: 9, event: 7, expiry_ms: 30_000 },
        "88000000 20000000 0100000000000000 0900000000000000 0700000000000000 30750000 00000000",
    );
    golden(&ServerMessage::Thawed { freeze: 9 }, "89000000 08000000 0900000000000000");
    golden(&ServerMessage::Done { id: 1 }, "85000000 08000000 0100000000000000");
    golden(
        &ServerMessage::Failed { id: 1, reason: "no".to_owned() },
        "86000000 0a000000 0100000000000000 6e6f",
    );
    golden(
        &ServerMessage::Sizes { id: 1, usable_region_size: 4, plugged_size: 2, requested_size: 3 },
        "87000000 20000000 0100000000000000 0400000000000000 0200000000000000 0300000000000000",
    );
}

#[test]
fn a_cut_frame_is_awaited_and_a_wrong_one_is_an_error_as_soon_as_it_shows() {
    let frame = ServerMessage::Populate { event: 6, sections: sections() }.to_frame();
    for len in 0..frame.len() {
        assert_eq!(decode::<ServerMessage>(&frame[..len]), Ok(None), "{len}");
    }
    let header = |kind: u32, len: u32| [kind.to_le_bytes(), len.to_le_bytes()].concat();
    let unknown = decode::<ClientMessage>(&header(0x63, 0));
    assert_eq!(unknown, Err(MessageError::UnknownKind(0x63)));
    let of_the_other_side = decode::<ClientMessage>(&header(kind::DONE, 8));
    assert_eq!(of_the_other_side, Err(MessageError::UnknownKind(kind::DONE)));
    for len in [0, 7, 9, u32::MAX] {
        let wrong = decode::<ClientMessage>(&header(kind::ACK, len));
        assert_eq!(wrong, Err(MessageError::Length { kind: kind::ACK, len }));
    }
    for len in [0, 8, 23, 25, 39] {
        let wrong = decode::<ServerMessage>(&header(kind::POPULATE, len));
        assert_eq!(wrong, Err(MessageError::Length { kind: kind::POPULATE, len }));
    }
    let most = ServerMessage::Discard { event: 1, sections: most_sections() }.to_frame();
    assert_eq!(most.len(), FRAME_MAX);
    let one_more = (most.len() - HEADER_LEN) as u32 + SECTION_LEN;
    assert!(decode::<ServerMessage>(&header(kind::DISCARD, one_more)).is_err());
    let longest = NUMBER_LEN + TEXT_MAX as u32;
    assert_eq!(decode::<ClientMessage>(&header(kind::REFUSE, longest)), Ok(None));
    assert!(decode::<ClientMessage>(&header(kind::REFUSE, longest + 1)).is_err());
}

#[test]
fn one_wrong_field_is_an_error() {
    let welcome = Welcome {
        version: 2,
        generation: 1,
        geometry: Geometry::new(0, 1 << 30, 1 << 21, None).unwrap(),
        bitmap_size: 128,
        event: 0,
        patience_ms: 1000,
    };
    let good = ServerMessage::Welcome(welcome).to_frame();
    // Offset in the frame: magic, flags, node_id, reserved, addr, region_size, block_size, reserved.
    for at in [8, 18, 20, 22, 24, 32, 40, 68] {
        let mut frame = good.clone();
        frame[at] = 0xfe;
        assert!(decode::<ServerMessage>(&frame).is_err(), "byte {at}");
    }
    let mut hello = ClientMessage::Hello { min_version: 1, max_version: 1 }.to_frame();
    hello[20] = 1;
    assert!(matches!(decode::<ClientMessage>(&hello), Err(MessageError::Field { .. })));
    let mut frozen = ServerMessage::Frozen { id: 1, freeze: 1, event: 1, expiry_ms: 1 }.to_frame();
    for (at, value) in [(32, 0), (36, 1)] {
        let before = std::mem::replace(&mut frozen[at], value);
        assert!(
            matches!(decode::<ServerMessage>(&frozen), Err(MessageError::Field { .. })),
            "{at}"
        );
        frozen[at] = before;
    }
    let mut goodbye = [kind::GOODBYE.to_le_bytes(), 8u32.to_le_bytes()].concat();
    goodbye.extend([9, 0, 0, 0, 0, 0, 0, 0]);
    assert!(matches!(decode::<ServerMessage>(&goodbye), Err(MessageError::Field { .. })));
    for (offset, size) in [(0, 0), (u64::MAX, 1)] {
        let mut frame = ServerMessage::Discard { event: 1, sections: sections() }.to_frame();
        frame[16..24].copy_from_slice(&u64::to_le_bytes(offset));
        frame[24..32].copy_from_slice(&u64::to_le_bytes(size));
        let error = MessageError::Section { kind: kind::DISCARD, offset, size };
        assert_eq!(decode::<ServerMessage>(&frame), Err(error));
    }
    let mut refuse = ClientMessage::Refuse { event: 1, reason: "a".to_owned() }.to_frame();
    *refuse.last_mut().unwrap() = 0xff;
    assert_eq!(decode::<ClientMessage>(&refuse), Err(MessageError::Text(kind::REFUSE)));
}

#[test]
fn long_text_is_cut_between_characters() {
    let frame = ClientMessage::Refuse { event: 1, reason: "\u{e9}x".repeat(200) }.to_frame();
    assert!(frame.len() <= FRAME_MAX);
    let (message, _) = decode::<ClientMessage>(&frame).unwrap().unwrap();
    let ClientMessage::Refuse { reason, .. } = message else { panic!("{message:?}") };
    assert!(reason.len() >= TEXT_MAX - 1 && "\u{e9}x".repeat(200).starts_with(&reason));
}

fn client_messages() -> impl Strategy<Value = ClientMessage> {
    prop_oneof![
        any::<(u16, u16)>().prop_map(|(min_version, max_version)| ClientMessage::Hello {
            min_version,
            max_version
        }),
        any::<u64>().prop_map(|event| ClientMessage::Ack { event }),
        (any::<u64>(), ".{0,60}")
            .prop_map(|(event, reason)| ClientMessage::Refuse { event, reason }),
        any::<u64>().prop_map(|id| ClientMessage::Freeze { id }),
        any::<u64>().prop_map(|id| ClientMessage::Serve { id }),
        (any::<u64>(), prop::sample::select(&MemoryState::BOTH)).prop_map(|(id, state)| {
            ClientMessage::Follow { id, state, sections: most_sections() }
        }),
    ]
}

proptest! {
    #[test]
    fn messages_come_back_from_a_stream(messages in prop::collection::vec(client_messages(), 0..8)) {
        let mut bytes = Vec::new();
        messages.iter().for_each(|message| message.encode(&mut bytes));
        let mut decoded = Vec::new();
        let mut rest = &bytes[..];
        while let Some((message, len)) = decode::<ClientMessage>(rest).unwrap() {
            prop_assert!(len <= FRAME_MAX);
            decoded.push(message);
            rest = &rest[len..];
        }
        prop_assert!(rest.is_empty());
        prop_assert_eq!(decoded, messages);
    }

    /// Whatever is accepted is written the same way: there is one form of each message.
    #[test]
    fn hostile_bytes_are_refused_or_canonical(
        kind in prop_oneof![0u32..9, 0x80u32..0x8b, any::<u32>()],
        len in prop_oneof![0u32..80, any::<u32>()],
        payload in prop::collection::vec(prop_oneof![Just(0u8), Just(1), any::<u8>()], 0..80),
    ) {
        let bytes = [&kind.to_le_bytes()[..], &len.to_le_bytes(), &payload].concat();
        if let Ok(Some((message, used))) = decode::<ClientMessage>(&bytes) {
            prop_assert_eq!(message.to_frame(), &bytes[..used]);
        }
        if let Ok(Some((message, used))) = decode::<ServerMessage>(&bytes) {
            prop_assert_eq!(message.to_frame(), &bytes[..used]);
        }
    }
}
