//! The memory of a guest as Firecracker writes it: a flat file, and diff files of the same length above it.
//!
//! A diff has data where pages were written since the file below, and holes elsewhere. Files are only read.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::error::PagerError;

/// Bytes of a guest page, of which memory files are multiples.
const PAGE: u64 = 4096;

/// A base and any number of diffs.
#[derive(Debug)]
pub struct MemoryFiles {
    layers: Vec<Layer>,
    /// Where there is data and in which layer, ascending and disjoint.
    extents: Vec<Extent>,
    len: u64,
}

#[derive(Debug)]
struct Layer {
    path: PathBuf,
    file: File,
    /// Bytes with data, also where a layer above has some.
    data: u64,
    /// Time of the last change, when it was opened.
    changed: (i64, i64),
}

/// What a file has, and how much of it a guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerFigures<'a> {
    /// Its path.
    pub path: &'a Path,
    /// Bytes with data.
    pub data: u64,
    /// Those of them that no file above covers.
    pub used: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Extent {
    bytes: Range<u64>,
    layer: usize,
}

impl MemoryFiles {
    /// Opens a base and the diffs above it, in the order in which they were made.
    ///
    /// # Errors
    ///
    /// When one cannot be read, is not a regular file, or has another length than the base.
    pub fn open(paths: &[PathBuf]) -> Result<Self, PagerError> {
        let layers = paths.iter().map(|path| open(path)).collect::<Result<Vec<_>, _>>()?;
        let Some((base, _)) = layers.first() else {
            let what = "--memory-file FILE is needed: the memory of the snapshot";
            return Err(PagerError::Usage(what.to_owned()));
        };
        let (len, base) = (base.len, base.layer.path.clone());
        for (Opened { layer, len: other }, _) in &layers {
            if *other != len {
                let what = format!(
                    "{other} bytes, but the memory file below, {}, has {len}: a diff has the length of its base",
                    base.display()
                );
                return Err(PagerError::Image { path: layer.path.clone(), what });
            }
        }
        let mut extents = Vec::new();
        for (layer, (_, data)) in layers.iter().enumerate().rev() {
            extents = beneath(extents, data, layer);
        }
        let layers = layers.into_iter().map(|(opened, _)| opened.layer).collect();
        Ok(Self { layers, extents, len })
    }

    /// Length in bytes, of the base as of each diff.
    #[expect(clippy::len_without_is_empty, reason = "an empty one is refused")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Bytes with data.
    pub fn data_bytes(&self) -> u64 {
        self.extents.iter().map(|extent| extent.bytes.end - extent.bytes.start).sum()
    }

    /// The files, the base first.
    pub fn layers(&self) -> impl Iterator<Item = LayerFigures<'_>> {
        let mut used = vec![0; self.layers.len()];
        for extent in &self.extents {
            used[extent.layer] += extent.bytes.end - extent.bytes.start;
        }
        self.layers.iter().zip(used).map(|(layer, used)| {
            let Layer { path, data, .. } = layer;
            LayerFigures { path, data: *data, used }
        })
    }

    /// Where there is data inside `bytes`, ascending.
    pub fn data(&self, bytes: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        self.within(bytes).map(|(bytes, _)| bytes)
    }

    fn within(&self, bytes: Range<u64>) -> impl Iterator<Item = (Range<u64>, usize)> {
        let first = self.extents.partition_point(|extent| extent.bytes.end <= bytes.start);
        let rest = self.extents[first..].iter();
        rest.take_while(move |extent| extent.bytes.start < bytes.end).map(move |extent| {
            let start = extent.bytes.start.max(bytes.start);
            (start..extent.bytes.end.min(bytes.end), extent.layer)
        })
    }

    /// Reads from `offset`: the topmost layer with data, zeros where none has. Holes are not read.
    ///
    /// # Errors
    ///
    /// When a file cannot be read, also because it has become shorter.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), PagerError> {
        let mut done = 0;
        for (bytes, layer) in self.within(offset..offset + to.len() as u64) {
            let (start, end) = ((bytes.start - offset) as usize, (bytes.end - offset) as usize);
            to[done..start].fill(0);
            let Layer { path, file, .. } = &self.layers[layer];
            let read = file.read_exact_at(&mut to[start..end], bytes.start);
            read.map_err(PagerError::file("read memory from", path))?;
            done = end;
        }
        to[done..].fill(0);
        Ok(())
    }

    /// What is odd about the files, to be told before they are served.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        for (index, layer) in self.layers.iter().enumerate().skip(1) {
            let own = self.extents.iter().filter(|extent| extent.layer >= index);
            let covered: u64 = own.map(|extent| extent.bytes.end - extent.bytes.start).sum();
            if covered == self.len {
                warnings.push(format!(
                    "{}: the diff has no holes, so that nothing of the files below is used; a copy that does not keep \
                     holes (cp --sparse=never, most archives) makes such a file",
                    layer.path.display()
                ));
            }
        }
        warnings
    }

    /// The files that were written to since they were opened: what was read of them may be a mixture.
    pub fn changed(&self) -> Vec<&Path> {
        let changed = |layer: &&Layer| {
            layer.file.metadata().map_or(true, |metadata| {
                (metadata.mtime(), metadata.mtime_nsec()) != layer.changed
                    || metadata.len() != self.len
            })
        };
        self.layers.iter().filter(changed).map(|layer| layer.path.as_path()).collect()
    }
}

