//! The owner's description of a worker: `[worker]` of `node.toml`, or a file of its own with the same in it.
//!
//! What never lives here: reading the tools (see `tools`). Invariants: everything that can be wrong is found
//! when it is read, and named; a relative path begins at the file that has it; what is not said is the safer
//! of the two.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::folder::relative;
use super::spec::Bounds;
use crate::{Error, Kind, Result};

const MIB: u64 = 1 << 20;
/// Slots of one worker, see `palyra_state::limits::SLOTS_PER_WORKER`.
const SLOTS_MAX: u32 = 64;
/// Tools of one worker.
const TOOLS_MAX: usize = 64;
/// Files of one tool.
const FILES_MAX: usize = 1024;
/// The parts of a sandbox that may be required.
pub const PARTS: [&str; 14] = [
    "landlock",
    "pidns",
    "mountns",
    "netns",
    "ipcns",
    "utsns",
    "root",
    "proc",
    "uid",
    "caps",
    "rlimits",
    "cgroup:memory",
    "cgroup:pids",
    "cgroup:cpu",
];
/// Users of leases begin here when the worker is root: a range that distributions leave to such uses.
const UID_BASE: u32 = 61_184;
/// What every program finds in `PATH`.
const PATH: &str = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin";

/// How strongly the worker proves itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// The digests are those of the file.
    SelfReported,
    /// This program computes them.
    #[default]
    Supervisor,
    /// A provider vouches for them.
    Hardware,
}

impl Level {
    /// As the statement has it.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Level::SelfReported => 1,
            Level::Supervisor => 2,
            Level::Hardware => 3,
        }
    }
}

/// What tools see as the machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// A folder that becomes the root of every tool; absent: the system folders of this machine.
    pub root: Option<PathBuf>,
}

/// Digests that are only said, for `evidence = "self-reported"`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Said {
    /// Hex.
    pub image: String,
    /// Hex.
    pub build: String,
    /// Hex.
    pub artifact: String,
}

/// A provider of quotes that is a key in a file: for tests, and for trying things out.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provider {
    /// As the policy names it.
    pub name: String,
    /// Its private key, PKCS #8 PEM.
    pub key: PathBuf,
}

/// What a lease may use when it asks for nothing, and the most that it may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Defaults {
    /// Of all processes, in MiB.
    pub memory_mib: u64,
    /// At a time.
    pub processes: u32,
    /// Of all that it writes, in MiB.
    pub disk_mib: u64,
    /// 100 is one core.
    pub cpu_percent: u32,
    /// Of each process.
    pub open_files: u32,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            memory_mib: 512,
            processes: 128,
            disk_mib: 1024,
            cpu_percent: 100,
            open_files: 1024,
        }
    }
}

/// A tool that is offered.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tool {
    /// As grants name it.
    pub name: String,
    /// Who vouches for it, as the policy names them.
    pub authority: String,
    /// The program and its arguments. What begins with `./` is a file of the tool.
    pub command: Vec<String>,
    /// More files of the tool, below `dir`.
    #[serde(default)]
    pub files: Vec<String>,
    /// Where its files are; absent: where the configuration is.
    #[serde(default)]
    pub dir: PathBuf,
    /// Set in its environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// The longest that it may run, in seconds.
    #[serde(default = "ten_minutes")]
    pub timeout_s: u64,
    /// Between SIGTERM and SIGKILL when it is stopped, in seconds.
    #[serde(default = "two")]
    pub grace_s: u64,
}

fn ten_minutes() -> u64 {
    600
}

fn two() -> u64 {
    2
}

fn one() -> u32 {
    1
}

fn wit_abi() -> String {
    "0.2.0".to_owned()
}

fn required() -> Vec<String> {
    ["landlock", "pidns", "mountns", "netns"]
        .map(str::to_owned)
        .into()
}

