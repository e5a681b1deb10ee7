//! How lines look: as text or JSON, and for the journal.

use std::env;
use std::fmt::Write as _;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::fstat;
use serde_json::{Value, json};
use tracing::Level;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

/// Bytes of a line, at most: it may hold what a peer has sent.
pub(super) const LINE: usize = 4096;

/// Characters of a text in a line of JSON that would be longer than [`LINE`].
const TEXT: usize = 256;

/// How lines look.
#[derive(Clone, Copy, Debug, Default)]
pub struct Form {
    /// An object a line.
    pub json: bool,
    /// Of text.
    pub colours: bool,
    /// The journal takes the level from the start of a line, by sd-daemon(3).
    pub journal: bool,
    /// Those of a command with this name, which ends soon: without time and place.
    pub command: Option<&'static str>,
}

impl Form {
    /// A formatted line as it is written: one line of bounded length without control characters,
    /// whatever was formatted. A peer's text may not pass for another line, nor change a terminal.
    pub fn line(self, level: Level, text: &[u8]) -> Vec<u8> {
        let text = text.strip_suffix(b"\n").unwrap_or(text);
        let mut line = if self.journal { format!("<{}>", priority(level)) } else { String::new() };
        if self.json {
            let text = String::from_utf8_lossy(text);
            if text.len() > LINE {
                self.put(&mut line, &shortened(&text))
            } else {
                self.put(&mut line, &text)
            }
        } else {
            let (text, cut) = match text.get(..LINE) {
                Some(start) if start.len() < text.len() => (start, true),
                _ => (text, false),
            };
            self.put(&mut line, &String::from_utf8_lossy(text));
            if cut {
                line.push_str("...");
            }
        }
        line.push('\n');
        line.into_bytes()
    }

    /// A line that says `text`, as the others look. `count` is what it counts, if it does.
    pub fn notice(self, level: Level, target: &str, text: &str, count: Option<u64>) -> Vec<u8> {
        if let Some(command) = self.command {
            return self.line(level, self.of_command(command, level, text, count).as_bytes());
        }
        let mut time = String::new();
        let _ = SystemTime.format_time(&mut Writer::new(&mut time));
        let line = if self.json {
            let mut fields = json!({ "message": text });
            if let Some(count) = count {
                fields["count"] = count.into();
            }
            json!({
                "timestamp": time, "level": level.as_str(), "fields": fields, "target": target,
            })
            .to_string()
        } else {
            format!("{time} {level:>5} {target}: {text}")
        };
        self.line(level, line.as_bytes())
    }

    fn of_command(self, command: &str, level: Level, text: &str, count: Option<u64>) -> String {
        let kind = match level {
            Level::ERROR => "error",
            Level::WARN => "warning",
            _ => "note",
        };
        match (self.json, level) {
            (true, _) => {
                let mut line = json!({ kind: text });
                if let Some(count) = count {
                    line["count"] = count.into();
                }
                line.to_string()
            }
            (false, Level::ERROR) => format!("{command}: {text}"),
            (false, _) => format!("{command}: {kind}: {text}"),
        }
    }

    fn put(self, line: &mut String, text: &str) {
        for char in text.chars() {
            if !char.is_control() {
                line.push(char);
            } else if self.json {
                // Within a text: there are none elsewhere, and the formatter leaves only some there.
                let _ = write!(line, "\\u{:04x}", u32::from(char));
            } else if char == '\t' || (self.colours && char == '\u{1b}') {
                // The formatter's colours are the only ones: it escapes those of a message.
                line.push(char);
            } else {
                line.extend(char.escape_default());
            }
        }
    }
}

/// The level as syslog(3) has it.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

/// An object that is too long, with all long texts in it cut: cut itself, it would not be one.
fn shortened(line: &str) -> String {
    match serde_json::from_str(line) {
        Ok(mut value) => {
            shorten(&mut value);
            value.to_string()
        }
        Err(_) => json!({ "fields": { "message": cut(line) } }).to_string(),
    }
}

fn shorten(value: &mut Value) {
    match value {
        Value::String(text) if text.len() > TEXT => *text = cut(text),
        Value::Object(fields) => fields.values_mut().for_each(shorten),
        Value::Array(values) => values.iter_mut().for_each(shorten),
        _ => {}
    }
}

fn cut(text: &str) -> String {
    let start: String = text.chars().take(TEXT).collect();
    start + "..."
}

/// Whether stderr is the connection to the journal that the service manager has made of it, and not
/// something else since.
pub fn is_journal() -> bool {
    let told = env::var("JOURNAL_STREAM").unwrap_or_default();
    fstat(io::stderr().as_fd()).is_ok_and(|stat| is_stream(&told, stat.st_dev, stat.st_ino))
}

