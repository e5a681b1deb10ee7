//! What the service manager is told, and the sockets that it passes and keeps.
//!
//! The sockets have names, for `LISTEN_FDNAMES` (`FileDescriptorName=` of a socket unit):
//!
//! | name | socket | option |
//! | --- | --- | --- |
//! | `front-end` | the front-end's | `--socket-path` |
//! | `api` | the management API's | `--api-socket` |
//! | `metrics` | the scrapers' | `--metrics-socket` |
//! | `discard` | the discard channel's | `--discard-socket` |
//!
//! One that is passed is served, with its option or without. Where the manager keeps descriptors
//! (FDSTORE), sockets that the daemon has bound itself are stored with it under the same names, with
//! their locks as `NAME.lock`: after an upgrade the next daemon serves who waits there. Their files then
//! stay when the daemon ends.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use program::listener;
use program::service_manager::{self, NotifyState, Passed, ServiceManager};

use crate::args::{ArgsError, Config, Endpoint};
use crate::watchdog::Watchdog;

/// What is added to the name of a socket for its lock.
const LOCK: &str = ".lock";

/// The service manager, if there is one.
#[derive(Clone, Debug)]
pub struct Supervision {
    manager: Option<Arc<ServiceManager>>,
}

impl Supervision {
    /// As the environment says. Without a manager, or with one that cannot be reached, nothing is told.
    pub fn from_env() -> Self {
        let manager = ServiceManager::from_env().unwrap_or_else(|error| {
            tracing::warn!(%error, "the service manager is told nothing");
            None
        });
        Self { manager: manager.map(Arc::new) }
    }

    /// The watchdog, if the manager has one for this process.
    ///
    /// # Errors
    ///
    /// When there is no timer or no thread to be had.
    pub fn watchdog(&self) -> anyhow::Result<Option<Arc<Watchdog>>> {
        let (Some(manager), Some(timeout)) = (&self.manager, service_manager::watchdog()) else {
            return Ok(None);
        };
        let watchdog = Watchdog::start(Arc::clone(manager), timeout);
        watchdog.map(Some).context("cannot feed the service manager's watchdog")
    }

    /// Everything listens.
    pub fn ready(&self) {
        let Some(manager) = &self.manager else { return };
        // Also a daemon that has started itself anew is the main process.
        let pid = NotifyState::MainPid(std::process::id());
        if let Err(error) = manager.tell(&[NotifyState::Ready, pid]) {
            tracing::warn!(%error, "the service manager does not know that the daemon is ready");
        }
    }

    /// The daemon ends. Waits for nothing.
    pub fn stopping(&self) {
        if let Some(manager) = &self.manager {
            let _ = manager.tell_now(&[NotifyState::Stopping]);
        }
    }

    /// Reads anew what can be, and tells the manager when that is done. Waits for nothing.
    pub fn reload(&self, reload: impl FnOnce()) {
        let told = self.manager.as_ref().filter(|manager| {
            service_manager::reloading().and_then(|states| manager.tell_now(&states)).is_ok()
        });
        reload();
        if let Some(manager) = told
            && let Err(error) = manager.tell_now(&[NotifyState::Ready])
        {
            tracing::warn!(%error, "the service manager does not know that the reload is done");
        }
    }

    /// Takes over the sockets that came with the start: their paths become those of the configuration.
    ///
    /// # Errors
    ///
    /// When one cannot be used, or is elsewhere than its option says, or there is none for front-ends.
    pub fn take_sockets(&self, config: &mut Config) -> anyhow::Result<()> {
        let mut passed = Passed::from_env()?;
        let mut front_end = match &config.endpoint {
            Endpoint::Path(path) => Some(path.clone()),
            Endpoint::Fd(fd) => {
                passed.leave(*fd);
                None
            }
            Endpoint::Passed => None,
        };
        for (name, option, path) in sockets(&mut front_end, config) {
            self.take_socket(&mut passed, name, option, path)?;
        }
        match (&config.endpoint, front_end) {
            (Endpoint::Fd(_), None) => {}
            (Endpoint::Fd(_), Some(_)) => {
                let rule = "the service manager passes a socket for front-ends as well";
                return Err(ArgsError::new("fd", "", rule).into());
            }
            (_, Some(path)) => config.endpoint = Endpoint::Path(path),
            (_, None) => {
                let rule = "neither it nor --fd is given, and the service manager passes no socket \
                            named front-end";
                return Err(ArgsError::new("socket-path", "", rule).into());
            }
        }
        for name in passed.names() {
            tracing::warn!(
                name,
                "not used: a descriptor that the service manager passed; the \
                names of sockets are front-end, api, metrics and discard"
            );
        }
        Ok(())
    }

    fn take_socket(
        &self,
        passed: &mut Passed,
        name: &'static str,
        option: &'static str,
        path: &mut Option<PathBuf>,
    ) -> anyhow::Result<()> {
        let lock_name = format!("{name}{LOCK}");
        let of = || format!("the socket {name} that the service manager passes");
        let Some(socket) = passed.take(name).with_context(of)? else { return Ok(()) };
        let lock = passed.take(&lock_name).with_context(of)?;
        let was_stored = lock.is_some();
        match listener::adopt(socket, lock, path.as_deref()) {
            Ok(found) => *path = Some(found),
            // Of another configuration, or removed meanwhile: it is bound anew.
            Err(error) if was_stored => {
                tracing::warn!(%error, name, "binding anew: what the service manager has kept is of no use");
                if let Some(manager) = &self.manager {
                    manager
                        .forget(name)
                        .and_then(|()| manager.forget(&lock_name))
                        .with_context(of)?;
                }
            }
            Err(error) => {
                let value = path.as_deref().map(|path| path.display().to_string());
                let rule = format!("the service manager passes another socket: {error}");
                return Err(ArgsError::new(option, &value.unwrap_or_default(), rule).into());
            }
        }
        Ok(())
    }

    /// Has the manager keep the sockets that the daemon has bound, if it keeps anything.
    ///
    /// # Errors
    ///
    /// When it does not take them.
    pub fn store_sockets(&self, config: &mut Config) -> anyhow::Result<()> {
        let Some(manager) = self.manager.as_ref().filter(|manager| manager.stores()) else {
            return Ok(());
        };
        let mut front_end = match &config.endpoint {
            Endpoint::Path(path) => Some(path.clone()),
            Endpoint::Fd(_) | Endpoint::Passed => None,
        };
        let named = sockets(&mut front_end, config).map(|(name, _, path)| (name, path.clone()));
        let stored = listener::with_bound(|bound| {
            for bound in bound {
                let Some(file) = &bound.file else { continue };
                let name = named.iter().find(|(_, path)| path.as_ref() == Some(&bound.path));
                let Some((name, _)) = name else { continue };
                manager.store(name, &[bound.listener.as_fd()])?;
                manager.store(&format!("{name}{LOCK}"), &[file.lock.as_fd()])?;
            }
            std::io::Result::Ok(())
        });
        stored.context("cannot have the service manager keep the sockets")?;
        listener::keep_files();
        Ok(())
    }
}

/// The sockets by name, with their options and paths.
fn sockets<'a>(
    front_end: &'a mut Option<PathBuf>,
    config: &'a mut Config,
) -> [(&'static str, &'static str, &'a mut Option<PathBuf>); 4] {
    [
        ("front-end", "socket-path", front_end),
        ("api", "api-socket", &mut config.api_socket),
        ("metrics", "metrics-socket", &mut config.metrics_socket),
        ("discard", "discard-socket", &mut config.discard_socket),
    ]
}
