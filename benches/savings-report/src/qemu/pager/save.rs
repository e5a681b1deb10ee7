//! Saves of a guest, by QEMU itself, by the pager, and by a loop that does nothing but read and write.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use real_guest::machine::Parts;
use real_guest::pager::vm::{Shape, Vm};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::VERIFIED;
use super::process::Pager;
use crate::host;
use crate::units::{GIB, MIB, millis};

/// Who saves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Who {
    /// QEMU, to a mapped-ram file.
    Qemu,
    /// A loop that reads what QEMU sends, and writes the same bytes.
    Loop,
    /// The pager.
    Pager,
}

impl Who {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Qemu, Self::Loop, Self::Pager];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "QEMU, `file:` with mapped-ram",
            Self::Loop => "a bare loop",
            Self::Pager => "`vmem-pager save`",
        }
    }
}

/// One save. Times are milliseconds, sizes bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Saved {
    /// By whom.
    pub who: Who,
    /// From the command to when everything was written and QEMU said so.
    pub written: f64,
    /// The same, until it was on the disk.
    pub total: f64,
    /// What the disk holds for it.
    pub held: u64,
    /// What the pager held, and its processor time.
    pub pager: Option<(u64, f64)>,
}

/// A paused guest that is saved again and again.
pub struct Saver<'a> {
    parts: &'a Parts<'a>,
    /// It.
    pub vm: Vm,
    file: PathBuf,
}

impl<'a> Saver<'a> {
    /// Boots a guest, and pauses it once it has touched its memory.
    pub fn boot(parts: &'a Parts<'a>, shape: Shape, dir: &Path) -> Result<Self> {
        let mut vm = Vm::boot(parts, shape, VERIFIED, dir)?;
        vm.qmp.execute("stop", &json!({}))?;
        vm.qmp.execute("migrate-set-parameters", &json!({ "max-bandwidth": 0 }))?;
        let file = vm.dir().join("saved");
        Ok(Self { parts, vm, file })
    }

    /// Ends the guest.
    pub fn stop(self) {
        self.vm.stop();
    }

    /// What has been saved has to run before it is saved again.
    pub fn again(&mut self) -> Result<()> {
        self.vm.qmp.execute("cont", &json!({}))?;
        self.vm.qmp.execute("stop", &json!({})).map(drop)
    }

    /// Saves it by the pager, which says what it took.
    pub fn save_by_us(&self, image: &Path) -> Result<(u64, f64)> {
        let mut words = vec!["save".to_owned()];
        let socket = self.vm.dir().join("save.sock");
        for (option, path) in
            [("--socket", socket.as_path()), ("--image", image), ("--qmp", &self.vm.pager_qmp())]
        {
            words.extend([option.to_owned(), path.display().to_string()]);
        }
        let took = Pager::start(self.parts, &words)?.wait()?;
        ensure!(took.summary["event"] == "saved", "the pager's last word is {}", took.summary);
        Ok((took.held, took.cpu))
    }

    /// Saves it once.
    pub fn save(&mut self, who: Who) -> Result<Saved> {
        if self.file.exists() {
            fs::remove_file(&self.file)?;
        }
        self.again()?;
        host::warm(GIB)?;
        let begun = Instant::now();
        let mut pager = None;
        match who {
            Who::Qemu => {
                self.vm.qmp.migrate(&format!("file:{}", self.file.display()), true)?;
            }
            Who::Loop => self.loop_over_socket()?,
            Who::Pager => pager = Some(self.save_by_us(&self.file)?),
        }
        let written = millis(begun.elapsed());
        let file = File::open(&self.file)?;
        file.sync_all()?;
        let total = millis(begun.elapsed());
        let held = host::resident(&file)?;
        if who == Who::Qemu {
            self.vm.set_capabilities(&[("mapped-ram", false)])?;
        }
        Ok(Saved { who, written, total, held, pager })
    }

    fn loop_over_socket(&mut self) -> Result<()> {
        let socket = self.vm.dir().join("loop.sock");
        let listener = UnixListener::bind(&socket)?;
        let file = self.file.clone();
        let copying = thread::spawn(move || -> Result<()> {
            let (mut from, _) = listener.accept()?;
            let mut to = File::create(file)?;
            let mut bytes = vec![0; MIB as usize];
            loop {
                match from.read(&mut bytes)? {
                    0 => return Ok(()),
                    read => to.write_all(&bytes[..read])?,
                }
            }
        });
        self.vm.qmp.migrate(&format!("unix:{}", socket.display()), false)?;
        let copied = copying.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        fs::remove_file(&socket)?;
        copied.context("the bare loop")
    }
}