/// Whether `JOURNAL_STREAM` names the file of this device and inode.
fn is_stream(told: &str, device: u64, inode: u64) -> bool {
    let told = told.split_once(':').and_then(|(told_device, told_inode)| {
        Some((told_device.parse::<u64>().ok()?, told_inode.parse::<u64>().ok()?))
    });
    told == Some((device, inode))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT_FORM: Form = Form { json: false, colours: false, journal: false, command: None };
    const JSON: Form = Form { json: true, ..TEXT_FORM };

    fn line(form: Form, text: &[u8]) -> String {
        String::from_utf8(form.line(Level::INFO, text)).unwrap()
    }

    #[test]
    fn a_line_stays_one_line() {
        let coloured = Form { colours: true, ..TEXT_FORM };
        assert_eq!(line(TEXT_FORM, b"a\nb\r\x1b[31m\xff\n"), "a\\nb\\r\\u{1b}[31m\u{fffd}\n");
        let time = b"\x1b[2mtime\x1b[0m a\nb\n";
        assert_eq!(line(coloured, time), "\x1b[2mtime\x1b[0m a\\nb\n");
        let long = line(TEXT_FORM, &[b'x'; LINE + 1]);
        assert_eq!(long, format!("{}...\n", "x".repeat(LINE)));
        assert_eq!(line(TEXT_FORM, &[b'x'; LINE]).len(), LINE + 1);
    }

    #[test]
    fn every_line_of_json_is_an_object_without_control_characters() {
        let said = "\u{0}\n\u{1b}\u{7f}\u{80}\u{9b}31m\u{9f}\"\\ \u{e4}\u{1f600}";
        for repeated in [1, 100, 1000, 100_000] {
            let said = said.repeat(repeated);
            let object = json!({ "level": "INFO", "fields": { "message": said, "n": 7 } });
            let line = line(JSON, format!("{object}\n").as_bytes());
            let (text, end) = line.split_at(line.len() - 1);
            assert_eq!(end, "\n");
            assert!(!text.contains(char::is_control), "{text}");
            assert!(line.len() < 2 * LINE, "{}", line.len());
            let read: Value = serde_json::from_str(text).unwrap();
            assert_eq!((&read["level"], &read["fields"]["n"]), (&json!("INFO"), &json!(7)));
            let message = read["fields"]["message"].as_str().unwrap();
            match message.strip_suffix("...") {
                None => assert_eq!(message, said),
                Some(start) => {
                    assert!(repeated > 1 && start.chars().count() == TEXT, "{message}");
                    assert!(said.starts_with(start), "{message}");
                }
            }
        }
        let broken: Value = serde_json::from_str(&line(JSON, &[b'{'; LINE + 1])).unwrap();
        assert!(broken["fields"]["message"].as_str().unwrap().starts_with("{{{"));
    }

    #[test]
    fn a_line_of_the_log_about_itself_looks_like_the_others() {
        let notice = |form: Form| {
            let line = form.notice(Level::WARN, "a::b", "3 lines were lost", Some(3));
            String::from_utf8(line).unwrap()
        };
        assert!(notice(TEXT_FORM).ends_with("Z  WARN a::b: 3 lines were lost\n"));
        let read: Value = serde_json::from_str(&notice(JSON)).unwrap();
        let expected = json!({ "message": "3 lines were lost", "count": 3 });
        assert_eq!((&read["level"], &read["fields"]), (&json!("WARN"), &expected));
        assert_eq!(read["target"], "a::b");
        assert!(read["timestamp"].as_str().unwrap().ends_with('Z'));
    }

    #[test]
    fn a_line_of_a_command_has_neither_time_nor_place() {
        let notice = |form: Form, level, count| {
            let form = Form { command: Some("tool"), ..form };
            String::from_utf8(form.notice(level, "a::b", "o\ndd", count)).unwrap()
        };
        assert_eq!(notice(TEXT_FORM, Level::ERROR, None), "tool: o\\ndd\n");
        assert_eq!(notice(TEXT_FORM, Level::WARN, Some(3)), "tool: warning: o\\ndd\n");
        assert_eq!(notice(JSON, Level::ERROR, None), "{\"error\":\"o\\ndd\"}\n");
        assert_eq!(notice(JSON, Level::WARN, Some(3)), "{\"count\":3,\"warning\":\"o\\ndd\"}\n");
    }

    #[test]
    fn the_journal_is_told_the_level() {
        for json in [false, true] {
            let form = Form { json, journal: true, ..TEXT_FORM };
            for (level, prefix) in [
                (Level::ERROR, "<3>{"),
                (Level::WARN, "<4>{"),
                (Level::INFO, "<6>{"),
                (Level::DEBUG, "<7>{"),
                (Level::TRACE, "<7>{"),
            ] {
                assert_eq!(form.line(level, b"{}\n"), format!("{prefix}}}\n").into_bytes());
            }
        }
    }

    #[test]
    fn only_the_stream_that_the_service_manager_has_made_is_the_journal() {
        assert!(is_stream("8:1234", 8, 1234));
        for other in ["", "8", "8:", ":1234", "8:1235", "9:1234", "8:1234:1", "x:1234", "-8:1234"] {
            assert!(!is_stream(other, 8, 1234), "{other}");
        }
    }
}
