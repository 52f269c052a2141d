//! Lists of files and scopes: what may stand in them.
//!
//! Invariant: a path that passed here is relative, leads nowhere above where it begins, and is neither named
//! twice nor below another that is a file.

use std::collections::{BTreeMap, BTreeSet};

use super::{Limits, Manifest, ManifestEntry, Scope};
use crate::ids::Digest;
use crate::reject::{Code, Reject};
use crate::{check, limits};

/// The whole workspace, in a scope.
const EVERYTHING: &str = ".";

impl Manifest {
    /// The digests of files that are kept with the run, each once, with their sizes. Files without bytes are
    /// not among them: there is nothing to keep.
    #[must_use]
    pub fn stored(&self) -> BTreeMap<Digest, u64> {
        let kept = |entry: &&ManifestEntry| entry.stored && entry.size > 0;
        let sizes = self.entries.iter().filter(kept);
        sizes.map(|entry| (entry.digest, entry.size)).collect()
    }
}

/// A list of files, `input` or `output`.
pub(super) fn check_manifest(kind: &str, manifest: &Manifest) -> Result<(), Reject> {
    let wrong = |cause: String| Err(Reject::new(Code::BadManifest, [&kind, &cause]));
    if manifest.entries.len() > limits::MANIFEST {
        return wrong(format!(
            "it names {} files; the limit is {}",
            manifest.entries.len(),
            limits::MANIFEST
        ));
    }
    let mut sizes = BTreeMap::new();
    for pair in manifest.entries.windows(2) {
        if pair[0].path >= pair[1].path {
            return wrong(format!(
                "{} is not after {}",
                shown(&pair[1].path),
                shown(&pair[0].path)
            ));
        }
    }
    let names: BTreeSet<&str> = manifest.entries.iter().map(|entry| entry.path.as_str()).collect();
    for entry in &manifest.entries {
        let path = entry.path.as_str();
        if let Some(cause) = wrong_path(path) {
            return wrong(format!("{} {cause}", shown(path)));
        }
        if let Some(above) = ancestors(path).find(|above| names.contains(above)) {
            return wrong(format!("{} lies in the file {}", shown(path), shown(above)));
        }
        if (entry.size == 0) != (entry.digest == Digest::of(b"")) {
            return wrong(format!(
                "{} has {} bytes, and another digest",
                shown(path),
                entry.size
            ));
        }
        if entry.stored && entry.size > limits::ARTIFACT_MAX {
            return wrong(format!(
                "{} has {} bytes; the limit of a file that is kept is {}",
                shown(path),
                entry.size,
                limits::ARTIFACT_MAX
            ));
        }
        if *sizes.entry(entry.digest).or_insert(entry.size) != entry.size {
            return wrong(format!(
                "{} has the digest of a file of another size",
                shown(path)
            ));
        }
    }
    let sum: u64 = manifest.stored().values().sum();
    if sum > limits::ARTIFACTS_OF_RUN {
        return wrong(format!(
            "{sum} bytes are to be kept; the limit of a run is {}",
            limits::ARTIFACTS_OF_RUN
        ));
    }
    Ok(())
}

pub(super) fn check_scope(scope: &Scope) -> Result<(), Reject> {
    let wrong = |cause: String| Err(Reject::new(Code::BadScope, [&cause]));
    if !scope.root.is_empty() && !check::is_short_name(&scope.root) {
        return wrong(format!("{} is no name of a workspace", shown(&scope.root)));
    }
    for paths in [&scope.allowed, &scope.read_only] {
        if paths.len() > limits::SCOPE_PATHS {
            return wrong(format!(
                "it names {} paths; the limit is {}",
                paths.len(),
                limits::SCOPE_PATHS
            ));
        }
    }
    let mut seen = BTreeSet::new();
    for path in scope.allowed.iter().chain(&scope.read_only) {
        let cause = wrong_path(path).filter(|_| path != EVERYTHING);
        if let Some(cause) = cause {
            return wrong(format!("{} {cause}", shown(path)));
        }
        if !seen.insert(path) {
            return wrong(format!("{} is named twice", shown(path)));
        }
    }
    Ok(())
}

pub(super) fn check_limits(wanted: &Limits) -> Result<(), Reject> {
    // More cores than any machine has are a slip of the keyboard.
    const CPU_MAX: u32 = 100 * 1_024;
    if wanted.cpu_percent > CPU_MAX {
        let cause = format_args!("it is {}; the limit is {CPU_MAX}", wanted.cpu_percent);
        return Err(check::invalid("the share of processors", &cause));
    }
    Ok(())
}

