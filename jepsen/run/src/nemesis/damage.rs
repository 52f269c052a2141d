//! Damage to stored files of a minority: one bit of a table, a log or a manifest is another, or a table is cut
//! short. The replica must refuse to start, or make up for it from the others; what it serves is the workload's
//! checks to judge.
//!
//! Only what can be noticed is damaged. The end of the newest log looks, cut off or damaged, like a write that the
//! power interrupted, so no store can tell; and what a minority loses there a majority may need. So bits of logs
//! and manifests flip in their first half, and only tables and older logs are cut short.
//!
//! Nobody becomes a member or is removed meanwhile: one that is ruined and one that is new are half of four.
//!
//! A replica that refuses gets back, at the end of the fault, the folder that it had before: nothing was written
//! meanwhile. One that serves keeps its folder, and the damage is undone in the file if that is still there.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use async_trait::async_trait;
use tokio::sync::OwnedMutexGuard;
use tokio::time::timeout;

use super::{Evidence, Fault, Kind, Nemesis, Scene, revive};
use crate::chance::Chance;
use crate::cluster::State;
use crate::plan::Step;
use crate::run::Run;
use crate::target::Target;

pub(super) const KINDS: &[Kind] = &[
    Kind {
        name: "bitflip",
        argument: None,
        does: "one bit of a stored table, log or manifest of a minority flips, then a start",
        needs: &[],
        all: Some(""),
        make: |_| Ok(Box::new(Damage { cut: false })),
    },
    Kind {
        name: "truncate",
        argument: None,
        does: "a stored table or older log of a minority is cut short, then a start",
        needs: &[],
        all: Some(""),
        make: |_| Ok(Box::new(Damage { cut: true })),
    },
];

/// For a change of the members to be over.
const TURN: Duration = Duration::from_secs(60);

struct Damage {
    /// Cut short instead of flipped.
    cut: bool,
}

/// What a file of a database is, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Sort {
    Table,
    Log,
    Manifest,
}

const SORTS: &[(&str, Sort)] = &[
    ("table", Sort::Table),
    ("log", Sort::Log),
    ("manifest", Sort::Manifest),
];

impl Sort {
    fn of(name: &str) -> Option<Sort> {
        let numbered = |end: &str| {
            let number = name.strip_suffix(end);
            number
                .is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
        };
        match name {
            _ if numbered(".sst") => Some(Sort::Table),
            _ if numbered(".log") => Some(Sort::Log),
            _ if name.starts_with("MANIFEST-") => Some(Sort::Manifest),
            _ => None,
        }
    }
}

/// A file that may be damaged.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    path: PathBuf,
    sort: Sort,
    len: u64,
    /// The newest of its sort in its folder.
    newest: bool,
}

/// What was drawn: `log 512 3`: a sort, a place in thousandths, and a number for the choice of file and bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wish {
    sort: Sort,
    place: u64,
    number: u64,
}

fn draw(chance: &mut Chance, cut: bool) -> String {
    let sorts = if cut { &SORTS[..2] } else { SORTS };
    let (word, _) = chance.one(sorts);
    format!("{word} {} {}", chance.below(1_000), chance.below(1 << 20))
}

fn read(draw: &str) -> Result<Wish> {
    let words: Vec<&str> = draw.split(' ').collect();
    let &[sort, place, number] = words.as_slice() else {
        bail!("{draw:?} is no damage; such as: log 512 3");
    };
    let found = SORTS.iter().find(|(word, _)| *word == sort);
    let (_, sort) = found.with_context(|| format!("{sort:?} is no sort of file"))?;
    let parse = |text: &str| {
        text.parse::<u64>()
            .with_context(|| format!("{text:?} is no number"))
    };
    Ok(Wish {
        sort: *sort,
        place: parse(place)?.min(999),
        number: parse(number)?,
    })
}

/// Everything below a folder that may be damaged, in an order that does not depend on the file system.
fn files(folder: &Path) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    let mut left = vec![folder.to_owned()];
    while let Some(folder) = left.pop() {
        let mut here: BTreeMap<Sort, Vec<(PathBuf, u64)>> = BTreeMap::new();
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
            let path = entry?.path();
            let about = fs::symlink_metadata(&path)?;
            let sort = path.file_name().and_then(|name| Sort::of(name.to_str()?));
            if about.is_dir() {
                left.push(path);
            } else if let Some(sort) = sort
                && about.len() > 0
            {
                here.entry(sort).or_default().push((path, about.len()));
            }
        }
        for (sort, mut paths) in here {
            // Numbers have six digits, and more when they must: the longer one is newer.
            paths.sort_by_key(|(path, _)| (path.as_os_str().len(), path.clone()));
            let count = paths.len();
            all.extend(paths.into_iter().enumerate().map(|(place, (path, len))| Found {
                path,
                sort,
                len,
                newest: place + 1 == count,
            }));
        }
    }
    all.sort_by(|one, two| one.path.cmp(&two.path));
    Ok(all)
}

