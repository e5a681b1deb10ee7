//! Where output goes.

use std::io::{self, IsTerminal, Stderr, Stdout, Write};

use serde::Serialize;

use super::Failure;

/// Columns when the output is no terminal.
const WIDTH: usize = 80;

/// Output, errors, and what is known of the terminal.
pub struct Console<'a> {
    out: &'a mut dyn Write,
    err: &'a mut dyn Write,
    /// Whether a progress bar can be drawn on stderr.
    pub interactive: bool,
    /// Columns of the output.
    pub width: usize,
    /// Whether output is JSON.
    pub json: bool,
}

impl<'a> Console<'a> {
    /// A console that is no terminal.
    pub fn plain(out: &'a mut dyn Write, err: &'a mut dyn Write) -> Self {
        Self { out, err, interactive: false, width: WIDTH, json: false }
    }

    /// The console of this process.
    pub fn of_process(out: &'a mut Stdout, err: &'a mut Stderr) -> Self {
        let width = rustix::termios::tcgetwinsize(&*out).map_or(0, |size| size.ws_col.into());
        let width = if width == 0 { WIDTH } else { width };
        let interactive = err.is_terminal();
        Self { out, err, interactive, width, json: false }
    }

    /// Writes to the output.
    ///
    /// # Errors
    ///
    /// When that fails; a closed pipe is an error, too, but one that ends the program quietly.
    pub fn print(&mut self, text: &str) -> Result<(), Failure> {
        self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush()).map_err(Failure::Output)
    }

    /// Writes a value as JSON, or else what is made for people.
    ///
    /// # Errors
    ///
    /// As [`Console::print`].
    pub fn show(
        &mut self,
        value: &impl Serialize,
        text: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        if self.json {
            let json = serde_json::to_string_pretty(value)
                .map_err(|error| Failure::Output(io::Error::from(error)))?;
            self.print(&format!("{json}\n"))
        } else {
            self.print(&text())
        }
    }

    /// Writes a line to stderr; a failure of that cannot be told.
    pub fn complain(&mut self, line: &str) {
        let _ = writeln!(self.err, "{line}");
    }
}
