//! Random system calls on a mounted file system and on a tmpfs: both must answer the same and end up the same.
#![allow(clippy::unwrap_used)]

mod mounted;

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;

use mounted::Mounted;
use nix::fcntl::{AtFlags, FallocateFlags, RenameFlags, fallocate};
use nix::unistd::linkat;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

#[derive(Clone, Debug)]
enum Call {
    Open {
        name: u8,
        create: bool,
        truncate: bool,
    },
    Close(u8),
    Write {
        name: u8,
        offset: u32,
        len: u32,
    },
    Append {
        name: u8,
        len: u16,
    },
    Read {
        name: u8,
        offset: u32,
        len: u32,
    },
    Truncate {
        name: u8,
        size: u32,
    },
    Allocate {
        name: u8,
        mode: u8,
        offset: u16,
        len: u16,
    },
    Sync(u8),
    Rename {
        from: u8,
        to: u8,
        flags: u8,
    },
    Link(u8, u8),
    Symlink(u8),
    Unlink(u8),
    MakeFolder(u8),
    RemoveFolder(u8),
    List(u8),
    Copy(u8, u8),
}

fn call() -> impl Strategy<Value = Call> {
    let name = || 0..NAMES.len() as u8;
    prop_oneof![
        4 => (name(), any::<bool>(), any::<bool>())
            .prop_map(|(name, create, truncate)| Call::Open { name, create, truncate }),
        1 => name().prop_map(Call::Close),
        5 => (name(), 0..300_000u32, 1..200_000u32)
            .prop_map(|(name, offset, len)| Call::Write { name, offset, len }),
        2 => (name(), 1..9_000u16).prop_map(|(name, len)| Call::Append { name, len }),
        3 => (name(), 0..300_000u32, 1..300_000u32)
            .prop_map(|(name, offset, len)| Call::Read { name, offset, len }),
        2 => (name(), 0..300_000u32).prop_map(|(name, size)| Call::Truncate { name, size }),
        2 => (name(), 0..4u8, any::<u16>(), 1..u16::MAX)
            .prop_map(|(name, mode, offset, len)| Call::Allocate { name, mode, offset, len }),
        1 => name().prop_map(Call::Sync),
        3 => (name(), name(), 0..3u8).prop_map(|(from, to, flags)| Call::Rename { from, to, flags }),
        1 => (name(), name()).prop_map(|(from, to)| Call::Link(from, to)),
        1 => name().prop_map(Call::Symlink),
        2 => name().prop_map(Call::Unlink),
        1 => name().prop_map(Call::MakeFolder),
        1 => name().prop_map(Call::RemoveFolder),
        1 => name().prop_map(Call::List),
        1 => (name(), name()).prop_map(|(from, to)| Call::Copy(from, to)),
    ]
}

/// Few, so that calls meet; some within folders that may or may not be there.
const NAMES: [&str; 9] = ["a", "b", "c.log", "d", "d/a", "d/b", "e", "e/d", "e/d/x"];

/// What a call gave.
#[derive(Debug, PartialEq, Eq)]
enum Gave {
    Nothing,
    Bytes(Vec<u8>),
    Names(Vec<OsString>),
    Count(u64),
    Failed(Option<i32>),
}

/// One side of the comparison.
struct Side<'a> {
    root: &'a Path,
    open: HashMap<u8, File>,
    fill: u8,
}

