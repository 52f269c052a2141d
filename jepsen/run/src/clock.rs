//! Wall clocks of replicas, moved by a library that is preloaded into their processes, and clocks since boot that
//! start at another time.
//!
//! A replica has a page of memory that it shares with the harness (`jepsen/skew`). What is written there takes effect
//! with its next look at the clock; only `CLOCK_REALTIME` moves. Never here: when and how far (`nemesis/clock.rs`).

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use crate::chance::Chance;
use crate::cluster::Launch;

/// The layout of the page: the library's own source, for linking the library would replace this program's clock.
#[allow(dead_code, unreachable_pub)]
#[path = "../../skew/src/page.rs"]
mod page;

pub use page::Setting;
use page::{SEEN_AT, SETTING_AT, VARIABLE};

/// What the library is called.
pub const LIBRARY: &str = "libjepsen_skew.so";
/// Clocks since boot are apart by up to this: a machine that was booted a month before another.
const BOOTS_APART: Duration = Duration::from_secs(30 * 24 * 3_600);

/// The library: next to this program, or where cargo leaves those that others depend on.
///
/// # Errors
/// When it is in neither place, with how to build it; or when the loader does not take it.
pub fn library() -> Result<PathBuf> {
    let own = std::env::current_exe().context("where is this program?")?;
    let folders = own.ancestors().skip(1).take(2);
    let places = folders.flat_map(|folder| [folder.join(LIBRARY), folder.join("deps").join(LIBRARY)]);
    let found = places.into_iter().find(|path| path.is_file());
    let found =
        found.with_context(|| format!("{LIBRARY} is not next to jepsen: cargo build --workspace --bins"))?;
    shifts(&found).with_context(|| format!("{} moves no clock", found.display()))?;
    Ok(found)
}

/// Lets a program look at a clock that is a day ahead.
fn shifts(library: &Path) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let wall = Wall::create(&folder.path().join("page"))?;
    let day = Duration::from_secs(24 * 3_600);
    wall.set(Setting {
        offset: i64::try_from(day.as_nanos())?,
        ..Setting::default()
    })?;
    let mut command = Command::new("date");
    command
        .arg("+%s")
        .env("LD_PRELOAD", library)
        .env(VARIABLE, &wall.path);
    let output = command.output().context("the program `date` does not start")?;
    let shown = String::from_utf8_lossy(&output.stdout).trim().parse::<u64>();
    let shown = shown.with_context(|| String::from_utf8_lossy(&output.stderr).trim().to_owned())?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    ensure!(
        shown > now + day.as_secs() / 2,
        "`date` shows {shown} when {} was asked for",
        now + day.as_secs()
    );
    Ok(())
}

/// Whether a process can be given a clock since boot of its own.
///
/// # Errors
/// Why not.
pub fn time_namespaces() -> Result<()> {
    let boot = |wrap: &[String]| -> Result<f64> {
        let mut command = Command::new(wrap.first().map_or("cat", String::as_str));
        command.args(wrap.iter().skip(1));
        if !wrap.is_empty() {
            command.arg("cat");
        }
        let output = command
            .arg("/proc/uptime")
            .output()
            .context("unshare does not start")?;
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        ensure!(output.status.success(), "{said}");
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        told.split(' ')
            .next()
            .and_then(|word| word.parse().ok())
            .context("/proc/uptime has no number")
    };
    let offset = Duration::from_secs(100_000);
    let (here, there) = (boot(&[])?, boot(&offset_wrap(offset))?);
    // Kernels before 6.3 move only children of the program that unshare becomes.
    ensure!(
        there > here + 50_000.0,
        "this kernel keeps the clock of a program that enters a time namespace by exec"
    );
    Ok(())
}

fn offset_wrap(offset: Duration) -> Vec<String> {
    let seconds = offset.as_secs().to_string();
    let words = [
        "unshare",
        "--time",
        "--monotonic",
        &seconds,
        "--boottime",
        &seconds,
        "--",
    ];
    words.map(str::to_owned).to_vec()
}

/// How far a replica's clocks since boot are ahead of the machine's: a seed's choice.
#[must_use]
pub fn boot_offset(seed: u64, id: u64) -> Duration {
    let mut chance = Chance::named(seed, &format!("boot/r{id}"));
    Duration::from_secs(chance.between(1, BOOTS_APART.as_secs()))
}

/// What a shim has told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// How often it showed another time than the machine's.
    pub reads: u64,
    /// The last moment that it showed, in nanoseconds since the Unix epoch; 0 before the first.
    pub shown: i64,
    /// Processes that have it.
    pub processes: u64,
}

/// The wall clock of one replica.
#[derive(Clone, Debug)]
pub struct Wall {
    path: PathBuf,
}

