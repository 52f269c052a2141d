//! The programs that carry planted bugs: found, or built.
//!
//! Cargo puts what it builds with bugs where it puts the ordinary programs. From there they are moved into a folder
//! `planted` next to them at once: whoever starts `target/debug/palyrad` must never get one with bugs in it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::cli::Usage;

/// What `jepsen-sim` says when there is no bug in it.
const HAS_NONE: &str = "no planted bugs";

/// Where they are.
#[derive(Clone, Debug)]
pub(super) struct Planted {
    /// `jepsen-sim`.
    pub(super) sim: Option<PathBuf>,
    /// The folder of `palyrad` and `palyra`.
    pub(super) real: Option<PathBuf>,
}

/// Finds them in a folder, or builds them.
pub(super) fn programs(folder: Option<&Path>, sim: bool, real: bool) -> Result<Planted> {
    let planted = match folder {
        Some(folder) => found(folder, sim, real)?,
        None => {
            let mut planted = Planted {
                sim: None,
                real: None,
            };
            if sim {
                let folder = build(&["--bin", "jepsen-sim", "--features", "palyra-jepsen-sim/planted"])?;
                planted.sim = Some(folder.join("jepsen-sim"));
            }
            if real {
                let words = ["--bin", "palyrad", "--bin", "palyra", "--features"];
                planted.real = Some(build(&[&words[..], &["palyra-server/planted"]].concat())?);
            }
            planted
        }
    };
    if let Some(sim) = &planted.sim {
        has_bugs(sim)?;
    }
    Ok(planted)
}

fn found(folder: &Path, sim: bool, real: bool) -> Result<Planted> {
    let need = |name: &str, package: &str| {
        let path = folder.join(name);
        if path.is_file() {
            return Ok(path);
        }
        Err(anyhow::Error::from(Usage(format!(
            "{} is missing: cargo build -p {package} --features planted, or leave --binary out",
            path.display()
        ))))
    };
    let (mut planted, folder) = (
        Planted {
            sim: None,
            real: None,
        },
        folder.to_path_buf(),
    );
    if sim {
        planted.sim = Some(need("jepsen-sim", "palyra-jepsen-sim")?);
    }
    if real {
        need("palyrad", "palyra-server")?;
        need("palyra", "palyra-cli")?;
        planted.real = Some(folder);
    }
    Ok(planted)
}

/// The checkout that this is called in, or else the one that this program was built from: clones share a target folder.
fn sources() -> PathBuf {
    let here = std::env::current_dir().unwrap_or_default();
    let mut above = here.ancestors();
    match above.find(|folder| folder.join("jepsen/run/Cargo.toml").is_file()) {
        Some(root) => root.to_owned(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."),
    }
}

/// Builds what these words name, and answers the folder that it lies in. They choose from the whole workspace, whose
/// packages unite their features: with fewer of them, libraries would be built anew that are no different.
fn build(words: &[&str]) -> Result<PathBuf> {
    let root = sources();
    ensure!(
        root.join("Cargo.lock").is_file(),
        Usage(format!(
            "{} is no checkout of the sources any more; name a folder with planted programs: --binary DIR",
            root.display()
        ))
    );
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    eprintln!(
        "jepsen: builds programs with bugs in them: cargo build --workspace {}",
        words.join(" ")
    );
    let output = Command::new(cargo)
        .args(["build", "--workspace"])
        .args(words)
        .args(["--locked", "--message-format", "json-render-diagnostics"])
        .current_dir(&root)
        .stderr(Stdio::inherit())
        .output()
        .context("cargo does not start; install it, or name a folder with planted programs: --binary DIR")?;
    ensure!(
        output.status.success(),
        "cargo build --workspace {} failed: {}",
        words.join(" "),
        output.status
    );
    let text = String::from_utf8_lossy(&output.stdout);
    let messages = text
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let built: Vec<PathBuf> = messages
        .filter_map(|message| message.get("executable")?.as_str().map(PathBuf::from))
        .collect();
    let Some(folder) = built.first().and_then(|path| path.parent()) else {
        bail!("cargo build --workspace {} made no program", words.join(" "));
    };
    let planted = folder.join("planted");
    std::fs::create_dir_all(&planted).with_context(|| format!("cannot make {}", planted.display()))?;
    for path in &built {
        let Some(name) = path.file_name() else { continue };
        // A program that runs is replaced, not written over.
        let fresh = planted.join(format!("{}.new", name.to_string_lossy()));
        std::fs::copy(path, &fresh).with_context(|| format!("cannot copy {}", path.display()))?;
        std::fs::rename(&fresh, planted.join(name)).context("cannot put a planted program in its place")?;
        std::fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(planted)
}

/// Sees to it that bugs can be planted in a `jepsen-sim`: one without would let every mutant survive.
fn has_bugs(sim: &Path) -> Result<()> {
    let output = Command::new(sim)
        .args(["--planted", "none", "--seeds", "1..1"])
        .output()
        .with_context(|| format!("{} does not start", sim.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        !said.contains(HAS_NONE),
        Usage(format!(
            "{} was built without bugs: cargo build -p palyra-jepsen-sim --features planted",
            sim.display()
        ))
    );
    ensure!(
        output.status.success(),
        "{} fails without any bug: {} {said}",
        sim.display(),
        String::from_utf8_lossy(&output.stdout)
    );
    Ok(())
}
