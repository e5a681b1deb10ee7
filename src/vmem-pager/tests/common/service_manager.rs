//! A service manager that keeps descriptors over the death of its service.

use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use program::service_manager::fake::FakeManager;

/// How long it waits to be told something.
const PATIENCE: Duration = Duration::from_secs(60);

/// The service manager, and what it knows of its service.
#[derive(Default)]
pub struct ServiceManager {
    manager: FakeManager,
    /// The descriptors with their names.
    pub kept: Vec<(String, OwnedFd)>,
    /// What it was told, word for word.
    pub told: Vec<String>,
}

impl ServiceManager {
    /// Hears what it is told until `has` is so.
    pub fn wait(&mut self, has: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !has(self) {
            let left = deadline.saturating_duration_since(Instant::now());
            let told = self.manager.next_within(left);
            let told = told.unwrap_or_else(|| panic!("{:?} was told, and no more", self.told));
            let name = told.value("FDNAME").unwrap_or("stored").to_owned();
            let is = |key| told.value(key) == Some("1");
            let (stores, removes) = (is("FDSTORE"), is("FDSTOREREMOVE"));
            if stores {
                self.kept.extend(told.fds.into_iter().map(|fd| (name.clone(), fd)));
            }
            if removes {
                self.kept.retain(|(kept, _)| *kept != name);
            }
            self.told.push(told.text);
        }
    }

    /// Starts a program as its service, with what it has kept.
    pub fn start(&self, program: &str, start: impl FnOnce(&mut Command) -> Child) -> Child {
        let kept: Vec<_> = self.kept.iter().map(|(name, fd)| (name.as_str(), fd)).collect();
        let (mut command, _inheriting) = self.manager.command(program.as_ref(), &kept);
        start(command.env("FDSTORE", "8"))
    }
}