impl Wall {
    /// Makes its page.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn create(path: &Path) -> Result<Wall> {
        std::fs::write(path, page::blank()).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Wall {
            path: path.to_owned(),
        })
    }

    /// Moves the clock.
    ///
    /// # Errors
    /// When the page can't be written.
    pub fn set(&self, setting: Setting) -> Result<()> {
        let file = OpenOptions::new().write(true).open(&self.path);
        let written = file.and_then(|file| file.write_all_at(&setting.encode(), SETTING_AT as u64));
        written.with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// What its process has told.
    ///
    /// # Errors
    /// When the page can't be read.
    pub fn seen(&self) -> Result<Seen> {
        let mut words = [0; 24];
        let file = std::fs::File::open(&self.path);
        let read = file.and_then(|file| file.read_exact_at(&mut words, SEEN_AT as u64));
        read.with_context(|| format!("cannot read {}", self.path.display()))?;
        let mut values = words
            .chunks_exact(8)
            .map(|word| i64::from_ne_bytes(word.try_into().unwrap_or_default()));
        let mut next = || values.next().unwrap_or_default();
        Ok(Seen {
            reads: next().cast_unsigned(),
            shown: next(),
            processes: next().cast_unsigned(),
        })
    }
}

/// The clocks of a run's replicas.
#[derive(Debug, Default)]
pub struct Clocks {
    shim: Option<PathBuf>,
    folder: PathBuf,
    boot_seed: Option<u64>,
    walls: std::sync::Mutex<BTreeMap<u64, Wall>>,
}

impl Clocks {
    /// With pages in a folder. Without a shim wall clocks stay true; without a seed clocks since boot do.
    #[must_use]
    pub fn new(folder: &Path, shim: Option<PathBuf>, boot_seed: Option<u64>) -> Clocks {
        Clocks {
            shim,
            folder: folder.to_owned(),
            boot_seed,
            walls: std::sync::Mutex::default(),
        }
    }

    /// What a replica is started with for it.
    ///
    /// # Errors
    /// When its page can't be made.
    pub fn equip(&self, id: u64, launch: &mut Launch) -> Result<()> {
        if let Some(shim) = &self.shim {
            let wall = Wall::create(&self.folder.join(format!("r{id}.clock")))?;
            launch.environment.insert("LD_PRELOAD".to_owned(), shim.into());
            launch
                .environment
                .insert(VARIABLE.to_owned(), wall.path.clone().into());
            self.walls().insert(id, wall);
        }
        if let Some(seed) = self.boot_seed {
            launch.wrap.extend(offset_wrap(boot_offset(seed, id)));
        }
        Ok(())
    }

    fn walls(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Wall>> {
        self.walls
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// A replica's wall clock.
    ///
    /// # Errors
    /// When it was started without the library.
    pub fn wall(&self, id: u64) -> Result<Wall> {
        let wall = self.walls().get(&id).cloned();
        wall.with_context(|| format!("r{id} was started without {LIBRARY}"))
    }

    /// Makes all wall clocks true.
    ///
    /// # Errors
    /// When a page can't be written.
    pub fn heal(&self) -> Result<()> {
        let walls: Vec<Wall> = self.walls().values().cloned().collect();
        walls.iter().try_for_each(|wall| wall.set(Setting::default()))
    }
}

/// The true time, in nanoseconds since the Unix epoch.
#[must_use]
pub fn true_time() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boots_are_apart_and_the_seed_decides() {
        let offsets: Vec<Duration> = (1..=5).map(|id| boot_offset(7, id)).collect();
        assert_eq!(offsets, (1..=5).map(|id| boot_offset(7, id)).collect::<Vec<_>>());
        let apart = offsets
            .windows(2)
            .all(|pair| pair[0].abs_diff(pair[1]) > Duration::from_secs(60));
        assert!(apart, "{offsets:?}");
    }

    #[test]
    fn a_page_is_made_set_and_read() {
        let folder = tempfile::tempdir().unwrap();
        let clocks = Clocks::new(folder.path(), Some(PathBuf::from("/lib/x.so")), Some(3));
        let mut launch = Launch::default();
        clocks.equip(2, &mut launch).unwrap();
        assert_eq!(launch.environment["LD_PRELOAD"], "/lib/x.so");
        assert_eq!(launch.wrap[..2], ["unshare", "--time"]);
        let wall = clocks.wall(2).unwrap();
        assert_eq!(wall.seen().unwrap(), Seen::default());
        wall.set(Setting {
            offset: 5,
            ..Setting::default()
        })
        .unwrap();
        clocks.heal().unwrap();
        let bytes = std::fs::read(folder.path().join("r2.clock")).unwrap();
        assert_eq!(bytes, page::blank(), "healed is as made");
        assert!(clocks.wall(3).unwrap_err().to_string().contains("r3"));
    }
}
