//! Manual pages.

use std::io;

use clap::Command;
use clap_mangen::Man;

/// One page.
pub struct ManPage {
    /// As in `vmemctl-resize.1`.
    pub file_name: String,
    /// The page, for man(1).
    pub roff: String,
}

/// The pages of a command: its own first, then those of its subcommands.
///
/// # Errors
///
/// When a page cannot be rendered.
pub fn man_pages(mut command: Command) -> io::Result<Vec<ManPage>> {
    // Gives global options and full names to the subcommands.
    command.build();
    let mut pages = Vec::new();
    render(&command, &mut pages)?;
    Ok(pages)
}

fn render(command: &Command, pages: &mut Vec<ManPage>) -> io::Result<()> {
    let man = Man::new(command.clone());
    let mut roff = Vec::new();
    man.render(&mut roff)?;
    let roff = String::from_utf8(roff).map_err(io::Error::other)?;
    pages.push(ManPage { file_name: man.get_filename(), roff });
    for subcommand in command.get_subcommands() {
        if !subcommand.is_hide_set() && subcommand.get_name() != "help" {
            render(subcommand, pages)?;
        }
    }
    Ok(())
}
