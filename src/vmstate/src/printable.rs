//! Text of others, made fit for a log and a terminal.

/// The most characters that are kept, escapes included.
const LONGEST: usize = 256;

/// Text that came from another process, so that it cannot pass for anything else in a log or on a
/// terminal: what does not print (line feeds, escape sequences, changes of the writing direction) is
/// escaped, and so is the backslash. What is too long is cut and ends in `...`.
#[must_use]
pub fn printable(text: &str) -> String {
    let mut printable = String::new();
    let mut room = LONGEST;
    for c in text.chars() {
        // Only a quoted text would need quotes escaped.
        let quote = matches!(c, '"' | '\'');
        let Some(left) = room.checked_sub(if quote { 1 } else { c.escape_debug().count() }) else {
            printable.push_str("...");
            break;
        };
        room = left;
        match quote {
            true => printable.push(c),
            false => printable.extend(c.escape_debug()),
        }
    }
    printable
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_could_forge_a_line_or_move_the_cursor_is_escaped() {
        let text =
            "no\n2026-01-01 INFO forged \x1b[31mred\r\x07 \u{202e}desrever \\ \"it's\" \u{e9}";
        assert_eq!(
            printable(text),
            "no\\n2026-01-01 INFO forged \\u{1b}[31mred\\r\\u{7} \\u{202e}desrever \\\\ \"it's\" \u{e9}"
        );
    }

    #[test]
    fn what_is_too_long_is_cut_between_escapes() {
        assert_eq!(printable(&"x".repeat(256)).len(), 256);
        assert_eq!(printable(&"x".repeat(1 << 20)), format!("{}...", "x".repeat(256)));
        let cut = printable(&"\x1b".repeat(300));
        assert!(cut.ends_with("\\u{1b}...") && cut.len() <= 259, "{cut}");
    }

    proptest! {
        #[test]
        fn no_control_character_is_left_and_the_length_is_bounded(text in any::<String>()) {
            let printable = printable(&text);
            prop_assert!(!printable.chars().any(char::is_control));
            prop_assert!(printable.chars().count() <= LONGEST + 3);
        }
    }
}