struct Opened {
    layer: Layer,
    len: u64,
}

fn open(path: &Path) -> Result<(Opened, Vec<Range<u64>>), PagerError> {
    let failed = || PagerError::file("read memory from", path);
    let file = File::open(path).map_err(failed())?;
    let metadata = file.metadata().map_err(failed())?;
    let refused = |what: String| PagerError::Image { path: path.to_owned(), what };
    if !metadata.is_file() {
        return Err(refused("not a regular file: expected a snapshot's memory file".to_owned()));
    }
    let len = metadata.len();
    if len == 0 || !len.is_multiple_of(PAGE) || len > i64::MAX as u64 {
        let what = format!("{len} bytes: a memory file is a multiple of {PAGE}, and not empty");
        return Err(refused(what));
    }
    let data = data_of(&file, len).map_err(failed())?;
    let changed = (metadata.mtime(), metadata.mtime_nsec());
    let bytes = data.iter().map(|range| range.end - range.start).sum();
    let layer = Layer { path: path.to_owned(), file, data: bytes, changed };
    Ok((Opened { layer, len }, data))
}

/// Where a file has data, ascending.
fn data_of(file: &File, len: u64) -> io::Result<Vec<Range<u64>>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while at < len {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            // A file system that knows nothing of holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(errno) => return Err(errno.into()),
        };
        let end = seek(file, SeekFrom::Hole(start)).unwrap_or(len).min(len);
        if start >= len || end <= start {
            break;
        }
        match found.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => found.push(start..end),
        }
        at = end;
    }
    Ok(found)
}