/// A worker.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Leases that it holds at a time.
    #[serde(default = "one")]
    pub slots: u32,
    /// How strongly it proves itself.
    #[serde(default)]
    pub evidence: Level,
    /// What tools see as the machine.
    #[serde(default)]
    pub image: Image,
    /// For `self-reported`.
    pub digests: Option<Said>,
    /// For `hardware`.
    pub provider: Option<Provider>,
    /// A file with the binding that an egress proxy made for this worker.
    pub egress: Option<PathBuf>,
    /// Version of the SDK's protocol.
    #[serde(default = "one")]
    pub sdk_protocol: u32,
    /// Version of the WIT ABI.
    #[serde(default = "wit_abi")]
    pub wit_abi: String,
    /// What must hold a tool, or it is not begun: see [`PARTS`].
    #[serde(default = "required")]
    pub require: Vec<String>,
    /// Whether a run may ask for the network.
    #[serde(default)]
    pub allow_network: bool,
    /// First of the users that leases run as, one for each slot, when the worker is root; 0: as the worker
    /// itself.
    pub uid_base: Option<u32>,
    /// More folders and files of this machine that tools may read and execute.
    #[serde(default)]
    pub read: Vec<PathBuf>,
    /// Folders that runs may ask for by name.
    #[serde(default)]
    pub workspaces: BTreeMap<String, PathBuf>,
    /// What a lease may use.
    #[serde(default)]
    pub limits: Defaults,
    /// What it offers.
    #[serde(default)]
    pub tools: Vec<Tool>,
}

impl Config {
    /// Reads a file of its own.
    ///
    /// Errors: no such file, no such form, values that make no sense; each names the line or the setting.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::io("read", path, &error))?;
        let config: Self = toml::from_str(&text).map_err(|error| {
            let line = error
                .span()
                .map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            bad(format!("{}:{line}: {}", path.display(), error.message().trim()))
        })?;
        let path = std::path::absolute(path).map_err(|error| Error::io("find", path, &error))?;
        config.checked(path.parent().unwrap_or(Path::new("/")))
    }

    /// Checks what was read from a file in `dir`, and makes its paths absolute.
    ///
    /// Errors: as [`Config::read`].
    pub fn checked(mut self, dir: &Path) -> Result<Self> {
        if !(1..=SLOTS_MAX).contains(&self.slots) {
            return Err(bad(format!(
                "slots = {} must be between 1 and {SLOTS_MAX}",
                self.slots
            )));
        }
        if self.tools.is_empty() || self.tools.len() > TOOLS_MAX {
            return Err(bad(format!(
                "{} tools: there must be 1 to {TOOLS_MAX}, as [[tools]]",
                self.tools.len()
            )));
        }
        if let Some(part) = self.require.iter().find(|part| !PARTS.contains(&part.as_str())) {
            return Err(bad(format!(
                "require names {part:?}, which is none of {}",
                PARTS.join(", ")
            )));
        }
        self.check_evidence()?;
        self.check_limits()?;
        let at = |path: &mut PathBuf| *path = dir.join(&*path);
        self.image.root.iter_mut().for_each(at);
        self.provider
            .iter_mut()
            .for_each(|provider| at(&mut provider.key));
        self.egress.iter_mut().for_each(at);
        for (name, path) in self
            .workspaces
            .iter_mut()
            .map(|(name, path)| (name.clone(), path))
        {
            at(path);
            if !path.is_dir() {
                return Err(bad(format!(
                    "the workspace {name} is {}, which is no folder",
                    path.display()
                )));
            }
        }
        if let Some(path) = self.read.iter().find(|path| !path.is_absolute()) {
            return Err(bad(format!(
                "read names {}, which is not absolute",
                path.display()
            )));
        }
        let mut names = std::collections::BTreeSet::new();
        for tool in &mut self.tools {
            tool.check(dir)?;
            if !names.insert(tool.name.clone()) {
                return Err(bad(format!("the tool {} is there twice", tool.name)));
            }
        }
        self.tools.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(self)
    }

    fn check_evidence(&self) -> Result<()> {
        let why = match (self.evidence, &self.digests, &self.provider) {
            (Level::SelfReported, None, _) => "evidence = \"self-reported\" needs [digests]",
            (Level::Supervisor | Level::Hardware, Some(_), _) => {
                "[digests] are for evidence = \"self-reported\": otherwise they are computed"
            }
            (Level::Hardware, _, None) => "evidence = \"hardware\" needs [provider] with its name and key",
            (Level::SelfReported | Level::Supervisor, _, Some(_)) => {
                "[provider] is for evidence = \"hardware\""
            }
            _ => return Ok(()),
        };
        Err(bad(why.to_owned()))
    }

    fn check_limits(&self) -> Result<()> {
        let limits = &self.limits;
        let ranges = [
            ("memory_mib", limits.memory_mib, 16, 1 << 22),
            ("processes", u64::from(limits.processes), 1, 32_768),
            ("disk_mib", limits.disk_mib, 1, 1 << 22),
            ("cpu_percent", u64::from(limits.cpu_percent), 1, 102_400),
            ("open_files", u64::from(limits.open_files), 16, 65_536),
        ];
        match ranges
            .iter()
            .find(|(_, value, least, most)| !(*least..=*most).contains(value))
        {
            Some((name, value, least, most)) => Err(bad(format!(
                "limits: {name} = {value} must be between {least} and {most}"
            ))),
            None => Ok(()),
        }
    }

    /// The tool of that name.
    #[must_use]
    pub fn tool(&self, name: &str) -> Option<&Tool> {
        self.tools.iter().find(|tool| tool.name == name)
    }

    /// The user of a slot.
    #[must_use]
    pub fn uid(&self, slot: u32) -> Option<u32> {
        let base = self.uid_base.unwrap_or(UID_BASE);
        (base != 0 && nix::unistd::geteuid().is_root()).then(|| base + slot % SLOTS_MAX)
    }

    /// What a run gets that asks for this; 0 asks for nothing.
    ///
    /// Errors: it asks for more than there is.
    pub fn bounds(&self, asked: &palyra_proto::run::v1::Limits) -> std::result::Result<Bounds, String> {
        let own = &self.limits;
        let most = |name: &str, asked: u64, most: u64| match asked {
            0 => Ok(most),
            asked if asked <= most => Ok(asked),
            asked => Err(format!(
                "it asks for {name} {asked}, this worker gives at most {most}"
            )),
        };
        let small = |name: &str, asked: u32, own: u32| {
            most(name, asked.into(), own.into()).map(|given| u32::try_from(given).unwrap_or(own))
        };
        if asked.network && !self.allow_network {
            return Err(
                "it asks for the network, which this worker does not give (allow_network)".to_owned(),
            );
        }
        Ok(Bounds {
            memory_bytes: most("memory_bytes", asked.memory_bytes, own.memory_mib * MIB)?,
            processes: small("processes", asked.processes, own.processes)?,
            disk_bytes: most("disk_bytes", asked.disk_bytes, own.disk_mib * MIB)?,
            cpu_percent: small("cpu_percent", asked.cpu_percent, own.cpu_percent)?,
            open_files: small("open_files", asked.open_files, own.open_files)?,
            network: asked.network,
        })
    }
}

