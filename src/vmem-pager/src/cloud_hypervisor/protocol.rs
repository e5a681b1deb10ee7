//! The frames of Cloud Hypervisor's local migration: `vm-migration/src/protocol.rs` at ae44c2971, little-endian.
//!
//! A request is 16 bytes: command (u16), six bytes of which only Start uses two (its version), length of
//! the payload (u64). An answer is 16 bytes: status (u16), six bytes of zeros, length (u64).

/// Version of the protocol that is spoken.
pub const VERSION: u16 = 0;
/// Bytes of a request, and of an answer.
pub const FRAME_LEN: usize = 16;
/// Bytes of a slot number, which is what a [`Command::MemoryFd`] carries beside the descriptor.
pub const SLOT_LEN: usize = 4;
/// Bytes of a range, which is what a [`Command::PageFault`] carries.
pub const RANGE_LEN: usize = 16;
/// First bytes of a connection for page faults.
pub const ROLE_FAULT: [u8; 2] = 2u16.to_le_bytes();

/// The longest Config that is read, bytes: real ones have some ten KiB.
pub const CONFIG_MAX: u64 = 8 << 20;
/// The longest State that is read, bytes: real ones have some 45 KiB a vCPU, and 6 bytes for each block of a
/// virtio-mem device.
pub const STATE_MAX: u64 = 48 << 20;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// A guest is coming.
    Start,
    /// The VM's configuration and the layout of its memory: JSON.
    Config,
    /// The state of its devices and vCPUs: JSON.
    State,
    /// The guest has been handed over, and runs.
    Complete,
    /// The guest stays with its sender.
    Abandon,
    /// A descriptor of a mapping.
    MemoryFd,
    /// The guest has been handed over, and stays paused.
    CompletePaused,
    /// A page is to be made present.
    PageFault,
}

impl Command {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Start,
        Self::Config,
        Self::State,
        Self::Complete,
        Self::Abandon,
        Self::MemoryFd,
        Self::CompletePaused,
        Self::PageFault,
    ];

    /// Its number.
    pub fn number(self) -> u16 {
        match self {
            Self::Start => 1,
            Self::Config => 2,
            Self::State => 3,
            Self::Complete => 5,
            Self::Abandon => 6,
            Self::MemoryFd => 7,
            Self::CompletePaused => 8,
            Self::PageFault => 9,
        }
    }

    /// The most bytes of payload that it has.
    fn payload_max(self) -> u64 {
        match self {
            Self::Start | Self::Complete | Self::Abandon | Self::CompletePaused => 0,
            Self::Config => CONFIG_MAX,
            Self::State => STATE_MAX,
            Self::MemoryFd => SLOT_LEN as u64,
            Self::PageFault => RANGE_LEN as u64,
        }
    }

    /// The least bytes of payload that it has.
    fn payload_min(self) -> u64 {
        match self {
            // An empty JSON object.
            Self::Config | Self::State => 2,
            other => other.payload_max(),
        }
    }
}

/// A request, without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is asked for.
    pub command: Command,
    /// Bytes of the payload that follows; within what the command has.
    pub length: u64,
}

impl Request {
    /// With a payload of `length` bytes.
    pub fn new(command: Command, length: u64) -> Self {
        Self { command, length }
    }

    /// As it is on the wire.
    pub fn encode(self) -> [u8; FRAME_LEN] {
        let mut bytes = [0; FRAME_LEN];
        bytes[..2].copy_from_slice(&self.command.number().to_le_bytes());
        // Bytes 2 and 3 of Start are the version, 0.
        bytes[8..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// Off the wire.
    ///
    /// # Errors
    ///
    /// For a command that is not used between two ends on one host, another version, or a length that the
    /// command cannot have.
    pub fn decode(bytes: &[u8; FRAME_LEN]) -> Result<Self, String> {
        let [low, high, version_low, version_high, ..] = *bytes;
        let number = u16::from_le_bytes([low, high]);
        let found = Command::ALL.into_iter().find(|command| command.number() == number);
        let Some(command) = found else {
            return Err(match number {
                4 => "it sends memory over the socket; use local=on, so that it hands over descriptors"
                    .to_owned(),
                _ => format!("command {number} is not one of the protocol"),
            });
        };
        let version = u16::from_le_bytes([version_low, version_high]);
        if command == Command::Start && version != VERSION {
            return Err(format!("it speaks version {version} of the protocol, not {VERSION}"));
        }
        let length = u64::from_le_bytes(*bytes.last_chunk().expect("half of the frame"));
        let (min, max) = (command.payload_min(), command.payload_max());
        if !(min..=max).contains(&length) {
            return Err(format!(
                "{command:?} has a payload of {length} bytes; expected {min} to {max}"
            ));
        }
        Ok(Self { command, length })
    }
}

/// An answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was done.
    Ok,
    /// It was not.
    Error,
}

impl Answer {
    /// As it is on the wire.
    pub fn encode(self) -> [u8; FRAME_LEN] {
        let mut bytes = [0; FRAME_LEN];
        let status: u16 = match self {
            Self::Ok => 1,
            Self::Error => 2,
        };
        bytes[..2].copy_from_slice(&status.to_le_bytes());
        bytes
    }