/// `above`, and of `data` what is not covered by it.
fn beneath(above: Vec<Extent>, data: &[Range<u64>], layer: usize) -> Vec<Extent> {
    let mut all = Vec::with_capacity(above.len() + data.len());
    let mut covers = above.into_iter().peekable();
    for range in data {
        let mut start = range.start;
        while start < range.end {
            let Some(cover) = covers.peek().filter(|cover| cover.bytes.start < range.end) else {
                all.push(Extent { bytes: start..range.end, layer });
                break;
            };
            if start < cover.bytes.start {
                all.push(Extent { bytes: start..cover.bytes.start, layer });
            }
            start = start.max(cover.bytes.end);
            // One that reaches further covers the next range, too.
            if cover.bytes.end <= range.end {
                all.extend(covers.next());
            }
        }
    }
    all.extend(covers);
    all.sort_unstable_by_key(|extent| extent.bytes.start);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = 24;

    fn file(dir: &Path, name: &str, pages: &[(u64, u8)]) -> PathBuf {
        let path = dir.join(name);
        let file = File::create(&path).unwrap();
        file.set_len(PAGES * PAGE).unwrap();
        for (page, byte) in pages {
            file.write_all_at(&[*byte; PAGE as usize], page * PAGE).unwrap();
        }
        path
    }

    #[test]
    fn holes_are_zeros_and_a_diff_covers_its_base() {
        let dir = tempfile::tempdir().unwrap();
        let base = file(dir.path(), "base", &[(1, 1), (2, 2), (3, 3)]);
        let diff = file(dir.path(), "diff", &[(2, 20), (9, 90)]);
        let files = MemoryFiles::open(&[base, diff]).unwrap();
        let mut bytes = vec![0xaa; (5 * PAGE) as usize];
        files.read(0, &mut bytes).unwrap();
        let firsts: Vec<u8> = bytes.iter().copied().step_by(PAGE as usize).collect();
        assert_eq!(firsts, [0, 1, 20, 3, 0]);
        assert_eq!(files.data_bytes(), 4 * PAGE);
        let data: Vec<_> = files.data(0..PAGES * PAGE).collect();
        assert_eq!(data.last(), Some(&(9 * PAGE..10 * PAGE)));
        assert!(files.warnings().is_empty() && files.changed().is_empty());
    }

    #[test]
    fn what_is_not_a_memory_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let base = file(dir.path(), "base", &[]);
        let short = dir.path().join("short");
        File::create(&short).unwrap().set_len(PAGE).unwrap();
        let refused = |paths: &[PathBuf]| MemoryFiles::open(paths).unwrap_err().to_string();
        assert!(refused(&[base.clone(), short]).contains("has the length of its base"));
        assert!(refused(&[dir.path().to_owned()]).contains("not a regular file"));
        let empty = dir.path().join("empty");
        File::create(&empty).unwrap();
        assert!(refused(&[empty]).contains("not empty"));
        assert!(refused(&[dir.path().join("none")]).contains("none"));
        assert_eq!(MemoryFiles::open(&[]).unwrap_err().exit_status(), 2);
    }

    #[test]
    fn a_file_that_changes_or_has_lost_its_holes_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let base = file(dir.path(), "base", &[(1, 1)]);
        let all: Vec<(u64, u8)> = (0..PAGES).map(|page| (page, 9)).collect();
        let diff = file(dir.path(), "diff", &all);
        let files = MemoryFiles::open(&[base.clone(), diff]).unwrap();
        assert!(files.warnings()[0].contains("no holes"));
        File::options().write(true).open(&base).unwrap().set_len(PAGE).unwrap();
        assert_eq!(files.changed(), [base.as_path()]);
    }

    #[test]
    fn a_file_that_was_cut_is_an_error_and_not_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let base = file(dir.path(), "base", &[(1, 1), (2, 2)]);
        let files = MemoryFiles::open(std::slice::from_ref(&base)).unwrap();
        File::options().write(true).open(&base).unwrap().set_len(2 * PAGE).unwrap();
        files.read(PAGE, &mut [0; PAGE as usize]).unwrap();
        assert!(files.read(2 * PAGE, &mut [0; PAGE as usize]).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_layers_read_as_files_written_over_each_other(
            layers in prop::collection::vec(prop::collection::vec((0..PAGES, 1u8..), 0..12), 1..4),
            (from, to) in (0..PAGES * PAGE, 0..PAGES * PAGE),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut expected = vec![0; (PAGES * PAGE) as usize];
            let mut paths = Vec::new();
            for (index, pages) in layers.iter().enumerate() {
                paths.push(file(dir.path(), &index.to_string(), pages));
                for (page, byte) in pages {
                    expected[(page * PAGE) as usize..][..PAGE as usize].fill(*byte);
                }
            }
            let files = MemoryFiles::open(&paths).unwrap();
            let (from, to) = (from.min(to), from.max(to));
            let mut bytes = vec![0xaa; (to - from) as usize];
            files.read(from, &mut bytes).unwrap();
            prop_assert!(bytes == expected[from as usize..to as usize]);
            let mut end = 0;
            for range in files.data(0..PAGES * PAGE) {
                prop_assert!(end <= range.start && range.start < range.end);
                end = range.end;
            }
        }
    }
}
