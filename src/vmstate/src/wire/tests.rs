use super::*;

/// Gives one byte at a time.
struct Drip<'a>(&'a [u8]);

impl Read for Drip<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some((&first, rest)) = self.0.split_first() else { return Ok(0) };
        buf[0] = first;
        self.0 = rest;
        Ok(1)
    }
}

#[test]
fn values_come_back_however_the_stream_is_cut() {
    let mut bytes = Vec::new();
    bytes.put_u8(7);
    bytes.put_be16(0x0102);
    bytes.put_be32(0x0304_0506);
    bytes.put_be64(0x0708_090a_0b0c_0d0e);
    bytes.put_name("vmem0");
    let mut reader = WireReader::new(Drip(&bytes));
    assert_eq!(reader.peek(3, "peek").unwrap(), [7, 1, 2]);
    assert_eq!(reader.u8("u8").unwrap(), 7);
    assert_eq!(reader.be16("be16").unwrap(), 0x0102);
    assert_eq!(reader.be32("be32").unwrap(), 0x0304_0506);
    assert_eq!(reader.be64("be64").unwrap(), 0x0708_090a_0b0c_0d0e);
    assert_eq!(reader.name("name").unwrap(), "vmem0");
    assert_eq!(reader.offset(), bytes.len() as u64);
    assert!(reader.is_at_end().unwrap());
    let error = reader.be16("another value").unwrap_err();
    assert_eq!(error.to_string(), "the stream ends at byte 0x15, where another value was expected");
}

#[test]
fn passing_over_bytes_ends_where_reading_them_would() {
    let bytes: Vec<u8> = (0..3 * PEEK_MAX).map(|i| (i % 251) as u8).collect();
    for step in [0, 1, 1000, PEEK_MAX, PEEK_MAX + 1, 2 * PEEK_MAX + 7] {
        let mut read = WireReader::new(&bytes[..]);
        let mut sought = WireReader::new(io::Cursor::new(&bytes));
        read.u8("byte").unwrap();
        sought.u8("byte").unwrap();
        read.skip(step as u64, "gap").unwrap();
        sought.seek_forward(step as u64).unwrap();
        assert_eq!((read.offset(), sought.offset()), (1 + step as u64, 1 + step as u64));
        assert_eq!(read.u8("byte").unwrap(), bytes[1 + step]);
        assert_eq!(sought.u8("byte").unwrap(), bytes[1 + step]);
    }
    let mut reader = WireReader::new(&bytes[..]);
    assert!(reader.skip(bytes.len() as u64 + 1, "gap").is_err());
}

#[test]
fn a_length_that_lies_costs_no_more_than_was_sent() {
    let mut reader = WireReader::new(&[0; 100][..]);
    let error = reader.bytes(u64::MAX, 1 << 40, "blob").unwrap_err();
    assert!(matches!(error, WireError::TooLong { limit, .. } if limit == 1 << 40));
    let error = reader.bytes(1 << 40, 1 << 40, "blob").unwrap_err();
    assert!(matches!(error, WireError::Truncated { offset: 100, .. }));
}

#[test]
fn peeking_across_the_end_of_the_buffer_keeps_what_was_read() {
    let bytes: Vec<u8> = (0..3 * PEEK_MAX).map(|i| (i % 251) as u8).collect();
    let mut reader = WireReader::new(&bytes[..]);
    let mut at = 0;
    while at + 5000 <= bytes.len() {
        assert_eq!(reader.peek(5000, "peek").unwrap(), &bytes[at..at + 5000]);
        reader.take(3001);
        at += 3001;
    }
}

#[test]
fn a_buffer_grows_with_the_stream_that_fills_it_up_to_its_capacity() {
    let bytes: Vec<u8> = (0..9 * PEEK_MAX).map(|i| (i % 251) as u8).collect();
    let mut reader = WireReader::with_capacity(&bytes[..1000], 3 * PEEK_MAX);
    while reader.read_ahead().unwrap() {}
    assert_eq!((reader.buffered(), reader.buffer.len()), (&bytes[..1000], PEEK_MAX));

    let mut reader = WireReader::with_capacity(&bytes[..], 3 * PEEK_MAX);
    reader.u8("byte").unwrap();
    while reader.buffered().len() < 3 * PEEK_MAX {
        assert!(reader.read_ahead().unwrap());
    }
    assert_eq!(reader.buffered(), &bytes[1..1 + 3 * PEEK_MAX]);
    let mut rest = vec![0; bytes.len() - 1];
    reader.read_exact(&mut rest, "rest").unwrap();
    assert_eq!(rest, bytes[1..]);
    assert!(reader.is_at_end().unwrap());
    assert_eq!(reader.buffer.len(), 3 * PEEK_MAX);
}