/// What is wrong with a path.
fn wrong_path(path: &str) -> Option<&'static str> {
    if path.is_empty() {
        return Some("is empty");
    }
    if path.len() > limits::PATH_MAX {
        return Some("is too long");
    }
    if path.starts_with('/') {
        return Some("is not relative");
    }
    if path.chars().any(|symbol| symbol.is_control() || symbol == '\\') {
        return Some("holds control characters or a backslash");
    }
    path.split('/').find_map(|part| match part {
        "" => Some("has an empty part"),
        "." => Some("has a part that is `.`"),
        ".." => Some("leads out with `..`"),
        _ => None,
    })
}

/// The folders that a path lies in.
fn ancestors(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(at, _)| &path[..at])
}

fn shown(path: &str) -> String {
    check::quoted(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, bytes: &[u8], stored: bool) -> ManifestEntry {
        ManifestEntry {
            path: path.to_owned(),
            digest: Digest::of(bytes),
            size: bytes.len() as u64,
            stored,
            executable: false,
        }
    }

    fn cause(entries: Vec<ManifestEntry>) -> String {
        check_manifest("input", &Manifest { entries }).unwrap_err().args[1].clone()
    }

    #[test]
    fn files_lie_where_they_are_put_and_nowhere_else() {
        let fine = vec![
            entry("a", b"1", true),
            entry("b/c", b"", true),
            entry("b/d", b"1", false),
        ];
        let manifest = Manifest { entries: fine };
        assert_eq!(check_manifest("input", &manifest), Ok(()));
        assert_eq!(manifest.stored(), BTreeMap::from([(Digest::of(b"1"), 1)]));
        for (path, why) in [
            ("", "is empty"),
            ("/etc/passwd", "is not relative"),
            ("../x", "leads out with `..`"),
            ("a/../../x", "leads out with `..`"),
            ("a//b", "has an empty part"),
            ("a/./b", "has a part that is `.`"),
            ("a/", "has an empty part"),
            ("a\\..\\b", "holds control characters or a backslash"),
            ("a\0b", "holds control characters or a backslash"),
        ] {
            let found = cause(vec![entry(path, b"1", true)]);
            assert!(found.ends_with(why), "{path:?}: {found}");
        }
        assert!(cause(vec![entry(&"x".repeat(256), b"1", true)]).ends_with("is too long"));
    }

    #[test]
    fn files_are_named_once_in_order_and_are_no_folders() {
        assert!(cause(vec![entry("a", b"1", true), entry("a", b"2", true)]).contains("is not after"));
        assert!(cause(vec![entry("b", b"1", true), entry("a", b"2", true)]).contains("is not after"));
        let nested = vec![
            entry("a", b"1", true),
            entry("a-b", b"1", true),
            entry("a/b", b"2", true),
        ];
        assert_eq!(cause(nested), "\"a/b\" lies in the file \"a\"");
    }

    #[test]
    fn sizes_and_digests_agree() {
        let mut lies = entry("a", b"1", true);
        lies.size = 0;
        assert!(cause(vec![lies.clone()]).contains("another digest"));
        lies.size = 2;
        assert!(cause(vec![entry("A", b"1", true), lies.clone()]).contains("another size"));
        lies.size = limits::ARTIFACT_MAX + 1;
        assert!(cause(vec![lies.clone()]).contains("the limit of a file"));
        lies.stored = false;
        assert_eq!(check_manifest("input", &Manifest { entries: vec![lies] }), Ok(()));
        let large = |path: &str, bytes: &[u8]| ManifestEntry {
            size: limits::ARTIFACT_MAX,
            ..entry(path, bytes, true)
        };
        let many = vec![large("a", b"1"), large("b", b"2"), large("c", b"3")];
        assert!(cause(many).contains("the limit of a run"));
        let same = vec![large("a", b"1"), large("b", b"1"), large("c", b"1")];
        assert_eq!(check_manifest("input", &Manifest { entries: same }), Ok(()));
        let count = (0..=limits::MANIFEST).map(|at| entry(&format!("{at:03}"), b"1", false));
        assert!(cause(count.collect()).contains("the limit is"));
    }

    #[test]
    fn a_scope_stays_in_its_workspace() {
        let scope = |root: &str, allowed: &[&str], read_only: &[&str]| Scope {
            root: root.to_owned(),
            allowed: allowed.iter().map(|path| (*path).to_owned()).collect(),
            read_only: read_only.iter().map(|path| (*path).to_owned()).collect(),
        };
        assert_eq!(check_scope(&Scope::default()), Ok(()));
        assert_eq!(check_scope(&scope("repo", &["."], &["src/lib"])), Ok(()));
        for wrong in [
            scope("../repo", &[], &[]),
            scope("repo", &["../x"], &[]),
            scope("repo", &["a"], &["a"]),
            scope("repo", &["/"], &[]),
        ] {
            assert!(check_scope(&wrong).is_err(), "{wrong:?}");
        }
        let many = vec!["x"; limits::SCOPE_PATHS + 1];
        assert!(check_scope(&scope("repo", &many, &[])).is_err());
    }
}