/// One of the files, of the sort that was wished for if there is one.
fn choose(all: Vec<Found>, wish: &Wish, cut: bool) -> Option<Found> {
    let fit = |found: &Found| !cut || found.sort == Sort::Table || (found.sort == Sort::Log && !found.newest);
    let mut all: Vec<Found> = all.into_iter().filter(fit).collect();
    if all.iter().any(|found| found.sort == wish.sort) {
        all.retain(|found| found.sort == wish.sort);
    }
    let place = usize::try_from(wish.number).unwrap_or(0) % all.len().max(1);
    all.into_iter().nth(place)
}

/// What was done to a file, so that it can be seen and undone.
struct Done {
    path: PathBuf,
    /// Where, and the byte before and after; of a cut the length before and after.
    at: u64,
    before: u64,
    after: u64,
    cut: bool,
}

impl Done {
    fn make(found: &Found, wish: &Wish, cut: bool) -> Result<Done> {
        let mut done = Done {
            path: found.path.clone(),
            at: 0,
            before: found.len,
            after: found.len * wish.place / 1_000,
            cut,
        };
        let file = OpenOptions::new().read(true).write(true).open(&found.path)?;
        if cut {
            file.set_len(done.after)?;
        } else {
            let reach = if found.sort == Sort::Table {
                found.len
            } else {
                found.len.div_ceil(2)
            };
            done.at = reach * wish.place / 1_000;
            let mut byte = [0];
            file.read_exact_at(&mut byte, done.at)?;
            done.before = byte[0].into();
            byte[0] ^= 1 << (wish.number % 8);
            done.after = byte[0].into();
            file.write_all_at(&byte, done.at)?;
        }
        file.sync_all()?;
        ensure!(done.is_there()?, "{} is as it was", found.path.display());
        Ok(done)
    }

    /// Whether the file is there and damaged.
    fn is_there(&self) -> Result<bool> {
        let Ok(file) = File::open(&self.path) else {
            return Ok(false);
        };
        if self.cut {
            return Ok(file.metadata()?.len() == self.after);
        }
        let mut byte = [0];
        Ok(file.read_at(&mut byte, self.at)? == 1 && u64::from(byte[0]) == self.after)
    }

    /// Undoes it, from the copy of the folder that the file was in.
    fn undo(&self, folder: &Path, copy: &Path) -> Result<()> {
        if self.is_there()? {
            let from = copy.join(self.path.strip_prefix(folder)?);
            fs::write(&self.path, fs::read(&from)?)?;
            File::open(&self.path)?.sync_all()?;
        }
        Ok(())
    }

    fn tell(&self, folder: &Path) -> String {
        let path = self.path.strip_prefix(folder).unwrap_or(&self.path).display();
        match self.cut {
            true => format!("{path} was cut from {} bytes to {}", self.before, self.after),
            false => format!(
                "byte {} of {path} was {:#04x} and is {:#04x}",
                self.at, self.before, self.after
            ),
        }
    }
}

struct Hurt {
    replicas: Vec<HurtReplica>,
    _turn: OwnedMutexGuard<()>,
}

struct HurtReplica {
    id: u64,
    copy: PathBuf,
    done: Done,
    /// What it said when it did not serve with the damage.
    refused: Option<String>,
}

#[async_trait]
impl Nemesis for Damage {
    fn name(&self) -> &str {
        if self.cut { "truncate" } else { "bitflip" }
    }

    fn targets(&self) -> &'static [Target] {
        &[Target::Minority]
    }

    fn draw(&self, chance: &mut Chance, _: &Scene) -> String {
        draw(chance, self.cut)
    }

    async fn start(&self, run: &Arc<Run>, step: &Step, targets: &[u64]) -> Result<Box<dyn Fault>> {
        let wish = read(&step.draw)?;
        let turn = timeout(TURN, Arc::clone(&run.membership).lock_owned()).await;
        let turn = turn.context("members are being changed")?;
        let mut replicas = Vec::new();
        for id in targets {
            if run.cluster.kill(*id).await.is_err() {
                continue;
            }
            let folder = run.cluster.folder(*id);
            if !files(&folder)?.iter().any(|found| found.sort == Sort::Table) {
                // A young replica has all in its log; a start makes a table of that.
                run.cluster.start(*id).await?;
                run.cluster.kill(*id).await?;
            }
            let copy = run.cluster.disk_folder(*id).with_extension("before");
            let done = match self.hurt(&folder, &copy, &wish).await {
                Ok(done) => done,
                Err(error) => {
                    // It is down by this, so it is started by this.
                    run.cluster.start(*id).await?;
                    return Err(error);
                }
            };
            run.cluster.may_end(*id)?;
            let refused = run
                .cluster
                .start(*id)
                .await
                .err()
                .map(|error| format!("{error:#}"));
            replicas.push(HurtReplica {
                id: *id,
                copy,
                done,
                refused,
            });
        }
        ensure!(!replicas.is_empty(), "none of {targets:?} was running");
        Ok(Box::new(Hurt {
            replicas,
            _turn: turn,
        }))
    }
}

