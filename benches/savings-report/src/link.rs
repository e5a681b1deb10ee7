//! What the two sides of a migration are connected by.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use anyhow::Result;
use migration::ram::PageChannels;
use migration::stream::{CAPABILITY_MULTIFD, CAPABILITY_MULTIFD_ZSTD, Configuration};
use migration::{Channel, Progress, TlsClient, TlsServer};
use serde::{Deserialize, Serialize};

/// The name in the certificates of both sides.
const NAME: &str = "localhost";

/// By which channels of another VM are told.
const UUID: [u8; 16] = [0x5a; 16];

/// How a migration's pages travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Channels for pages beside the main one; with 0 pages go over that.
    pub channels: usize,
    /// Whether all of them, the main one too, are over TLS 1.3.
    pub tls: bool,
    /// Whether pages are compressed by zstd at level 1; not in journals that do not say.
    #[serde(default)]
    pub zstd: bool,
}

impl Link {
    /// Those that are compared.
    pub const ALL: [Self; 6] = [
        Self::of(0),
        Self::of(1),
        Self::of(2),
        Self::of(4),
        Self { tls: true, ..Self::of(0) },
        Self { tls: true, ..Self::of(4) },
    ];

    /// Those between which it is compared what compression costs and saves.
    pub const COMPRESSED: [Self; 4] = [
        Self::of(1),
        Self { zstd: true, ..Self::of(1) },
        Self::of(4),
        Self { zstd: true, ..Self::of(4) },
    ];

    /// So many channels for pages, in the clear and plain.
    const fn of(channels: usize) -> Self {
        Self { channels, tls: false, zstd: false }
    }

    /// Its name in tables.
    pub fn name(self) -> String {
        let over = match self.channels {
            0 => "the main channel".to_owned(),
            1 => "1 channel of their own".to_owned(),
            count => format!("{count} channels of their own"),
        };
        let tls = if self.tls { ", TLS 1.3" } else { "" };
        let zstd = if self.zstd { ", zstd" } else { "" };
        format!("{over}{tls}{zstd}")
    }

    /// What both sides are configured as.
    pub fn configuration(self) -> Configuration {
        let mut configuration = Configuration::new("savings-report");
        if self.channels != 0 {
            configuration.capabilities.push(CAPABILITY_MULTIFD.to_owned());
            configuration.uuid = Some(UUID);
        }
        if self.zstd {
            configuration.capabilities.push(CAPABILITY_MULTIFD_ZSTD.to_owned());
        }
        configuration
    }
}

/// One side's ends of all connections. The two sides make channels of them at the same time, and in the same
/// order: TLS waits for the other side.
pub struct Ends {
    /// The main one.
    pub main: UnixStream,
    /// For pages that are asked for in postcopy.
    pub urgent: UnixStream,
    pages: Vec<UnixStream>,
    tls: Option<Tls>,
}

enum Tls {
    Client(TlsClient),
    Server(TlsServer),
}

impl Ends {
    /// Both sides' ends, the source's first.
    ///
    /// # Errors
    ///
    /// When there are no sockets, or no certificates.
    pub fn pair(link: Link) -> Result<(Self, Self)> {
        let (main, main_far) = UnixStream::pair()?;
        let (urgent, urgent_far) = UnixStream::pair()?;
        let (mut pages, mut pages_far) = (Vec::new(), Vec::new());
        for _ in 0..link.channels {
            let (near, far) = UnixStream::pair()?;
            pages.push(near);
            pages_far.push(far);
        }
        let (mut client, mut server) = (None, None);
        if link.tls {
            // They are read here, and not needed any more.
            let dir = small_vmm::demo::certificates::make()?;
            client = Some(Tls::Client(TlsClient::from_dir(dir.path(), NAME)?));
            server = Some(Tls::Server(TlsServer::from_dir(dir.path())?));
        }
        let near = Self { main, urgent, pages, tls: client };
        Ok((near, Self { main: main_far, urgent: urgent_far, pages: pages_far, tls: server }))
    }

    /// Makes channels of them: the main one, and those for pages, if there are any.
    ///
    /// # Errors
    ///
    /// When TLS does not come about.
    pub fn channels(self, progress: &Arc<Progress>) -> Result<Channels> {
        let Self { main, urgent, pages, tls } = self;
        let channel = |socket: UnixStream| -> Result<Channel> {
            Ok(match &tls {
                None => Channel::new(socket, Arc::clone(progress))?,
                Some(Tls::Client(client)) => client.connect(socket, progress)?,
                Some(Tls::Server(server)) => server.accept(socket, progress)?,
            })
        };
        let main = channel(main)?;
        let pages: Vec<_> = pages.into_iter().map(channel).collect::<Result<_>>()?;
        let pages = (!pages.is_empty()).then(|| PageChannels::new(pages)).transpose()?;
        Ok(Channels { main, urgent, pages })
    }
}

/// One side's channels.
pub struct Channels {
    /// The main one.
    pub main: Channel,
    /// For pages that are asked for in postcopy: not a channel unless it is used.
    pub urgent: UnixStream,
    /// For pages.
    pub pages: Option<PageChannels>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_link_has_a_name_and_what_both_sides_have_to_know() {
        let names = Link::ALL.map(Link::name);
        for (index, name) in names.iter().enumerate() {
            assert!(!names[..index].contains(name), "{name} twice");
        }
        for link in Link::ALL {
            let configuration = link.configuration();
            assert_eq!(configuration.has(CAPABILITY_MULTIFD), link.channels != 0, "{link:?}");
            assert_eq!(configuration.uuid.is_some(), link.channels != 0, "{link:?}");
        }
        for link in Link::COMPRESSED {
            assert_eq!(link.configuration().has(CAPABILITY_MULTIFD_ZSTD), link.zstd, "{link:?}");
            assert_eq!(link.name().ends_with("zstd"), link.zstd, "{link:?}");
        }
        assert_eq!(Link::ALL[0], Link::default());
    }
}
