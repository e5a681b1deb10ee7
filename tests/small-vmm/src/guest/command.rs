//! What the VMM process is told and what it answers: one JSON line each.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::map::Cell;
use crate::migration::{Links, MigrateOptions, MigrationReport};

/// What the VMM is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Wait for this requested size, until it is plugged.
    Settle {
        /// The size in bytes.
        requested: u64,
    },
    /// Let the vCPUs write this part of the region, and keep writing it.
    Touch {
        /// First byte, from the start of the region.
        offset: u64,
        /// Length in bytes.
        size: u64,
    },
    /// Have all vCPUs together touch about so many pages a second.
    Pace {
        /// Pages a second; as many as they can when nothing is said.
        pages: Option<u64>,
    },
    /// Have the vCPUs look at what they wrote, and write nothing; or write again.
    ReadOnly {
        /// Whether nothing is written.
        on: bool,
    },
    /// Have the guest look at a part of the region that it never wrote, which must be zeros.
    Look {
        /// First byte, from the start of the region.
        offset: u64,
        /// Length in bytes.
        size: u64,
    },
    /// Tell how things are.
    Report {
        /// How many characters the map of the region has.
        #[serde(default)]
        cells: u64,
    },
    /// Begin to send the guest away.
    Migrate(MigrateOptions),
    /// Take a guest that comes here. The answer says where it is waited for.
    Incoming {
        /// `unix:PATH` or `tcp:HOST:PORT`; port 0 for any that is free.
        from: String,
        /// Whether the source leaves out what is discarded.
        #[serde(default = "super::yes")]
        discard_aware: bool,
        /// Whether the guest may come before its memory.
        #[serde(default)]
        postcopy: bool,
        /// What it comes over.
        #[serde(default)]
        links: Links,
    },
    /// Have the guest go before its memory, if that was provided for.
    StartPostcopy,
    /// Have the migration send no more than so many bytes a second from now on.
    Bandwidth {
        /// Bytes a second; 0 for no limit.
        max: u64,
    },
    /// Tell how the migration stands.
    Status,
    /// End the migration as soon as it can be; in postcopy, stop waiting for a new channel.
    Cancel,
    /// Write the guest to a new file; it stands still meanwhile.
    Snapshot {
        /// The file.
        file: PathBuf,
        /// Whether it runs on.
        #[serde(default)]
        background: bool,
    },
    /// Read the guest from a file, and let it run.
    Restore {
        /// The file.
        file: PathBuf,
        /// Whether it runs before its memory is there.
        #[serde(default)]
        lazy: bool,
    },
    /// Let a guest run that was to wait.
    Cont,
    /// Have the driver ask for the state of a part of the region.
    AskState {
        /// First byte, from the start of the region.
        offset: u64,
        /// Length in bytes.
        size: u64,
    },
    /// The daemon may go at any moment, and comes again: what fails then is tried again.
    Detach,
    /// Connect the guest to a daemon that was started again.
    Reconnect,
    /// End, after a last look at all that was written.
    Quit,
}

/// What of a part of the region is plugged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// All of it.
    Plugged,
    /// Nothing.
    Unplugged,
    /// A part.
    Mixed,
}

/// What the VMM answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Bytes plugged, as the device's configuration says; 0 when it cannot be had.
    pub plugged: u64,
    /// Bytes that the host holds for the region's memory, by `st_blocks`.
    pub resident: u64,
    /// What is where in the region, for [`Command::Report`].
    pub map: Vec<Cell>,
    /// Pages that the vCPUs verified so far.
    pub verified: u64,
    /// Pages that the vCPUs wrote so far.
    pub written: u64,
    /// Whether the guest runs here.
    pub running: bool,
    /// Whether no vCPU has found a wrong page.
    pub healthy: bool,
    /// What the device answered, for [`Command::AskState`].
    pub state: Option<State>,
    /// How often the device did what the driver asked for.
    #[serde(default)]
    pub served: u64,
    /// How often the device said that it is busy.
    pub busy: u64,
    /// Why the device is of no use any more.
    pub lost: Option<String>,
    /// Why the guest's blocks stay until its memory has arrived; nothing while they may change.
    #[serde(default)]
    pub blocks_stay: Option<String>,
    /// Descriptors of this process behind boot memory and the region.
    pub memory: Option<[i32; 2]>,
    /// Where a guest is waited for.
    pub listening: Option<String>,
    /// The migration that was begun last.
    pub migration: Option<MigrationReport>,
    /// Why the command was not done; nothing else is told then.
    pub error: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_lines_that_a_person_can_type() {
        let text = |command: &Command| serde_json::to_string(command).unwrap();
        assert_eq!(text(&Command::Settle { requested: 4096 }), r#"{"settle":{"requested":4096}}"#);
        assert_eq!(text(&Command::Quit), r#""quit""#);
        let migrate: Command =
            serde_json::from_str(r#"{"migrate":{"to":"unix:/run/m.sock","max-bandwidth":1}}"#)
                .unwrap();
        let expected = MigrateOptions {
            to: "unix:/run/m.sock".to_owned(),
            max_bandwidth: Some(1),
            downtime_limit: None,
            discard_aware: true,
            elastic: true,
            postcopy: None,
            links: Links::default(),
        };
        assert_eq!(migrate, Command::Migrate(expected));
    }
}
