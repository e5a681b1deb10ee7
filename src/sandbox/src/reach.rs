//! What a process may reach: files, TCP ports, and processes. Landlock holds it to that.

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, NetPort, PathBeneath,
    PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope, make_bitflags,
};
use rustix::fs::{Access as Permission, AtFlags, CWD, accessat};

use crate::{SandboxError, own_code};

/// What is handled where the kernel can; an older one handles less of it.
const HANDLED: ABI = ABI::V6;

/// Files, ports and processes that may be reached by name, where they are there. What is open already stays so.
#[derive(Clone, Debug, Default)]
pub struct Reach {
    files: Vec<Rule>,
    listen: Vec<u16>,
    connect: Vec<u16>,
    signals: bool,
    abstract_sockets: bool,
}

#[derive(Clone, Debug)]
struct Rule {
    path: PathBuf,
    access: BitFlags<AccessFs>,
}

/// The folder of a path.
fn folder_of(path: &Path) -> PathBuf {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new(".")).to_owned()
}

impl Reach {
    /// Nothing.
    pub fn new() -> Self {
        Self::default()
    }

    fn rule(mut self, path: &Path, access: BitFlags<AccessFs>) -> Self {
        self.files.push(Rule { path: path.to_owned(), access });
        self
    }

    /// Reads a file, or everything in a folder.
    #[must_use]
    pub fn read(self, path: &Path) -> Self {
        self.rule(path, make_bitflags!(AccessFs::{ReadFile | ReadDir}))
    }

    /// Reads what libraries read wherever they run: `/proc`, and how many processors there are (glibc).
    #[must_use]
    pub fn runtime(self) -> Self {
        // procfs makes files anew when memory is short, and a rule for one of them would be lost. Of other processes
        // nothing is shown that is not shown to all: Landlock counts as tracing.
        self.read(Path::new("/proc")).read(Path::new("/sys/devices/system/cpu"))
    }

    /// Executes this program once more, with its libraries.
    ///
    /// # Errors
    ///
    /// When `/proc` does not tell what it is made of.
    pub fn execute_itself(self) -> io::Result<Self> {
        let access = make_bitflags!(AccessFs::{ReadFile | ReadDir | Execute});
        let own = own_code::paths()?;
        let reach = own.iter().fold(self, |reach, path| reach.rule(path, access));
        // Where the loader looks for them first.
        Ok(reach.read(Path::new("/etc/ld.so.cache")))
    }

    /// Removes the file at `path`: any file in its folder, since Landlock knows folders only.
    #[must_use]
    pub fn remove(self, path: &Path) -> Self {
        self.rule(&folder_of(path), AccessFs::RemoveFile.into())
    }

    /// Makes the file at `path`, or another one in its place: any file in its folder.
    #[must_use]
    pub fn replace(self, path: &Path) -> Self {
        let access = make_bitflags!(AccessFs::{
            ReadFile | ReadDir | WriteFile | Truncate | MakeReg | RemoveFile
        });
        self.rule(&folder_of(path), access)
    }

    /// Listens on a Unix socket at `path`, with a lock beside it: any in its folder.
    #[must_use]
    pub fn listen(self, path: &Path) -> Self {
        let access = make_bitflags!(AccessFs::{
            ReadFile | WriteFile | MakeReg | MakeSock | RemoveFile
        });
        self.rule(&folder_of(path), access)
    }

    /// Listens on a TCP port.
    #[must_use]
    pub fn listen_tcp(mut self, port: u16) -> Self {
        self.listen.push(port);
        self
    }

    /// Connects to a TCP port.
    #[must_use]
    pub fn connect_tcp(mut self, port: u16) -> Self {
        self.connect.push(port);
        self
    }

    /// Sends signals to any process that its user may signal.
    #[must_use]
    pub fn signal(mut self) -> Self {
        self.signals = true;
        self
    }

    /// Tells the service manager, which may be at an abstract socket, if there is one.
    #[must_use]
    pub fn service_manager(mut self) -> Self {
        let socket = std::env::var_os("NOTIFY_SOCKET");
        self.abstract_sockets |=
            socket.is_some_and(|name| name.as_encoded_bytes().starts_with(b"@"));
        self
    }

    /// What the user of this process may not do without capabilities, although it is within reach: folders
    /// from which sockets could not be removed at the end.
    pub(crate) fn out_of_permissions(&self) -> Vec<String> {
        let removes = self.files.iter().filter(|rule| rule.access.contains(AccessFs::RemoveFile));
        let mut folders: Vec<&Path> = removes.map(|rule| rule.path.as_path()).collect();
        folders.sort_unstable();
        folders.dedup();
        let wanted = Permission::WRITE_OK | Permission::EXEC_OK;
        folders.retain(|folder| accessat(CWD, *folder, wanted, AtFlags::EACCESS).is_err());
        let note = |folder: &Path| {
            format!(
                "--sandbox on: without capabilities this user cannot write to {}: files will be left there at the \
                 end; start it with --user and the owner of that folder",
                folder.display()
            )
        };
        folders.into_iter().map(note).collect()
    }

    /// Confines the calling thread, and all that it starts.
    pub(crate) fn restrict(&self) -> Result<(), SandboxError> {
        const SET_UP: &str = "set up Landlock";
        let failed = || SandboxError::failed(SET_UP);
        let mut scopes = BitFlags::<Scope>::EMPTY;
        if !self.signals {
            scopes |= Scope::Signal;
        }
        if !self.abstract_sockets {
            scopes |= Scope::AbstractUnixSocket;
        }
        let mut ruleset = Ruleset::default()
            .handle_access(AccessFs::from_all(HANDLED))
            .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(HANDLED)))
            .map_err(failed())?;
        if !scopes.is_empty() {
            ruleset = ruleset.scope(scopes).map_err(failed())?;
        }
        let mut created = ruleset.create().map_err(failed())?;
        for Rule { path, access } in &self.files {
            // Nothing can be done with what is not there, or out of reach anyway; that is told when it is tried.
            let Ok(file) = PathFd::new(path) else { continue };
            // Rights that only folders have are none of a file's.
            let access =
                if path.is_dir() { *access } else { *access & AccessFs::from_file(HANDLED) };
            created = created.add_rule(PathBeneath::new(file, access)).map_err(failed())?;
        }
        for port in &self.listen {
            created = created.add_rule(NetPort::new(*port, AccessNet::BindTcp)).map_err(failed())?;
        }
        for port in &self.connect {
            created =
                created.add_rule(NetPort::new(*port, AccessNet::ConnectTcp)).map_err(failed())?;
        }
        let status = created.restrict_self().map_err(failed())?;
        match status.ruleset {
            RulesetStatus::NotEnforced => {
                Err(SandboxError::failed(SET_UP)("the kernel does not enforce it"))
            }
            _ => Ok(()),
        }
    }
}

/// Whether the kernel can hold a process to files.
pub(crate) fn is_supported() -> bool {
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))
        .and_then(Ruleset::create)
        .is_ok()
}
