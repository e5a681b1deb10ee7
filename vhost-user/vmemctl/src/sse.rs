//! Server-sent events, the receiving side.

use std::collections::VecDeque;

use management_api::Event;

/// No line of ours is nearly as long.
const LONGEST_LINE: usize = 64 << 10;

/// Takes bytes as they come and gives events. Comments, unknown fields and unknown events are
/// passed over.
#[derive(Default)]
pub(super) struct SseParser {
    line: Vec<u8>,
    name: String,
    data: String,
    events: VecDeque<Event>,
}

/// A line that is too long to be an event.
#[derive(Debug)]
pub(super) struct LineTooLong;

impl SseParser {
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(), LineTooLong> {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (rest, ended) = match part.strip_suffix(b"\n") {
                Some(rest) => (rest, true),
                None => (part, false),
            };
            if self.line.len() + rest.len() > LONGEST_LINE {
                return Err(LineTooLong);
            }
            self.line.extend_from_slice(rest);
            if ended {
                let line = std::mem::take(&mut self.line);
                let line = line.strip_suffix(b"\r").unwrap_or(&line);
                self.take_line(&String::from_utf8_lossy(line));
            }
        }
        Ok(())
    }

    pub(super) fn pop(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    fn take_line(&mut self, line: &str) {
        if line.is_empty() {
            self.events.extend(Event::parse(&self.name, &self.data));
            self.name.clear();
            self.data.clear();
            return;
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.name),
            // More than one line of data is none of ours and then fails as JSON.
            "data" => value.clone_into(&mut self.data),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_out_however_they_are_cut() {
        let text = b": hello\nevent: plugged-size\ndata: {\"plugged_size\": 7}\n\n\
            event:connected\r\ndata:{\"connected\":true}\r\n\r\nevent: other\ndata: 1\n\n\
            retry: 3\n\nevent: migration\ndata: {\"active\": true}\n\n";
        for size in 1..text.len() {
            let mut parser = SseParser::default();
            let mut events = Vec::new();
            for piece in text.chunks(size) {
                parser.push(piece).unwrap();
                events.extend(std::iter::from_fn(|| parser.pop()));
            }
            let expected = [Event::PluggedSize(7), Event::Connected, Event::Migration(true)];
            assert_eq!(events, expected, "in pieces of {size}");
        }
    }

    #[test]
    fn memory_is_bounded() {
        let mut parser = SseParser::default();
        let mut refused = false;
        for _ in 0..100 {
            refused |= parser.push(&[b'x'; 1024]).is_err();
        }
        assert!(refused && parser.line.len() <= LONGEST_LINE);
    }
}