impl Side<'_> {
    fn path(&self, name: u8) -> std::path::PathBuf {
        self.root.join(NAMES[usize::from(name)])
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        self.fill = self.fill.wrapping_add(1);
        vec![self.fill; len]
    }

    fn opened(&self, name: u8) -> io::Result<&File> {
        self.open.get(&name).ok_or(io::ErrorKind::NotFound.into())
    }

    fn take(&mut self, call: &Call) -> Gave {
        self.bytes(0);
        match self.attempt(call) {
            Ok(gave) => gave,
            Err(error) => Gave::Failed(error.raw_os_error()),
        }
    }

    fn attempt(&mut self, call: &Call) -> io::Result<Gave> {
        let done = Ok(Gave::Nothing);
        match *call {
            Call::Open {
                name,
                create,
                truncate,
            } => {
                let mut options = OpenOptions::new();
                options.read(true).write(true).create(create).truncate(truncate);
                let file = options.open(self.path(name))?;
                self.open.insert(name, file);
                done
            }
            Call::Close(name) => {
                self.open.remove(&name);
                done
            }
            Call::Write { name, offset, len } => {
                let bytes = self.bytes(len as usize);
                self.opened(name)?.write_all_at(&bytes, offset.into())?;
                done
            }
            Call::Append { name, len } => {
                let bytes = self.bytes(len.into());
                OpenOptions::new()
                    .append(true)
                    .open(self.path(name))?
                    .write_all(&bytes)?;
                done
            }
            Call::Read { name, offset, len } => {
                let mut bytes = vec![0; len as usize];
                let got = self.opened(name)?.read_at(&mut bytes, offset.into())?;
                bytes.truncate(got);
                Ok(Gave::Bytes(bytes))
            }
            Call::Truncate { name, size } => {
                self.opened(name)?.set_len(size.into())?;
                Ok(Gave::Count(self.opened(name)?.metadata()?.len()))
            }
            Call::Allocate {
                name,
                mode,
                offset,
                len,
            } => {
                let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let mode = match mode {
                    0 => FallocateFlags::empty(),
                    1 | 2 => keep,
                    _ => keep | FallocateFlags::FALLOC_FL_PUNCH_HOLE,
                };
                fallocate(self.opened(name)?, mode, offset.into(), len.into())?;
                done
            }
            Call::Sync(name) => {
                self.opened(name)?.sync_data()?;
                done
            }
            _ => self.attempt_name(call),
        }
    }

    fn attempt_name(&mut self, call: &Call) -> io::Result<Gave> {
        match *call {
            Call::Rename { from, to, flags } => {
                let flags = match flags {
                    0 => RenameFlags::empty(),
                    1 => RenameFlags::RENAME_NOREPLACE,
                    _ => RenameFlags::RENAME_EXCHANGE,
                };
                let here = nix::fcntl::AT_FDCWD;
                nix::fcntl::renameat2(here, &self.path(from), here, &self.path(to), flags)?;
            }
            Call::Link(from, to) => {
                let here = nix::fcntl::AT_FDCWD;
                linkat(here, &self.path(from), here, &self.path(to), AtFlags::empty())?;
            }
            Call::Symlink(name) => symlink("a", self.path(name))?,
            Call::Unlink(name) => fs::remove_file(self.path(name))?,
            Call::MakeFolder(name) => fs::create_dir(self.path(name))?,
            Call::RemoveFolder(name) => fs::remove_dir(self.path(name))?,
            Call::List(name) => {
                let entries = fs::read_dir(self.path(name))?;
                let mut names = entries
                    .map(|entry| Ok(entry?.file_name()))
                    .collect::<io::Result<Vec<_>>>()?;
                names.sort();
                return Ok(Gave::Names(names));
            }
            Call::Copy(from, to) if from != to => {
                return Ok(Gave::Count(fs::copy(self.path(from), self.path(to))?));
            }
            _ => {}
        }
        Ok(Gave::Nothing)
    }
}

/// Kind and mode, content or target, length and number of names, which folders do not have.
type About = (String, Vec<u8>, (u64, u64));

/// Everything below a folder.
fn tree(root: &Path) -> BTreeMap<OsString, About> {
    let mut all = BTreeMap::new();
    let mut left = vec![root.to_owned()];
    while let Some(folder) = left.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let about = fs::symlink_metadata(&path).unwrap();
            let kind = format!("{:?} {:o}", about.file_type(), about.mode());
            let (content, counts) = if about.is_dir() {
                left.push(path.clone());
                (Vec::new(), (0, 0))
            } else if about.is_symlink() {
                let target = fs::read_link(&path).unwrap().into_os_string();
                (target.into_encoded_bytes(), (0, about.nlink()))
            } else {
                let mut content = Vec::new();
                File::open(&path).unwrap().read_to_end(&mut content).unwrap();
                (content, (about.len(), about.nlink()))
            };
            let name = path.strip_prefix(root).unwrap().as_os_str().to_owned();
            all.insert(name, (kind, content, counts));
        }
    }
    all
}

fn empty(root: &Path) {
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        if path.symlink_metadata().unwrap().is_dir() {
            fs::remove_dir_all(path).unwrap();
        } else {
            fs::remove_file(path).unwrap();
        }
    }
}

#[test]
fn it_does_what_a_tmpfs_does() {
    let Some(mounted) = Mounted::new() else { return };
    let config = ProptestConfig {
        cases: 500,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let result = TestRunner::new(config).run(&vec(call(), 1..80), |calls| {
        let mut sides = [mounted.path(), mounted.plain.as_path()].map(|root| {
            empty(root);
            Side {
                root,
                open: HashMap::new(),
                fill: 0,
            }
        });
        for (place, call) in calls.iter().enumerate() {
            let [ours, theirs] = sides.each_mut().map(|side| side.take(call));
            prop_assert!(
                ours == theirs,
                "call {place}, {call:?}: {}",
                differ(&ours, &theirs)
            );
        }
        drop(sides.map(|side| side.open));
        let [ours, theirs] = [mounted.path(), mounted.plain.as_path()].map(tree);
        prop_assert!(ours == theirs, "the trees differ");
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    empty(mounted.path());
    assert_eq!(
        mounted.handle.space().0,
        0,
        "nothing of what was removed takes space"
    );
}

/// The difference, without printing hundreds of kilobytes.
fn differ(ours: &Gave, theirs: &Gave) -> String {
    let short = |gave: &Gave| match gave {
        Gave::Bytes(bytes) => format!("{} bytes", bytes.len()),
        other => format!("{other:?}"),
    };
    format!("{} here, {} there", short(ours), short(theirs))
}