impl Tool {
    fn check(&mut self, dir: &Path) -> Result<()> {
        let name = &self.name;
        let word = |text: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            (1..=64).contains(&text.len()) && text.chars().all(plain)
        };
        if !word(name) || !word(&self.authority) {
            return Err(bad(format!(
                "the tool {name:?}: name and authority are letters, digits, dots and dashes"
            )));
        }
        match self.command.first() {
            Some(first) if first.starts_with("./") || first.starts_with('/') => {}
            _ => {
                return Err(bad(format!(
                    "the command of the tool {name} must begin with ./file, a file of the tool, or an absolute path"
                )));
            }
        }
        self.dir = dir.join(&self.dir);
        if self.own_files().len() > FILES_MAX {
            return Err(bad(format!("the tool {name} has more than {FILES_MAX} files")));
        }
        for path in self.own_files() {
            relative(&path).map_err(|why| bad(format!("the tool {name}: {why}")))?;
        }
        let reserved = |name: &String| name.starts_with("PALYRA_") || name.is_empty() || name.contains('=');
        if let Some(variable) = self.env.keys().find(|name| reserved(name)) {
            return Err(bad(format!(
                "the tool {name} sets {variable:?}, which is not its to set"
            )));
        }
        if self.timeout_s == 0 || self.timeout_s > 7 * 86_400 || self.grace_s > 60 {
            return Err(bad(format!(
                "the tool {name}: timeout_s is 1 to 604800, grace_s at most 60"
            )));
        }
        Ok(())
    }

    /// Paths of its files below its folder, in order, each once.
    #[must_use]
    pub fn own_files(&self) -> Vec<String> {
        let named = self.command.iter().filter_map(|word| word.strip_prefix("./"));
        let more = self
            .files
            .iter()
            .map(|path| path.strip_prefix("./").unwrap_or(path));
        let all: std::collections::BTreeSet<String> = named.chain(more).map(str::to_owned).collect();
        all.into_iter().collect()
    }

    /// The longest that it may run.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_s)
    }

    /// Between SIGTERM and SIGKILL.
    #[must_use]
    pub fn grace(&self) -> Duration {
        Duration::from_secs(self.grace_s)
    }

    /// Its environment, without what the lease adds.
    #[must_use]
    pub fn environment(&self) -> Vec<(String, String)> {
        let base = [
            ("PATH", PATH),
            ("LANG", "C.UTF-8"),
            ("USER", "worker"),
            ("SHELL", "/bin/sh"),
        ];
        let mut all: BTreeMap<String, String> = base
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        all.extend(self.env.clone());
        all.into_iter().collect()
    }
}