    /// Off the wire.
    ///
    /// # Errors
    ///
    /// For another status, or a payload, which no answer to the pager has.
    pub fn decode(bytes: &[u8; FRAME_LEN]) -> Result<Self, String> {
        let length = u64::from_le_bytes(*bytes.last_chunk().expect("half of the frame"));
        if length != 0 {
            return Err(format!("an answer with {length} bytes of payload; expected none"));
        }
        match u16::from_le_bytes([bytes[0], bytes[1]]) {
            1 => Ok(Self::Ok),
            2 => Ok(Self::Error),
            status => Err(format!("an answer of status {status}; expected 1 or 2")),
        }
    }
}

/// What a receiver of a guest waits for: Start, any number of MemoryFd, Config, State, Complete or
/// CompletePaused, and Abandon at any time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// Nothing has come.
    #[default]
    Connected,
    /// Start has.
    Started,
    /// Config has.
    Configured,
    /// State has.
    Stated,
    /// Complete or CompletePaused has, and nothing may follow.
    Completed,
}

impl Stage {
    /// The stage after a request.
    ///
    /// # Errors
    ///
    /// When the request may not come now.
    pub fn after(self, command: Command) -> Result<Self, String> {
        match (self, command) {
            (Self::Connected, Command::Start) | (Self::Started, Command::MemoryFd) => {
                Ok(Self::Started)
            }
            (Self::Started, Command::Config) => Ok(Self::Configured),
            (Self::Configured, Command::State) => Ok(Self::Stated),
            (Self::Stated, Command::Complete | Command::CompletePaused) => Ok(Self::Completed),
            _ => {
                let expected = match self {
                    Self::Connected => "Start",
                    Self::Started => "MemoryFd or Config",
                    Self::Configured => "State",
                    Self::Stated => "Complete or CompletePaused",
                    Self::Completed => "nothing",
                };
                Err(format!("{command:?} came where {expected} was expected"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn frames_are_as_cloud_hypervisor_has_them() {
        let config = Request::new(Command::Config, 0x1122);
        assert_eq!(config.encode(), [2, 0, 0, 0, 0, 0, 0, 0, 0x22, 0x11, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Answer::Error.encode(), [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        for command in Command::ALL {
            let request = Request::new(command, command.payload_min());
            assert_eq!(Request::decode(&request.encode()), Ok(request));
        }
        for answer in [Answer::Ok, Answer::Error] {
            assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
        }
    }

    #[test]
    fn what_no_peer_may_send_is_refused() {
        let mut start = Request::new(Command::Start, 0).encode();
        start[2] = 1;
        assert!(Request::decode(&start).unwrap_err().contains("version 1"));
        for (command, length) in [
            (Command::Start, 1),
            (Command::MemoryFd, 0),
            (Command::MemoryFd, 5),
            (Command::Config, 0),
            (Command::Config, CONFIG_MAX + 1),
            (Command::State, u64::MAX),
            (Command::PageFault, 8),
        ] {
            let error = Request::decode(&Request::new(command, length).encode()).unwrap_err();
            assert!(error.contains(&format!("{command:?} has a payload of {length} ")), "{error}");
        }
        let mut memory = [0; FRAME_LEN];
        memory[0] = 4;
        assert!(Request::decode(&memory).unwrap_err().contains("local=on"));
        let mut answer = Answer::Ok.encode();
        answer[8] = 1;
        assert!(Answer::decode(&answer).is_err());
        assert!(Answer::decode(&[0; FRAME_LEN]).is_err());
    }

    proptest! {
        #[test]
        fn any_frame_is_taken_or_refused(bytes: [u8; FRAME_LEN]) {
            if let Ok(request) = Request::decode(&bytes) {
                let (min, max) = (request.command.payload_min(), request.command.payload_max());
                prop_assert!((min..=max).contains(&request.length));
            }
            if let Ok(answer) = Answer::decode(&bytes) {
                prop_assert_eq!(answer.encode()[..2].to_vec(), bytes[..2].to_vec());
            }
        }

        /// However requests are ordered, cut and repeated, a guest is complete only after all of them
        /// in their order.
        #[test]
        fn a_guest_is_complete_only_in_order(order in proptest::collection::vec(0..8usize, 0..12)) {
            let mut stage = Stage::default();
            let mut taken = Vec::new();
            for command in order.into_iter().map(|index| Command::ALL[index]) {
                if let Ok(next) = stage.after(command) {
                    stage = next;
                    if command != Command::MemoryFd {
                        taken.push(command.number());
                    }
                }
            }
            let whole = [[1, 2, 3, 5], [1, 2, 3, 8]];
            prop_assert_eq!(stage == Stage::Completed, whole.iter().any(|whole| *whole == taken[..]));
            prop_assert!(whole.iter().any(|whole| whole.starts_with(&taken)));
        }
    }
}