impl Damage {
    /// Copies the folder aside and damages a file in it.
    async fn hurt(&self, folder: &Path, copy: &Path, wish: &Wish) -> Result<Done> {
        crate::net::tool(&["rm", "-rf", path(copy)?], "").await?;
        let found = choose(files(folder)?, wish, self.cut);
        let found = found.with_context(|| format!("{} has no file to damage", folder.display()))?;
        crate::net::tool(&["cp", "-a", path(folder)?, path(copy)?], "").await?;
        Done::make(&found, wish, self.cut)
    }
}

fn path(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
}

#[async_trait]
impl Fault for Hurt {
    async fn stop(self: Box<Self>, run: &Arc<Run>) -> Result<Evidence> {
        let mut seen = Vec::new();
        for hurt in &self.replicas {
            seen.push(hurt.heal(run).await?);
        }
        // Making it has looked at the file; a start came after that.
        Ok(Evidence::when(true, seen.join("; ")))
    }
}

impl HurtReplica {
    async fn heal(&self, run: &Arc<Run>) -> Result<String> {
        let folder = run.cluster.folder(self.id);
        // Somebody may be at starting it again and again; it is ours from here on.
        let up = run.cluster.state(self.id) == State::Up;
        drop(run.cluster.kill(self.id).await);
        let word = match &self.refused {
            None if up => "it served".to_owned(),
            None => "it served until it met it".to_owned(),
            Some(said) => format!("it refused: {}", said.rsplit(" | ").next().unwrap_or_default()),
        };
        if self.refused.is_none() {
            self.done.undo(&folder, &self.copy)?;
        } else {
            restore(&folder, &self.copy)?;
        }
        revive::serves(run, self.id).await?;
        run.cluster.must_live(self.id)?;
        fs::remove_dir_all(&self.copy)?;
        Ok(format!("r{}: {}, {word}", self.id, self.done.tell(&folder)))
    }
}

/// Makes a folder, which may be a mount, what the copy is.
fn restore(folder: &Path, copy: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.symlink_metadata()?.is_dir() {
            fs::remove_dir_all(path)?;
        } else {
            fs::remove_file(path)?;
        }
    }
    copy_into(copy, folder)
}

/// Copies what is in a folder, with its modes, and syncs it.
fn copy_into(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        let target = to.join(path.file_name().unwrap_or_default());
        if path.symlink_metadata()?.is_dir() {
            fs::create_dir(&target)?;
            fs::set_permissions(&target, fs::metadata(&path)?.permissions())?;
            copy_into(&path, &target)?;
        } else {
            fs::copy(&path, &target)?;
            File::open(&target)?.sync_all()?;
        }
    }
    File::open(to)?.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let db = folder.path().join("db");
        fs::create_dir(&db).unwrap();
        for (name, len) in [
            ("000004.log", 100),
            ("000009.log", 50),
            ("000007.sst", 80),
            ("MANIFEST-000005", 60),
        ] {
            fs::write(db.join(name), vec![7; len]).unwrap();
        }
        for name in ["LOG", "LOCK", "CURRENT", "x.sst.tmp", "000010.log.old"] {
            fs::write(db.join(name), b"left alone").unwrap();
        }
        fs::write(db.join("000011.log"), b"").unwrap();
        folder
    }

    #[test]
    fn what_is_drawn_is_read() {
        let mut chance = Chance::of(9);
        for _ in 0..100 {
            read(&draw(&mut chance, false)).unwrap();
            assert!(read(&draw(&mut chance, true)).unwrap().sort != Sort::Manifest);
        }
        for wrong in ["", "log", "table x 1", "table 1 x", "heap 1 1"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_newest_log_is_never_cut_and_nothing_is_damaged_that_is_not_the_databases() {
        let folder = folder();
        for number in 0..20 {
            for (_, sort) in SORTS {
                let wish = Wish {
                    sort: *sort,
                    place: 500,
                    number,
                };
                let names = |cut| {
                    let found = choose(files(folder.path()).unwrap(), &wish, cut).unwrap();
                    found.path.file_name().unwrap().to_str().unwrap().to_owned()
                };
                assert!(["000004.log", "000007.sst"].contains(&names(true).as_str()));
                assert!(Sort::of(&names(false)) == Some(*sort));
            }
        }
    }

    #[test]
    fn damage_is_seen_and_undone() {
        for cut in [false, true] {
            let (folder, copy) = (folder(), folder());
            for (_, sort) in SORTS {
                let wish = Wish {
                    sort: *sort,
                    place: 999,
                    number: 5,
                };
                let found = choose(files(folder.path()).unwrap(), &wish, cut).unwrap();
                let done = Done::make(&found, &wish, cut).unwrap();
                if !cut && found.sort != Sort::Table {
                    assert!(done.at < found.len.div_ceil(2));
                }
                assert!(done.is_there().unwrap());
                done.undo(folder.path(), copy.path()).unwrap();
                assert!(!done.is_there().unwrap());
                assert_eq!(
                    fs::read(&found.path).unwrap(),
                    vec![7; usize::try_from(found.len).unwrap()]
                );
            }
            fs::write(folder.path().join("db/new"), b"").unwrap();
            restore(folder.path(), copy.path()).unwrap();
            assert_eq!(files(folder.path()).unwrap().len(), 4);
            assert!(!folder.path().join("db/new").exists());
        }
    }
}