pub(crate) fn bad(message: String) -> Error {
    let next = "correct the worker's configuration (docs/workers.md has an example), then: palyra worker run";
    Error::new(Kind::Usage, "N1002", message, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "slots = 2\n[[tools]]\nname = \"sum\"\nauthority = \"acme\"\n\
                        command = [\"./sum.sh\", \"-v\", \"./lib/a.txt\"]\nfiles = [\"lib/b.txt\", \"./sum.sh\"]\n";

    fn parse(text: &str) -> Result<Config> {
        let config: Config = toml::from_str(text).map_err(|error| bad(error.message().to_owned()))?;
        config.checked(Path::new("/srv/w"))
    }

    #[test]
    fn paths_begin_where_the_file_is_and_what_is_not_said_is_safe() {
        let config = parse(GOOD).unwrap();
        let tool = config.tool("sum").unwrap();
        assert_eq!(tool.own_files(), ["lib/a.txt", "lib/b.txt", "sum.sh"]);
        assert_eq!(tool.dir, PathBuf::from("/srv/w/"));
        assert_eq!(
            (config.evidence, config.allow_network),
            (Level::Supervisor, false)
        );
        assert_eq!(config.require, ["landlock", "pidns", "mountns", "netns"]);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let more = |text: &str| format!("{text}\n{GOOD}").replace("slots = 2\n", "");
        for (text, named) in [
            (GOOD.replace("= 2", "= 0"), "slots = 0"),
            (
                GOOD.replace("./sum.sh\", \"-v", "sum.sh\", \"-v"),
                "must begin with",
            ),
            (GOOD.replace("lib/b.txt", "../b.txt"), "leaves its folder"),
            (GOOD.replace("acme", "a b"), "authority"),
            (
                format!("{GOOD}env = {{ PALYRA_FENCE = \"1\" }}\n"),
                "PALYRA_FENCE",
            ),
            (format!("{GOOD}{}", GOOD.replace("slots = 2\n", "")), "twice"),
            (more("require = [\"magic\"]"), "magic"),
            (more("evidence = \"hardware\""), "[provider]"),
            (more("evidence = \"self-reported\""), "[digests]"),
            (more("workspaces = { a = \"nowhere\" }"), "/srv/w/nowhere"),
            (more("limits = { memory_mib = 1 }"), "memory_mib"),
            ("slots = 1".to_owned(), "0 tools"),
            (more("colour = 1"), "colour"),
        ] {
            let error = parse(&text).unwrap_err();
            assert!(
                error.code == "N1002" && error.message.contains(named),
                "{text}\n{error}"
            );
        }
    }

    #[test]
    fn a_run_gets_what_it_asks_for_or_is_refused() {
        let config = parse(GOOD).unwrap();
        let mut asked = palyra_proto::run::v1::Limits::default();
        assert_eq!(config.bounds(&asked).unwrap().memory_bytes, 512 * MIB);
        asked.processes = 7;
        assert_eq!(config.bounds(&asked).unwrap().processes, 7);
        asked.disk_bytes = 2048 * MIB;
        assert!(config.bounds(&asked).unwrap_err().contains("disk_bytes"));
        asked = palyra_proto::run::v1::Limits {
            network: true,
            ..Default::default()
        };
        assert!(config.bounds(&asked).unwrap_err().contains("allow_network"));
    }
}
