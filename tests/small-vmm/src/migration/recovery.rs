//! The channels of a migration in postcopy: the stream, and one for the pages that the guest waits
//! for. When they break, the source connects again and the destination waits for it, until
//! the migration is cancelled.
//!
//! Both channels are connections to the same address, told apart by their order.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use migration::lazy::HandlerFailed;
use migration::postcopy::{
    Channels, GiveUp, OnListen, PostcopyIncoming, PostcopyOutgoing, Reconnect, SwitchWhen,
};
use migration::ram::{PageChannels, RamBlocks};
use migration::{Channel, MigrationError, Progress};

use super::transport::{self, Listener};
use super::{Links, PostcopyOptions, When};
use crate::machine::Machine;

/// Between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(20);

/// Postcopy on the source, whose stream goes `to` an address.
pub(super) fn outgoing(
    to: &str,
    links: &Links,
    options: &PostcopyOptions,
    progress: &Arc<Progress>,
) -> anyhow::Result<PostcopyOutgoing<'static>> {
    let when = match options.when {
        When::Told => SwitchWhen::Told,
        When::AtOnce => SwitchWhen::AtOnce,
        When::Rounds(rounds) => SwitchWhen::Rounds(rounds),
    };
    let urgent = transport::channel_to(to, links, progress)?;
    let reconnect: Box<dyn Reconnect> = match &options.recover {
        Some(to) => {
            let (to, links, progress) = (to.clone(), links.clone(), Arc::clone(progress));
            Box::new(Connect { to, links, progress })
        }
        None => Box::new(GiveUp),
    };
    Ok(PostcopyOutgoing { when, urgent: Some(urgent), reconnect })
}

/// Postcopy on the destination, with what is done when memory is about to arrive.
pub(super) fn incoming<'a>(
    (listener, links): (&'a Listener, Links),
    urgent: Option<Channel>,
    blocks: Arc<RamBlocks>,
    machine: &Arc<Machine>,
    progress: &Arc<Progress>,
    listening: Option<OnListen<'a>>,
) -> PostcopyIncoming<'a> {
    PostcopyIncoming {
        blocks,
        urgent,
        reconnect: Box::new(Accept { listener, links, progress: Arc::clone(progress) }),
        failed: Arc::clone(machine) as Arc<dyn HandlerFailed>,
        listening,
    }
}

/// Waits for the source's channels.
pub(super) fn accept(
    listener: &Listener,
    postcopy: bool,
    links: &Links,
    progress: &Arc<Progress>,
) -> anyhow::Result<Channels> {
    let next = || listener.channel(links, progress);
    let mut main = next()?;
    let mut urgent = None;
    while postcopy && urgent.is_none() {
        let other = next()?;
        // A source that could make only one connection has begun anew.
        if main.is_hung_up() {
            main = other;
        } else {
            urgent = Some(other);
        }
    }
    Ok(Channels { main, urgent })
}

/// Waits for the source's channels for pages, if there are to be any.
pub(super) fn accept_pages(
    listener: &Listener,
    links: &Links,
    progress: &Arc<Progress>,
) -> anyhow::Result<Option<PageChannels>> {
    if links.channels == 0 {
        return Ok(None);
    }
    let channels = (0..links.channels).map(|_| listener.channel(links, progress));
    Ok(Some(PageChannels::new(channels.collect::<anyhow::Result<_>>()?)?))
}

struct Connect {
    to: String,
    links: Links,
    progress: Arc<Progress>,
}

impl Connect {
    fn connect(&self) -> anyhow::Result<Channels> {
        let one = || -> anyhow::Result<Channel> {
            // Once the guest has left, cancelling ends the attempts, and not what works.
            Ok(transport::channel_to(&self.to, &self.links, &self.progress)?.uncancellable())
        };
        Ok(Channels { main: one()?, urgent: Some(one()?) })
    }
}

impl Reconnect for Connect {
    fn reconnect(&mut self, _error: &MigrationError) -> Option<Channels> {
        while !self.progress.is_cancelled() {
            if let Ok(channels) = self.connect() {
                return Some(channels);
            }
            thread::sleep(PAUSE);
        }
        None
    }
}

struct Accept<'a> {
    listener: &'a Listener,
    links: Links,
    progress: Arc<Progress>,
}

impl Reconnect for Accept<'_> {
    fn reconnect(&mut self, _error: &MigrationError) -> Option<Channels> {
        let Channels { main, urgent } =
            accept(self.listener, true, &self.links, &self.progress).ok()?;
        let urgent = urgent.as_ref().map(Channel::uncancellable);
        Some(Channels { main: main.uncancellable(), urgent })
    }
}
