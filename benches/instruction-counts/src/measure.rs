//! Running all the paths.

use std::path::Path;
use std::sync::Mutex;
use std::thread;

use anyhow::{Result, bail};

use crate::callgrind;
use crate::figure::{Figure, Figures};
use crate::paths::HotPath;

/// Runs the paths, as many at once as there are processors: counts do not suffer from neighbours.
pub fn measure(paths: &[&HotPath], dir: &Path) -> Result<Figures> {
    let rest = Mutex::new(paths.iter());
    let figures = Mutex::new(Figures::new());
    let failures = Mutex::new(Vec::new());
    let worker = || {
        loop {
            let next = rest.lock().expect("no worker panics").next();
            let Some(path) = next else { return };
            match figure_of(path, dir) {
                Ok(figure) => {
                    let mut figures = figures.lock().expect("no worker panics");
                    figures.insert(path.name.to_owned(), figure);
                }
                Err(error) => {
                    let failure = format!("{}: {error:#}", path.name);
                    failures.lock().expect("no worker panics").push(failure);
                }
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(worker);
        }
    });
    let failures = failures.into_inner().expect("no worker panics");
    if !failures.is_empty() {
        bail!("{}", failures.join("\n"));
    }
    Ok(figures.into_inner().expect("no worker panics"))
}

fn figure_of(path: &HotPath, dir: &Path) -> Result<Figure> {
    let profile = dir.join(format!("{}.callgrind", path.name.replace('/', ".")));
    let counted = callgrind::run(path.name, &profile)?;
    Ok(Figure::new(counted.instructions, counted.units, path.per))
}
